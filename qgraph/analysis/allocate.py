"""`allocate`: bits of each layer's weights, such that the model keeps the most quality within a budget.

What a layer costs at a width is in `costs.py`, the choice within a budget in `budget.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rich.table import Table
from torch import nn

from qgraph.analysis.budget import budget_bytes, choose
from qgraph.analysis.costs import Evaluate, Loss, Unit, evaluated_costs, fisher_costs, spec_at, units_of
from qgraph.config import QConfig, QuantSpec, Rule
from qgraph.errors import ConfigError, InspectError
from qgraph.graph import STATE, config_of, is_prepared, unwrapped
from qgraph.terminal import as_text

__all__ = ["Allocation", "LayerBits", "allocate", "allocation"]

CANDIDATES = (1, 1.58, 2, 3, 4, 6, 8)
TIE = 1e-3  # of the largest cost: what noise of the weights decides where costs are equal
GLOB = re.compile(r"[*?\[]")

How = Literal["evaluate", "snr", "fisher"]


@dataclass(frozen=True, slots=True)
class LayerBits:
    """What was chosen for one layer, or for layers that share a weight.

    Parameters
    ----------
    paths : tuple of str
        Module paths.
    bits : float
    weights, stored : int
        How many weights, and the bytes of their codes and scales.
    costs : dict of float to float
        Quality lost at each candidate, against the widest one.
    """

    paths: tuple[str, ...]
    bits: float
    weights: int
    stored: int
    costs: dict[float, float]


@dataclass(frozen=True, slots=True)
class Allocation:
    """What `allocation` found; `print` it.

    `config` is what to prepare with; `stored` and `limit` are bytes of the allocated weights, found and allowed.
    """

    config: QConfig
    how: How
    layers: tuple[LayerBits, ...]
    stored: int
    limit: int

    @property
    def bits_per_weight(self) -> float:
        """The mean over all allocated weights, scales included."""
        return 8 * self.stored / sum(layer.weights for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        layers = [{**asdict(layer), "costs": {str(b): c for b, c in layer.costs.items()}} for layer in self.layers]
        return {
            "how": self.how,
            "stored": self.stored,
            "limit": self.limit,
            "bits_per_weight": self.bits_per_weight,
            "layers": layers,
        }

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield f"{self.stored:,} of {self.limit:,} bytes, {self.bits_per_weight:.2f} bits a weight; costs by {self.how}"
        widths = sorted(self.layers[0].costs)
        table = Table("layer", "bits", "bytes", *(f"cost at {bits}" for bits in widths))
        for layer in self.layers:
            costs = [f"{layer.costs[bits]:+.3g}" if bits in layer.costs else "-" for bits in widths]
            names = ", ".join(path or "the model" for path in layer.paths)
            table.add_row(names, f"{layer.bits}", f"{layer.stored:,}", *costs)
        yield table

    def __str__(self) -> str:
        return as_text(self, 140)


def allocate(
    prepared: nn.Module,
    budget: str,
    evaluate: Evaluate | None = None,
    *,
    candidates: Sequence[float] = CANDIDATES,
    how: How = "evaluate",
    lower_is_better: bool = False,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    progress: bool = True,
) -> QConfig:
    """Bits for the weights of each layer, such that the least quality is lost within a budget.

    The cost of a layer at a width is what the score loses when that layer alone has it and all others have the widest
    candidate; costs are taken to add up, and the best choice is then found exactly. Activations, sparsity, scales and
    methods stay as they are configured, and so does what rules leave float.

    Parameters
    ----------
    prepared : nn.Module
        A prepared model with weights to go by: trained ones. It is left as it was.
    budget : str
        ``"2.5 bits"``, the mean over the quantized weights with their scales; ``"4 MB"`` (B, KB, MB, GB), of the whole
        model, floats included; or ``"0.5x size"``, of the model as it is prepared now.
    evaluate : callable
        Takes the model and returns a number, the same one for the same model. A loss tells more than an accuracy, which
        moves in steps.
    candidates : sequence of numbers
        Bits to choose from: 1..8, or 1.58.
    how : {"evaluate", "snr", "fisher"}
        Where costs come from. "evaluate": evaluations, layers times candidates many. "snr": noise of the weights over
        their power, without any data. "fisher": noise of each weight times its mean squared gradient, second order;
        takes `loss` and a few `batches`.
    lower_is_better : bool
        True for a loss or a perplexity.
    loss : callable (model, batch) -> Tensor, optional
    batches : iterable, optional
    progress : bool
        Show a bar on a terminal.

    Returns
    -------
    QConfig
        The config of `prepared` with a rule for each layer that differs; prepare the model anew with it.
        `qgraph.allocation` returns it with costs and sizes, as a table.

    Raises
    ------
    ConfigError
        For a text that is no budget, one that the narrowest candidates exceed, candidates that a site cannot take, and
        weights whose step is learned.
    InspectError
        For a model that is not prepared or has no quantized weight, and an `evaluate` that gives no finite number.
    QGraphError
        Without scipy (``pip install 'qgraph[allocate]'``).

    Examples
    --------
    >>> config = qgraph.allocate(prepared, "2.5 bits", accuracy)  # doctest: +SKIP
    >>> mixed = qgraph.prepare(model, config, (x,))  # doctest: +SKIP
    """
    return allocation(
        prepared,
        budget,
        evaluate,
        candidates=candidates,
        how=how,
        lower_is_better=lower_is_better,
        loss=loss,
        batches=batches,
        progress=progress,
    ).config


def allocation(
    prepared: nn.Module,
    budget: str,
    evaluate: Evaluate | None = None,
    *,
    candidates: Sequence[float] = CANDIDATES,
    how: How = "evaluate",
    lower_is_better: bool = False,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    progress: bool = True,
) -> Allocation:
    """`allocate`, with the costs and sizes that it went by."""
    model = unwrapped(prepared)
    if not isinstance(model, nn.Module) or not is_prepared(model):
        raise InspectError(f"allocate: {type(model).__name__} is not prepared. Expected what qgraph.prepare returns.")
    if how not in ("evaluate", "snr", "fisher"):
        raise ConfigError(f"allocate: found how={how!r}. Expected 'evaluate', 'snr' or 'fisher'.")
    if how == "evaluate" and not callable(evaluate):
        raise ConfigError("allocate: how='evaluate' needs evaluate=, a function of the model that returns a number.")
    if how == "fisher" and (loss is None or batches is None):
        raise ConfigError("allocate: how='fisher' needs loss=, a function (model, batch), and batches= of data.")
    if not candidates:
        raise ConfigError("allocate: no candidates. Expected bits to choose from, such as (2, 4, 8).")
    widths = sorted({QuantSpec(bits).bits for bits in candidates})
    units = units_of(model, widths)
    sizes = [[unit.bytes_at(bits) for bits in widths] for unit in units]
    present = sum(unit.present_bytes() for unit in units)
    other = _other_bytes(model, units)
    limit = budget_bytes(budget, sum(unit.weights for unit in units), other, present + other)
    least = sum(min(row) for row in sizes)
    if least > limit:
        raise ConfigError(
            f"allocate: the weights take {least:,} bytes at the narrowest of the candidates, and the budget {budget!r} "
            f"leaves {max(0, limit):,} for them ({other:,} are floats). Raise it, add narrower candidates, or let "
            f"larger groups share a scale."
        )
    noise = [[unit.noise(bits) for bits in widths] for unit in units]
    if how == "evaluate":
        assert evaluate is not None
        costs = evaluated_costs(model, units, widths, evaluate, -1 if lower_is_better else 1, progress)
    elif how == "fisher":
        assert loss is not None and batches is not None
        costs = fisher_costs(model, units, widths, loss, batches, progress)
    else:
        costs = noise
    chosen = choose(_with_ties(costs, noise), sizes, limit)
    layers = tuple(
        LayerBits(tuple(unit.paths), widths[i], unit.weights, row[i], dict(zip(widths, cost, strict=True)))
        for unit, i, row, cost in zip(units, chosen, sizes, costs, strict=True)
    )
    return Allocation(
        _config(model, units, [layer.bits for layer in layers]),
        how,
        layers,
        sum(layer.stored for layer in layers),
        limit,
    )


def _other_bytes(model: nn.Module, units: Sequence[Unit]) -> int:
    """All parameters and buffers, as they are, but the weights that are allocated."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    total = sum(t.numel() * t.element_size() for t in tensors)
    return max(0, total - sum(v.numel() * v.element_size() for unit in units for _, v in unit.sites))


