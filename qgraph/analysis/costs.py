"""What each layer's weights cost at each width: in quality by evaluations, or by a proxy; and in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qgraph.analysis.replay import Replay
from qgraph.analysis.scores import Scores, score_of
from qgraph.config import QuantSpec
from qgraph.errors import ConfigError, InspectError
from qgraph.graph import SiteRecord, keeping_modes
from qgraph.inspection.prepared import site_values
from qgraph.inspection.sizes import stored_bytes
from qgraph.ops import fake_quantize, sparsify
from qgraph.terminal import progress_bar

Evaluate = Callable[[nn.Module], float]
CACHE_BYTES = 1 << 30  # of activations
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(slots=True, eq=False)
class Unit:
    """Layers that get the same bits: one, or several that share a weight."""

    paths: list[str]
    sites: list[tuple[SiteRecord, Tensor]]

    @property
    def weights(self) -> int:
        return sum(value.numel() for _, value in self.sites)

    def names(self) -> list[str]:
        return [record.name for record, _ in self.sites]

    def quantizers(self) -> list[nn.Module]:
        return [record.quantizer for record, _ in self.sites if record.quantizer is not None]

    def set_bits(self, bits: float) -> None:
        """Give its quantizers other bits; `as_it_was` puts them back."""
        for record, _ in self.sites:
            assert record.quantizer is not None
            record.quantizer.spec = spec_at(record, bits)

    def bytes_at(self, bits: float) -> int:
        return sum(_stored(record, value, spec_at(record, bits)) for record, value in self.sites)

    def present_bytes(self) -> int:
        return sum(_stored(record, value, record.weight) for record, value in self.sites)

    def noise(self, bits: float) -> float:
        """Of all its weights, over their power."""
        lost = sum(float(error.square().sum(dtype=torch.float64)) for error in self.errors(bits))
        power = sum(float(value.float().square().sum(dtype=torch.float64)) for _, value in self.sites)
        return lost / power if power else 0.0

    @torch.no_grad()
    def errors(self, bits: float) -> Iterator[Tensor]:
        """What quantization does to each weight, float32."""
        for record, value in self.sites:
            assert record.groups is not None
            sparse = value if record.sparsity is None else sparsify(value, record.sparsity, record.groups)
            dense = None if record.sparsity is None else value
            yield (fake_quantize(sparse, spec_at(record, bits), record.groups, dense=dense) - value).float()


def spec_at(record: SiteRecord, bits: float) -> QuantSpec:
    """The spec of a site at other bits."""
    spec = record.weight
    assert spec is not None
    if spec.learns:
        raise ConfigError(
            f"allocate: site '{record.name}' has {spec}, whose learned step belongs to its bits. Allocate with "
            f"method='ddt', and give the rules of the result your method."
        )
    try:
        return spec.with_bits(bits)
    except ConfigError as error:
        raise ConfigError(f"allocate: site '{record.name}' cannot have {bits} bits: {error}") from error


def _stored(record: SiteRecord, value: Tensor, spec: QuantSpec | None) -> int:
    assert record.groups is not None
    return stored_bytes(tuple(value.shape), spec, record.sparsity, record.groups)


def units_of(model: nn.Module, widths: Sequence[float]) -> list[Unit]:
    """One a layer with quantized weights; layers that share one are joined."""
    units: list[Unit] = []
    for record, value in site_values(model):
        if record.quantizer is None or not record.quantizer.enabled:
            continue
        for bits in widths:
            spec_at(record, bits)
        joined = [unit for unit in units if record.path in unit.paths or _holds(unit, record.name)]
        unit = joined[0] if joined else Unit([], [])
        for other in joined[1:]:
            unit.paths += other.paths
            unit.sites += other.sites
            units.remove(other)
        if not joined:
            units.append(unit)
        if record.path not in unit.paths:
            unit.paths.append(record.path)
        if not _holds(unit, record.name):
            unit.sites.append((record, value))
    if not units:
        raise InspectError(
            "allocate: the model has no quantized weight that is switched on. Prepare it with one (W4), and with "
            "example_inputs where weights are used in a forward of your own."
        )
    return units


def _holds(unit: Unit, site: str) -> bool:
    return any(record.name == site for record, _ in unit.sites)


@dataclass(slots=True, eq=False)
class Evaluations:
    """`evaluate` of a model at other bits; what it finds is kept in a file where there is one."""

    model: nn.Module
    units: Sequence[Unit]
    evaluate: Evaluate
    lower_is_better: bool
    scores: Scores

    def costs(self, widths: Sequence[float], progress: bool) -> list[list[float]]:
        """What each layer alone loses at each width, the others at the widest.

        What the model computes before that layer is kept and given back, as in `sensitivity`.
        """
        replay, widest, sign = Replay(self.model, CACHE_BYTES), widths[-1], -1 if self.lower_is_better else 1
        names = [[self._name(unit, bits, widest) for bits in widths[:-1]] for unit in self.units]
        known, changed = self.scores.found, [unit.quantizers() for unit in self.units]
        missing = [held for held, row in zip(changed, names, strict=True) if any(name not in known for name in row)]
        with as_it_was(self.model), progress_bar(progress, 1 + sum(map(len, names)), "allocate") as advance:
            for unit in self.units:
                unit.set_bits(widest)
            every = f"all layers at {widest} bits"
            if missing or every not in known:
                self.scores.add(every, replay.keep(lambda: self._score(every), missing))
            advance()
            for unit, quantizers, row in zip(self.units, changed, names, strict=True):
                for bits, name in zip(widths, row, strict=False):
                    if name not in known:
                        unit.set_bits(bits)
                        with replay.until(quantizers):
                            self.scores.add(name, self._score(name))
                    advance()
                unit.set_bits(widest)
        return [[sign * (known[every] - known[name]) for name in row] + [0.0] for row in names]

    def at(self, bits: Sequence[float]) -> float:
        """The score with these bits, one number for each layer."""
        with as_it_was(self.model):
            for unit, width in zip(self.units, bits, strict=True):
                unit.set_bits(width)
            return self._score("the chosen bits")

    def best(self, choices: Sequence[Sequence[float]]) -> int:
        """The place of the choice of bits that scores best; of equal ones the first."""
        found = [self.at(bits) for bits in choices]
        return found.index(min(found) if self.lower_is_better else max(found))

    def _name(self, unit: Unit, bits: float, widest: float) -> str:
        return f"{unit.paths[0] or 'the model'} alone at {bits} bits, others at {widest}"

    def _score(self, name: str) -> float:
        found = score_of(self.evaluate, self.model, name, "allocate")
        if not math.isfinite(found):
            raise InspectError(
                f"allocate: evaluate gives {found} for {name}. Expected a finite number; qgraph.compare names the "
                f"first layer with NaN."
            )
        return found


def fisher_costs(
    model: nn.Module,
    units: Sequence[Unit],
    widths: Sequence[float],
    loss: Loss,
    batches: Iterable[Any],
    progress: bool,
) -> list[list[float]]:
    """Costs to second order: half the mean squared gradient times the squared noise, summed over the weights."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    watched = {record.name: parameters.get(record.name) for unit in units for record, _ in unit.sites}
    if any(parameter is None for parameter in watched.values()):
        computed = [name for name, parameter in watched.items() if parameter is None]
        raise ConfigError(
            f"allocate: how='fisher' needs gradients of {', '.join(computed[:3])}, which a forward computes from "
            f"parameters. Use how='evaluate' or 'snr'."
        )
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in watched.items() if p is not None}
    found = 0
    with as_it_was(model), progress_bar(progress, 1, "allocate") as advance:
        model.eval()
        for unit in units:
            unit.set_bits(widths[-1])
        for batch in batches:
            value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise InspectError("allocate: loss returned no tensor of one value with a gradient.")
            if not bool(torch.isfinite(value)):
                raise InspectError(f"allocate: loss gives {value.item()} at batch {found}. Expected a finite number.")
            names = list(squares)
            grads = torch.autograd.grad(value, [parameters[name] for name in names], allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    squares[name] += grad.detach().float().square()
            found += 1
        advance()
    if not found:
        raise InspectError("allocate: batches is empty. Expected at least one batch for how='fisher'.")
    return [
        [
            0.5 / found * sum(
                float((squares[record.name] * error.square()).sum(dtype=torch.float64))
                for (record, _), error in zip(unit.sites, unit.errors(bits), strict=True)
            )
            for bits in widths
        ]
        for unit in units
    ]  # fmt: skip


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put specs and modes back."""
    specs = [(m, m.spec) for m in model.modules() if isinstance(getattr(m, "spec", None), QuantSpec)]
    with keeping_modes(model):
        try:
            yield
        finally:
            for module, spec in specs:
                module.spec = spec
