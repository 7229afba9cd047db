"""Which quantizers stand at the operands of one call: found by the same rules in a graph and in running Python.

A weight's quantizer belongs to the parameter it quantizes, so tied weights share one. The modules are made on first
demand and live under the child `qgraph` of the module whose forward makes the call.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qgraph.config import QConfig, QuantSpec
from qgraph.modules import ActivationQuantizer, Quantizers, Sparsifier, WeightQuantizer
from qgraph.ops import Groups
from qgraph.sites import Operand, SiteCall, Source, groups_for_weight

if TYPE_CHECKING:
    from qgraph.graph import Shared


@dataclass(frozen=True, slots=True)
class Placed:
    """One operand of a site with its source; `key` names its quantizer inside the owning module."""

    operand: Operand
    source: Source
    key: str
    site: str


@dataclass(frozen=True, slots=True)
class Site:
    """A call of the site table that multiplies by at least one weight, with its operands told apart."""

    call: SiteCall
    weights: tuple[Placed, ...]
    inputs: tuple[Placed, ...]


_placing = threading.RLock()


class Owner:
    """One module of the model as the owner of sites: its path, its config and the shared state of the model."""

    def __init__(self, module: nn.Module, path: str, shared: Shared) -> None:
        self.module, self.path, self.shared = module, path, shared

    @property
    def config(self) -> QConfig | None:
        configs = self.shared.configs
        return configs[self.path] if self.path in configs else self.shared.config.resolve(self.path, self.module)

    def weight(self, placed: Placed, example: Callable[[], Tensor]) -> tuple[Sparsifier | None, WeightQuantizer | None]:
        """The sparsifier and the quantizer of a weight operand of real numbers, as the config asks for them."""
        config = self.config
        if config is None or placed.source.unfit or (config.weight is None and config.sparsity is None):
            return None, None
        operand = placed.operand.transposed() if placed.source.transposed else placed.operand
        groups = groups_for_weight(config.weight, operand)
        sparsity = config.sparsity
        sparsifier = quantizer = None
        if (spec := config.weight) is not None:

            def make(site: str) -> WeightQuantizer:
                made = WeightQuantizer(spec, groups, site)
                made.sparsity = sparsity
                if spec.learns:
                    made.initialize_step(example())
                return made

            quantizer = self._get(
                placed.key,
                placed.site,
                make,
                lambda m: (m.planned, m.sparsity, m.groups) == (spec, sparsity, groups),
            )
        if sparsity is not None:
            alone = quantizer is None
            site = placed.site if quantizer is None else quantizer.site
            sparsifier = self._get(
                f"{placed.key}.sparsifier",
                site if alone else f"{site}:sparsifier",
                lambda name: Sparsifier(sparsity, groups, name if alone else site, alone),
                lambda m: (m.planned, m.groups) == (sparsity, groups),
            )
        return sparsifier, quantizer

    def activation(self, placed: Placed, call: SiteCall) -> ActivationQuantizer | None:
        """The quantizer of an input operand of real numbers, as the config asks for it."""
        spec: QuantSpec | None = self.config.activation if self.config is not None else None
        if spec is None or placed.source.unfit:
            return None
        groups = Groups("tensor") if spec.learns else Groups.for_activation(spec, call.conv)
        return self._get(
            placed.key,
            placed.site,
            lambda site: ActivationQuantizer(spec, groups, site),
            lambda m: (m.planned, m.groups) == (spec, groups),
        )

    def _get(self, key: str, site: str, make: Callable[[str], Any], fits: Callable[[Any], bool]) -> Any:
        """The module at `key`, else the one that another module already has for the same site, else a new one: a weight
        that is used twice in different ways (rows here, columns there; other bits by a rule) has two sites.
        """
        name = key.replace(".", "__")
        container = self.module._modules.get("qgraph")
        if container is None:
            made = Quantizers().train(self.module.training)
            container = self.module._modules.setdefault("qgraph", made)
        assert isinstance(container, Quantizers)
        return container[name] if name in container else self._place(container, name, site, make, fits)

    def _place(
        self, container: Quantizers, name: str, site: str, make: Callable[[str], Any], fits: Callable[[Any], bool]
    ) -> Any:
        with _placing:  # two threads may meet a site for the first time: it gets one quantizer
            if name in container:
                return container[name]
            names = (site if number == 1 else f"{site}:{number}" for number in itertools.count(1))
            own = next(n for n in names if (known := self.shared.quantizers.get(n)) is None or fits(known))
            found = self.shared.quantizers.get(own)
            if found is None:
                found = make(own)
                found.enabled = not self.shared.is_off(found.site)
                for setting in self.shared.settings.values():
                    setting.apply(found)
                self.shared.quantizers[own] = found
            container[name] = found
            return found


def place(call: SiteCall, sources: list[Source], owner: Owner, ordinal: Callable[[str, int], int]) -> Site | None:
    """Tell weights from inputs, or None where the call multiplies no weight.

    `ordinal(name, i)` numbers the different derived operands of one name, in order of first use; `i` is the operand's
    place in `call.operands`.
    """
    roles = [_role(op, i, call, sources) for i, op in enumerate(call.operands)]
    if "weight" not in roles:
        return None
    weights = []
    for i, (operand, source, role) in enumerate(zip(call.operands, sources, roles, strict=True)):
        if role == "weight":
            weights.append(_placed_weight(operand, source, owner, i, ordinal))
    first = weights[0].key
    inputs: list[Placed] = []
    for operand, source, role in zip(call.operands, sources, roles, strict=True):
        if role == "input":
            base = "input" if first == "weight" else f"{first}.input"
            key = base if not inputs else f"{base}{len(inputs)}"
            inputs.append(Placed(operand, source, key, f"{owner.path}.{key}".lstrip(".")))
    return Site(call, tuple(weights), tuple(inputs))


def _role(operand: Operand, i: int, call: SiteCall, sources: list[Source]) -> str:
    if operand.role == "input":
        return "input"
    if sources[i].kind != "parameter":
        return "input" if operand.role == "either" else "other"
    if operand.role == "weight":
        return "weight"
    # A product that meets no data makes a weight, it does not use one; what it feeds is the site.
    return "weight" if any(source.kind == "data" for source in sources) else "other"


def _placed_weight(
    operand: Operand, source: Source, owner: Owner, i: int, ordinal: Callable[[str, int], int]
) -> Placed:
    prefix = f"{owner.path}." if owner.path else ""
    if source.exact:
        site = source.names[0]
        return Placed(operand, source, _own_name(site, owner, prefix), site)
    name = "+".join(n.removeprefix(prefix) for n in source.names)
    number = ordinal(name, i)
    key = f"{name}_{number}" if number else f"{name}.derived"
    return Placed(operand, source, key, f"{prefix}{key}")


def _own_name(site: str, owner: Owner, prefix: str) -> str:
    """A parameter's name in its module: a tied layer's ``weight`` is that, whichever module the site is named after."""
    if site.startswith(prefix):
        return site.removeprefix(prefix)
    names = owner.module._parameters
    return next((name for name in names if owner.shared.canonical_name(owner.path, name) == site), site)