def _with_ties(costs: Sequence[Sequence[float]], noise: Sequence[Sequence[float]]) -> list[list[float]]:
    """Costs that never fall as bits do, and, where they are equal, less noise in front."""
    largest = max(1e-30, *(abs(cost) for row in costs for cost in row))
    total = max(1e-30, *(sum(row) for row in noise)) * len(noise)
    found = []
    for row, lost in zip(costs, noise, strict=True):
        rising = list(row)
        for i in reversed(range(len(row) - 1)):
            rising[i] = max(rising[i], rising[i + 1])
        found.append([cost + TIE * largest * n / total for cost, n in zip(rising, lost, strict=True)])
    return found


def _config(model: nn.Module, units: Sequence[Unit], bits: Sequence[float]) -> QConfig:
    """The model's config, with a rule for each module whose bits differ from what it says."""
    base = config_of(model)
    assert base is not None
    given = model.__dict__[STATE].shared.configs
    wanted = dict(given)
    for unit, width in zip(units, bits, strict=True):
        for path in unit.paths:
            present = given.get(path, base)
            weight = next(record for record, _ in unit.sites)
            wanted[path] = None if present is None else replace(present, weight=spec_at(weight, width), rules=())
    rules: dict[str, Rule] = {}
    inherited = dict[str, QConfig | None]()
    for path in sorted(wanted, key=lambda path: (path.count("."), path)):
        above = [path[:i] for i, character in enumerate(path) if character == "."]
        ruling = next((p for p in reversed(above) if p in inherited), None)
        now = inherited[ruling] if ruling is not None else given.get(path, base)
        plain = None if now is None else replace(now, rules=())
        goal = wanted[path]
        goal = None if goal is None else replace(goal, rules=())
        if plain != goal:
            match = re.compile(f"^{re.escape(path)}$") if GLOB.search(path) else path
            rules[path], inherited[path] = Rule(match, goal), goal
    return base.add_rules(*rules.values())
