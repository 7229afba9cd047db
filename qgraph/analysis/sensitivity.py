"""`sensitivity`: how much quality each layer, and each kind of quantizer, costs.

By evaluations alone, each with other quantizers switched on; nothing of the model is copied. What comes before those is
not computed again (`replay.py`).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn

from qgraph.analysis.gradient import LossChanges
from qgraph.analysis.recorded import title_of
from qgraph.analysis.replay import Replay
from qgraph.analysis.scores import Scores, is_loss, score_of
from qgraph.errors import InspectError
from qgraph.graph import is_prepared, keeping_modes
from qgraph.modules import ActivationQuantizer, Sparsifier, WeightQuantizer
from qgraph.terminal import as_text, progress_bar

__all__ = ["LayerSensitivity", "SensitivityReport", "sensitivity"]

KINDS: Mapping[str, type[nn.Module]] = {
    "weights": WeightQuantizer,
    "activations": ActivationQuantizer,
    "sparsity": Sparsifier,
}
HEADINGS = {
    "quantized": "quantized alone",
    "float": "left float alone",
    "gradient": "quantized alone, by gradient",
}
NONE_ACTIVE = "sensitivity: no quantizer of the model is active. Switch them on with qgraph.set_enabled."


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """One layer, or one kind of quantizer.

    Parameters
    ----------
    name : str
        Module path, or ``weights``, ``activations`` or ``sparsity``.
    kind : {"layer", "kind"}
    score : float
        What `evaluate` gave.
    cost : float
        Quality lost to it, positive for worse: against the float model where it is quantized alone, against the wholly
        quantized one where it is left float alone.
    quantizers : int
        How many quantizers and sparsifiers it has.
    """

    name: str
    kind: str
    score: float
    cost: float
    quantizers: int


@dataclass(frozen=True, slots=True)
class SensitivityReport:
    """What `sensitivity` found, the costliest first; `print` it.

    `cached` says what of the activations was kept, why evaluations were run in full, or which layers are left out.
    """

    title: str
    how: str
    lower_is_better: bool
    float_score: float
    quantized_score: float
    layers: tuple[LayerSensitivity, ...]
    kinds: tuple[LayerSensitivity, ...]
    cached: str = ""

    @property
    def worst(self) -> LayerSensitivity:
        """The costliest layer."""
        return self.layers[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __rich_console__(self, console: Any, options: Any) -> Any:
        better = "lower" if self.lower_is_better else "higher"
        yield f"{self.title}; {better} is better: float {self.float_score:.6g}, quantized {self.quantized_score:.6g}"
        table = Table()
        for name in (HEADINGS[self.how], "score", "cost"):
            table.add_column(name, justify="right" if name in ("score", "cost") else "left", overflow="fold")
        for rows in (self.layers, self.kinds):
            for row in rows:
                table.add_row(row.name or "the model", f"{row.score:.6g}", f"{row.cost:+.4g}")
            table.add_section()
        yield table
        if self.cached:
            yield self.cached

    def __str__(self) -> str:
        return as_text(self)


def sensitivity(
    prepared: nn.Module,
    evaluate: Callable[[nn.Module], float] | None = None,
    *,
    how: Literal["quantized", "float", "gradient"] = "quantized",
    lower_is_better: bool = False,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batches: Iterable[Any] | None = None,
    first: int | None = None,
    calls: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    cache_bytes: int = 1 << 30,
    progress: bool = True,
) -> SensitivityReport:
    """Rank the layers of a prepared model, and its kinds of quantizers, by the quality that they cost.

    Runs `evaluate` once for the float model, once for the quantized one, and once for each layer and kind. What the
    model computes before the layer in question is kept from one run and given back in the others, so that a run costs
    what comes after the layer: half an evaluation on average. Switches and train or eval modes are as before
    afterwards. Quantizers that are switched off stay off and count for nothing.

    Parameters
    ----------
    prepared : nn.Module
    evaluate : callable
        Takes the model and returns a number, the same one for the same model; it must not train.
    how : {"quantized", "float", "gradient"}
        Whether one layer alone is quantized, or one alone is left float. "gradient" is a fast proxy for the first: what
        each layer, quantized alone, would add to a loss to second order (`gradient.py`), in two passes over some
        `batches` however many layers there are. Layers that keep state or run as Python are not ranked by it.
    lower_is_better : bool
        True for a loss or a perplexity; `qgraph.divergence` says so itself.
    resume : path, optional
        A JSON file to keep the scores in: a run that was stopped goes on from there. Not for how="gradient".
    loss : callable (model, batch) -> Tensor, optional
        A mean over samples, with a gradient; for how="gradient", which does without `evaluate`.
    batches : iterable, optional
        What `loss` is given. Samples are the first dimension of every layer's output.
    first : int, optional
        Evaluate only this many layers: those that "gradient", by `loss` and `batches`, ranks first. Layers that it does
        not rank are evaluated too. Where there are many layers, a fraction of the time for the few that hurt.
    calls : int, optional
        Of the calls of the model that `evaluate` makes (one a batch, say), run only so many for each layer and kind,
        spread evenly, and give the others the outputs kept: with `calls=2` of 16 a layer costs an eighth of what it
        does. Costs are scaled up to all calls, which estimates them where the score is a mean over samples.
    cache_bytes : int
        How much of the activations to keep, on their device; 0 runs each evaluation in full. Nothing is kept of a
        model that draws random numbers, nor with gradients, nor where a check finds that it changes the score.
    progress : bool
        Show a bar on a terminal.

    Returns
    -------
    SensitivityReport

    Raises
    ------
    InspectError
        For a model that is not prepared or has no active quantizer, an `evaluate` that gives no finite number or
        changes the weights, and a `resume` file of another model.

    Examples
    --------
    >>> print(qgraph.sensitivity(prepared, lambda model: accuracy(model, data)))  # doctest: +SKIP
    """
    if how not in ("quantized", "float", "gradient"):
        raise InspectError(f"sensitivity: found how={how!r}. Expected 'quantized', 'float' or 'gradient'.")
    if not isinstance(prepared, nn.Module) or not is_prepared(prepared):
        raise InspectError(
            f"sensitivity: {type(prepared).__name__} is not prepared. Expected what qgraph.prepare returns."
        )
    if how == "gradient":
        if resume is not None:
            raise InspectError("sensitivity: how='gradient' keeps no scores. Leave resume= out, it takes two passes.")
        if first is not None:
            raise InspectError("sensitivity: how='gradient' ranks every layer at once. Leave first= out.")
        if calls is not None:
            raise InspectError("sensitivity: how='gradient' makes one pass. Leave calls= out, give it fewer batches.")
        return _by_gradient(prepared, loss, batches, progress)
    if first is not None and (not isinstance(first, int) or first < 1):
        raise InspectError(f"sensitivity: found first={first!r}. Expected a number of layers, at least 1.")
    if calls is not None and (not isinstance(calls, int) or calls < 1):
        raise InspectError(f"sensitivity: found calls={calls!r}. Expected a number of calls of the model, at least 1.")
    if not callable(evaluate):
        raise InspectError("sensitivity: needs evaluate, a function of the model that returns a number.")
    lower_is_better = is_loss(evaluate, lower_is_better)
    scores = _Evaluations(prepared, evaluate, resume, Replay(prepared, cache_bytes), calls)
    label, base_name = how if calls is None else f"{how}/{calls}", "float" if how == "quantized" else "quantized"
    known, versions = _layers(prepared), _versions(prepared)
    at_once = [held for name, held in known.items() if f"{label} layer {name}" not in scores.found]
    scores.take("quantized", None, base_of=at_once if how == "float" else ())  # it may be what makes the quantizers
    layers, kinds = _layers(prepared), _kinds(prepared)
    if not layers:
        raise InspectError(NONE_ACTIVE)
    everything = {id(module) for held in layers.values() for module in held}
    as_before = known == layers and _versions(prepared) == versions  # else the first call made quantizers, or steps
    if as_before and "quantized" in scores.found:
        scores.by_switches[frozenset(everything)] = scores.found["quantized"]
    behind = [] if first is None else _behind(_by_gradient(prepared, loss, batches, progress, ranks_only=True), first)
    units = [("layer", name, held) for name, held in layers.items() if name not in behind]
    units += [("kind", *item) for item in kinds.items()]
    with progress_bar(progress, len(units) + 2, "sensitivity") as advance:
        advance()
        missing = [held for kind, name, held in units if f"{label} {kind} {name}" not in scores.found]
        if how == "quantized":
            scores.take("float", set(), base_of=missing)
        else:
            scores.take("float", set())
            if not as_before:
                scores.take("quantized", everything, base_of=missing)
        advance()
        for kind, name, held in units:
            chosen = {id(module) for module in held}
            others = chosen if how == "quantized" else everything - chosen
            scores.take(f"{label} {kind} {name}", others, held, base=base_name)
            advance()
    scores.check()
    base = scores.found[base_name]
    sign = (1 if how == "quantized" else -1) * (-1 if lower_is_better else 1)
    rows = [
        LayerSensitivity(name, kind, score, sign * (base - score), len(held))
        for kind, name, held in units
        for score in (scores.found[f"{label} {kind} {name}"],)
    ]
    ranked = sorted(rows, key=lambda row: -row.cost)
    estimated = calls is not None and (scores.sampled or not missing)
    sampled = f"costs are estimates, by {calls} of the calls of the model" if estimated else ""
    left_out = f"not evaluated, behind by gradient: {', '.join(behind)}" if behind else ""
    return SensitivityReport(
        title_of(prepared),
        how,
        lower_is_better,
        scores.found["float"],
        scores.found["quantized"],
        tuple(row for row in ranked if row.kind == "layer"),
        tuple(row for row in ranked if row.kind == "kind"),
        "; ".join(filter(None, (scores.replay.note() if missing else "", sampled, left_out))),
    )


def _behind(ranking: SensitivityReport, first: int) -> list[str]:
    """The layers that come after the `first` of a ranking."""
    return [row.name for row in ranking.layers[first:]]


def _by_gradient(
    prepared: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    batches: Iterable[Any] | None,
    progress: bool,
    ranks_only: bool = False,
) -> SensitivityReport:
    """`ranks_only` leaves out the loss of the quantized model, which has run before."""
    given = list(batches or ())
    if loss is None or not given:
        raise InspectError(
            "sensitivity: the gradient needs loss=, a function (model, batch), and batches=, one or more of them."
        )

    def mean_loss(batch: Any, name: str) -> Tensor:
        value = loss(prepared, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value)):
            raise InspectError(f"sensitivity: loss gives {value!r} for the {name} model. Expected one finite number.")
        return value

    runs = given if ranks_only else 2 * given
    with keeping_modes(prepared), progress_bar(progress, len(runs), "sensitivity") as advance:
        prepared.eval()
        quantized = math.nan if ranks_only else 0.0
        for batch in runs[len(given) :]:  # first: it may be what makes the quantizers
            with torch.no_grad():
                quantized += float(mean_loss(batch, "quantized")) / len(given)
            advance()
        layers, total = _layers(prepared), 0.0
        if not layers:
            raise InspectError(NONE_ACTIVE)
        measured = LossChanges(prepared, layers)
        wanted = [parameter for parameter in prepared.parameters() if parameter.requires_grad]
        with _only(prepared, set()), measured.measuring():
            for batch in given:
                with torch.enable_grad():
                    value = mean_loss(batch, "float")
                    if not value.requires_grad:
                        raise InspectError("sensitivity: loss returned a number without a gradient.")
                    torch.autograd.grad(value, wanted, allow_unused=True)
                total += float(value.detach()) / len(given)
                advance()
    costs = {name: change / len(given) for name, change in measured.changes.items()}
    missing = [name or "the model" for name in layers if name not in costs]
    rows = [LayerSensitivity(name, "layer", total + cost, cost, len(layers[name])) for name, cost in costs.items()]
    return SensitivityReport(
        title_of(prepared),
        "gradient",
        True,
        total,
        quantized,
        tuple(sorted(rows, key=lambda row: -row.cost)),
        (),
        f"not ranked, without a gradient, with state or Python: {', '.join(missing)}" if missing else "",
    )


class _Evaluations:
    """The scores so far, by name.

    A score that is not finite is not kept; `check` names those.
    """

    def __init__(
        self,
        prepared: nn.Module,
        evaluate: Callable[[nn.Module], float],
        path: str | os.PathLike[str] | None,
        replay: Replay,
        calls: int | None,
    ) -> None:
        self.prepared, self.evaluate, self.replay, self.calls = prepared, evaluate, replay, calls
        self.scores = Scores(prepared, path, "sensitivity")
        self.found = self.scores.found
        self.sampled = False  # whether calls were left out
        self.bad: dict[str, float] = {}
        self.by_switches: dict[frozenset[int], float] = {}  # what is on -> the score

    def take(
        self,
        name: str,
        chosen: set[int] | None,
        changed: Sequence[nn.Module] = (),
        base_of: Sequence[Sequence[nn.Module]] = (),
        base: str = "",
    ) -> None:
        """Evaluate with the chosen quantizers alone switched on; None for all that are on.

        `changed` are those that are switched otherwise than in the base, by its name, whose activations are kept.
        `base_of` makes this the base: of evaluations that each change some quantizers.
        """
        active = {id(module) for module in _active(self.prepared).values()}
        on = frozenset(active if chosen is None else active & chosen)
        if not base_of:
            if name not in self.found and on in self.by_switches:  # as of the one kind that there is
                self.scores.add(name, self.by_switches[on])
            if name in self.found:
                self.by_switches[on] = self.found[name]
                return

        def evaluate() -> float:
            return score_of(self.evaluate, self.prepared, name)

        versions = _versions(self.prepared)
        with _only(self.prepared, chosen):
            if changed:
                with self.replay.until(changed, self.calls) as run:
                    score = evaluate()
                if run.skipped:
                    score = self.found[base] + run.times * (score - self.found[base])
                    self.sampled = True
            else:
                score = self.replay.keep(evaluate, base_of) if base_of else evaluate()
        if chosen is not None and _versions(self.prepared) != versions:
            raise InspectError("sensitivity: evaluate changed the weights. Expected a function that only evaluates.")
        if not math.isfinite(score):
            self.bad[name] = score
            if name == "float":
                self.check()
            return
        if chosen is not None:
            self.by_switches[on] = score
        self.scores.add(name, score)

    def check(self) -> None:
        """Say which evaluations gave no finite number."""
        if not self.bad:
            return
        if "float" in self.bad:
            broken = [name for name, p in self.prepared.named_parameters() if not bool(torch.isfinite(p).all())]
            why = f"not finite: {', '.join(broken[:4])}" if broken else "its weights are finite, look at the data"
            raise InspectError(
                f"sensitivity: evaluate gives {self.bad['float']} for the float model, all quantizers off ({why}). "
                f"Expected a finite number; qgraph.compare names the first layer with NaN."
            )
        named = [name.split(" ", 2)[2] or "the model" for name in self.bad if " layer " in name]
        where = f", with {', '.join(named[:4])} alone" if named else ", for the quantized model"
        raise InspectError(
            f"sensitivity: evaluate gives {next(iter(self.bad.values()))}{where}. Expected a finite number; "
            f"qgraph.compare names the first layer with NaN."
        )


@contextlib.contextmanager
def _only(prepared: nn.Module, chosen: set[int] | None) -> Iterator[None]:
    """Switch off what is not chosen; switches and modes are put back."""
    before = [(module, module.enabled) for module in _active(prepared).values()]
    with keeping_modes(prepared):
        try:
            for module, _ in before:
                module.enabled = chosen is None or id(module) in chosen
            yield
        finally:
            for module, enabled in before:
                module.enabled = enabled


def _versions(prepared: nn.Module) -> list[int]:
    """By which to tell whether parameters were changed."""
    return [parameter._version for parameter in prepared.parameters()]


def _active(prepared: nn.Module) -> dict[str, Any]:
    """Path -> quantizer or sparsifier that is switched on; one that two layers share has two paths."""
    kinds = tuple(KINDS.values())
    named = prepared.named_modules(remove_duplicate=False)
    return {path: module for path, module in named if isinstance(module, kinds) and module.enabled}


def _layers(prepared: nn.Module) -> dict[str, list[Any]]:
    """Path of a module that has quantizers -> those."""
    found: dict[str, list[Any]] = {}
    for path, module in _active(prepared).items():
        parts = path.split(".")
        found.setdefault(".".join(parts[: parts.index("qgraph")]), []).append(module)
    return found


def _kinds(prepared: nn.Module) -> dict[str, list[Any]]:
    active = {id(module): module for module in _active(prepared).values()}.values()
    found = {name: [module for module in active if isinstance(module, kind)] for name, kind in KINDS.items()}
    return {name: held for name, held in found.items() if held}
