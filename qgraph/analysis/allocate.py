"""`allocate`: bits of each layer's weights, such that the model keeps the most quality within a budget.

What a layer costs at a width is in `costs.py`, what it takes in `latency.py`, the choice in a budget in `budget.py`.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, ParamSpec

from rich.table import Table
from torch import nn

from qgraph.analysis.budget import budget_bytes, choose, latency_share
from qgraph.analysis.costs import Evaluate, Evaluations, Loss, Unit, fisher_costs, spec_at, units_of
from qgraph.analysis.latency import Stopwatch, Times
from qgraph.analysis.scores import Scores, is_loss
from qgraph.config import QConfig, QuantSpec, Rule
from qgraph.errors import ConfigError, InspectError
from qgraph.graph import STATE, config_of, is_prepared, unwrapped
from qgraph.terminal import as_text

__all__ = ["Allocation", "LayerBits", "allocate", "allocation"]

CANDIDATES = (1, 1.58, 2, 3, 4, 6, 8)
TIE = 1e-3  # of the largest cost: what noise of the weights decides where costs are equal
TRIES = 4  # of a choice that is timed
NOISE = 0.02  # of a measured latency
GLOB = re.compile(r"[*?\[]")

FOUND_BETTER = {
    "uniform": "the same bits everywhere: evaluate found no mixed choice better",
    "noise": "the best choice by the noise of the weights: evaluate found it better than that by costs",
}

P = ParamSpec("P")
How = Literal["evaluate", "snr", "fisher"]
Choice = Literal["costs", "noise", "uniform"]


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
    milliseconds : dict of float to float, optional
        What it takes in a run at each candidate, for a budget of latency.
    """

    paths: tuple[str, ...]
    bits: float
    weights: int
    stored: int
    costs: dict[float, float]
    milliseconds: dict[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Allocation:
    """What `allocation` found; `print` it.

    `config` is what to prepare with; `stored` are bytes of the allocated weights, and `limit` those that are allowed,
    None for a budget of latency. Then `latency` is what a run takes over the float model, as measured, and
    `latency_limit` what is allowed. `choice` says what the bits are best by: the costs, or, where `evaluate` found that
    better, the noise of the weights, or one width everywhere.
    """

    config: QConfig
    how: How
    layers: tuple[LayerBits, ...]
    stored: int
    limit: int | None
    latency: float | None = None
    latency_limit: float | None = None
    choice: Choice = "costs"

    @property
    def uniform(self) -> bool:
        """Whether no mixed choice was better than one width everywhere."""
        return self.choice == "uniform"

    @property
    def bits_per_weight(self) -> float:
        """The mean over all allocated weights, scales included."""
        return 8 * self.stored / sum(layer.weights for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        layers = [
            {
                **asdict(layer),
                "costs": {str(b): c for b, c in layer.costs.items()},
                "milliseconds": layer.milliseconds and {str(b): t for b, t in layer.milliseconds.items()},
            }
            for layer in self.layers
        ]
        return {
            "how": self.how,
            "stored": self.stored,
            "limit": self.limit,
            "latency": self.latency,
            "latency_limit": self.latency_limit,
            "choice": self.choice,
            "bits_per_weight": self.bits_per_weight,
            "layers": layers,
        }

    def __rich_console__(self, console: Any, options: Any) -> Any:
        room = f"{self.stored:,} bytes" if self.limit is None else f"{self.stored:,} of {self.limit:,} bytes"
        yield f"{room}, {self.bits_per_weight:.2f} bits a weight; costs by {self.how}"
        if self.latency is not None:
            yield f"{self.latency:.2f}x the float model's latency, allowed {self.latency_limit:g}x"
        if self.choice != "costs":
            yield FOUND_BETTER[self.choice]
        widths = sorted(self.layers[0].costs)
        table = Table("layer", "bits", "bytes", *(f"cost at {bits}" for bits in widths))
        for layer in self.layers:
            costs = [f"{layer.costs[bits]:+.3g}" if bits in layer.costs else "-" for bits in widths]
            names = ", ".join(path or "the model" for path in layer.paths)
            table.add_row(names, f"{layer.bits}", f"{layer.stored:,}", *costs)
        yield table

    def __str__(self) -> str:
        return as_text(self, 140)


def allocation(
    prepared: nn.Module,
    budget: str,
    evaluate: Evaluate | None = None,
    *,
    candidates: Sequence[float] = CANDIDATES,
    how: How = "evaluate",
    lower_is_better: bool = False,
    resume: str | os.PathLike[str] | None = None,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Allocation:
    """Bits for the weights of each layer, such that the least quality is lost within a budget.

    The cost of a layer at a width is what the score loses when that layer alone has it and all others have the widest
    candidate; costs are taken to add up, and the best choice is then found exactly. So is the best one by noise of the
    weights; of these two and one width for all layers, the one that `evaluate` finds best is returned. Activations,
    sparsity, scales and methods stay as they are configured, and so does what rules leave float.

    For a budget of latency the model is exported once at each candidate (target "ort", for latency) and timed and
    profiled beside the float model; what is chosen is then timed itself.

    Parameters
    ----------
    prepared : nn.Module
        A prepared model with weights to go by: trained ones. It is left as it was.
    budget : str
        ``"2.5 bits"``, the mean over the quantized weights with their scales; ``"4 MB"`` (B, KB, MB, GB), of the whole
        model, floats included; ``"0.5x size"``, of the model as it is prepared now; or ``"0.5x latency"``, of what the
        float model takes for `example_inputs` in onnxruntime on one thread of this machine.
    evaluate : callable
        Takes the model and returns a number, the same one for the same model. Best is `qgraph.divergence`, which chance
        moves least; a loss tells more than an accuracy, which moves in steps.
    candidates : sequence of numbers
        Bits to choose from: 1..8, or 1.58.
    how : {"evaluate", "snr", "fisher"}
        Where costs come from. "evaluate": evaluations, layers times candidates many. "snr": noise of the weights over
        their power, without any data. "fisher": noise of each weight times its mean squared gradient, second order;
        takes `loss` and a few `batches`.
    lower_is_better : bool
        True for a loss or a perplexity; `qgraph.divergence` says so itself.
    resume : path, optional
        A JSON file to keep evaluated scores in: a run that was stopped goes on, and another budget needs few more.
    loss : callable (model, batch) -> Tensor, optional
    batches : iterable, optional
    example_inputs, example_kwargs : optional
        What a run is timed with, as `qgraph.export` takes them; for a budget of latency.
    progress : bool
        Show a bar on a terminal.

    Returns
    -------
    Allocation
        Its `config` is that of `prepared` with a rule for each layer that differs; prepare the model anew with it.
        `print` the rest, costs and sizes, as a table. `qgraph.allocate` returns the config alone.

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
    >>> config = qgraph.allocate(prepared, "2.5 bits", qgraph.divergence(prepared, batches))  # doctest: +SKIP
    >>> mixed = qgraph.prepare(model, config, (x,))  # doctest: +SKIP
    """
    model = unwrapped(prepared)
    _check_arguments(model, how, evaluate, loss, batches, candidates)
    widths = sorted({QuantSpec(bits).bits for bits in candidates})
    units = units_of(model, widths)
    share = latency_share(budget)
    if share is None:
        room = _bytes_room(model, units, widths, budget)
    else:
        watch = Stopwatch(model, units, example_inputs, example_kwargs)
        room = _time_room(watch, watch.measure(widths, progress), widths, share)
    noise = [[unit.noise(bits) for bits in widths] for unit in units]
    evaluations: Evaluations | None = None
    if how == "evaluate":
        assert evaluate is not None
        scores = Scores(model, resume, "allocate")
        evaluations = Evaluations(model, units, evaluate, is_loss(evaluate, lower_is_better), scores)
        costs = evaluations.costs(widths, progress)
    elif how == "fisher":
        assert loss is not None and batches is not None
        costs = fisher_costs(model, units, widths, loss, batches, progress)
    else:
        costs = noise
    chosen, latency = room.choose(_with_ties(costs, noise), widths)
    choice: Choice = "costs"
    if evaluations is not None:
        choice, chosen, latency = _best(evaluations, room, noise, chosen, latency, widths)
    layers = tuple(
        LayerBits(
            tuple(unit.paths),
            widths[i],
            unit.weights,
            unit.bytes_at(widths[i]),
            dict(zip(widths, cost, strict=True)),
            None if room.times is None else dict(zip(widths, row, strict=True)),
        )
        for unit, i, cost, row in zip(units, chosen, costs, room.rows, strict=True)
    )
    return Allocation(
        _config(model, units, [layer.bits for layer in layers]),
        how,
        layers,
        sum(layer.stored for layer in layers),
        int(room.limit) if room.times is None else None,
        latency,
        share,
        choice,
    )


def _config_alone(find: Callable[P, Allocation]) -> Callable[P, QConfig]:
    """The same function, with its config alone as the result."""

    @functools.wraps(find)
    def allocate(*args: P.args, **kwargs: P.kwargs) -> QConfig:
        return find(*args, **kwargs).config

    allocate.__name__ = allocate.__qualname__ = "allocate"
    allocate.__signature__ = inspect.signature(find).replace(return_annotation="QConfig")  # type: ignore[attr-defined]
    return allocate


allocate = _config_alone(allocation)


def _check_arguments(model: Any, how: str, evaluate: Any, loss: Any, batches: Any, candidates: Sequence[float]) -> None:
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


def _best(
    evaluations: Evaluations,
    room: _Room,
    noise: Sequence[Sequence[float]],
    chosen: list[int],
    latency: float | None,
    widths: Sequence[float],
) -> tuple[Choice, list[int], float | None]:
    """Of the choice by costs, that by noise and one width everywhere the one that scores best.

    Costs at few bits do not quite add up: what one layer adds to the noise of another is in no cost.
    """
    found: list[tuple[Choice, list[int], float | None]] = []
    one = room.widest()
    if one is not None:
        found.append(("uniform", [one] * len(chosen), None if room.times is None else room.times.at(one)))
    found.append(("costs", chosen, latency))
    if room.times is None:  # else each choice is exported and timed
        found.append(("noise", *room.choose(noise, widths)))
    best = evaluations.best([[widths[i] for i in places] for _, places, _ in found])
    return found[best]


@dataclass(slots=True)
class _Room:
    """What each layer takes at each width, and what all of them may: bytes, or milliseconds where there are `times`."""

    rows: Sequence[Sequence[float]]
    limit: float
    share: float = 0.0
    watch: Stopwatch | None = None
    times: Times | None = None

    def widest(self) -> int | None:
        """The place of the widest candidate that all layers may have."""
        fits = [i for i in range(len(self.rows[0])) if sum(row[i] for row in self.rows) <= self.limit]
        return max(fits, default=None)

    def choose(self, costs: Sequence[Sequence[float]], widths: Sequence[float]) -> tuple[list[int], float | None]:
        """The place of each layer's candidate, and the latency that was measured with them."""
        if self.watch is None or self.times is None:
            return choose(costs, self.rows, self.limit), None
        limit, least, found = self.limit, sum(map(min, self.rows)), self.share
        for _ in range(TRIES):
            chosen = choose(costs, self.rows, max(limit, least))
            found = self.watch.share([widths[i] for i in chosen])
            if found <= self.share * (1 + NOISE):
                return chosen, found
            limit -= (found - self.share) * self.times.whole  # layers do not quite add up
        raise ConfigError(
            f"allocate: no choice keeps the budget '{self.share:g}x latency': the last of {TRIES} took {found:.2f}x. "
            f"{_at_each_width(self.times, widths)}"
        )


def _bytes_room(model: nn.Module, units: Sequence[Unit], widths: Sequence[float], budget: str) -> _Room:
    rows = [[unit.bytes_at(bits) for bits in widths] for unit in units]
    present, other = sum(unit.present_bytes() for unit in units), _other_bytes(model, units)
    limit = budget_bytes(budget, sum(unit.weights for unit in units), other, present + other)
    least = sum(map(min, rows))
    if least > limit:
        raise ConfigError(
            f"allocate: the weights take {least:,} bytes at the narrowest of the candidates, and the budget {budget!r} "
            f"leaves {max(0, limit):,} for them ({other:,} are floats). Raise it, add narrower candidates, or let "
            f"larger groups share a scale."
        )
    return _Room(rows, limit)


def _time_room(watch: Stopwatch, times: Times, widths: Sequence[float], share: float) -> _Room:
    limit, least = share * times.whole - times.rest, sum(map(min, times.layers))
    if least > limit:
        raise ConfigError(
            f"allocate: the fastest candidate of each layer makes {(times.rest + least) / times.whole:.2f}x the float "
            f"model's latency, and the budget is '{share:g}x latency'. {_at_each_width(times, widths)}"
        )
    return _Room(times.layers, limit, share, watch, times)


def _at_each_width(times: Times, widths: Sequence[float]) -> str:
    found = ", ".join(f"{bits} bits {times.at(i):.2f}x" for i, bits in enumerate(widths))
    return (
        f"Everywhere the same, these inputs take {found}; {times.rest / times.whole:.2f}x is of what no weight's bits "
        f"change. Raise the budget, or make activations or scales coarser."
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
