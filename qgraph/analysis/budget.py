"""Budgets of `qgraph.allocate` as text, and the exact choice of one candidate a layer within them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qgraph.errors import ConfigError, QGraphError

UNITS = {"B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
_TEXT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(bits?|x size|x|B|KB|MB|GB)\s*", re.I)
_LATENCY = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*x latency\s*", re.I)
KNOWN = (
    "'2.5 bits' (a quantized weight, scales included), '4 MB' (the whole model), '0.5x size' (of the model as it is "
    "prepared now) or '0.5x latency' (of the float model in onnxruntime)"
)


def latency_share(text: str) -> float | None:
    """The number of a budget such as ``"0.5x latency"``; None for another text."""
    found = _LATENCY.fullmatch(text) if isinstance(text, str) else None
    if found is not None and float(found[1]) <= 0:
        raise ConfigError(f"allocate: a budget is above 0, found {text!r}.")
    return None if found is None else float(found[1])


def budget_bytes(text: str, weights: int, other_bytes: int, present_bytes: int) -> int:
    """Bytes that the quantized weights may take.

    Parameters
    ----------
    text : str
    weights : int
        How many weights are allocated.
    other_bytes : int
        What the rest of the model takes, whatever is chosen.
    present_bytes : int
        What the whole model takes now.

    Raises
    ------
    ConfigError
        For a text that is no budget of size.
    """
    found = _TEXT.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        timed = isinstance(text, str) and re.search(r"\d\s*(ms|us|s|fps|tokens/s)\s*$|latency", text) is not None
        why = " A budget of time is a share of the float model's, measured beside it on this machine." if timed else ""
        raise ConfigError(f"allocate: budget {text!r} is not one of {KNOWN}.{why}")
    number, unit = float(found[1]), found[2].upper()
    if number <= 0:
        raise ConfigError(f"allocate: a budget is above 0, found {text!r}.")
    if unit.startswith("BIT"):
        return int(number * weights / 8)
    if unit.startswith("X"):
        return int(number * present_bytes) - other_bytes
    return int(number * UNITS[unit]) - other_bytes


def choose(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], limit: float) -> list[int]:
    """For each layer the candidate: least total cost with a total size (or time) of at most `limit`; exact.

    A multiple-choice knapsack, solved as an integer programme (scipy's `milp`, which is HiGHS).

    Raises
    ------
    QGraphError
        Without scipy, or where the solver gives up; ConfigError is for the caller, who knows names.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise QGraphError("allocate needs scipy's solver: pip install 'qgraph[allocate]'.") from error
    counts = [len(row) for row in costs]
    starts = np.cumsum([0, *counts])
    objective = np.concatenate([np.asarray(row, float) for row in costs])
    weights = np.concatenate([np.asarray(row, float) for row in sizes])
    one: Any = np.zeros((len(counts), len(objective)))
    for row in range(len(counts)):
        one[row, starts[row] : starts[row + 1]] = 1
    scale = max(1e-30, float(np.abs(objective).max()))  # the solver's tolerances are absolute
    solved = milp(
        objective / scale,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(weights[None] / max(1e-9, limit), -np.inf, 1.0)],
        # Presolved, HiGHS prints what it thinks of its own solutions; without, it takes about as long.
        options={"mip_rel_gap": 0.0, "presolve": False},
    )
    if solved.x is None:
        raise QGraphError(f"allocate: the solver found no choice within {limit:,.6g}: {solved.message}")
    return [int(np.argmax(solved.x[starts[row] : starts[row + 1]])) for row in range(len(counts))]
