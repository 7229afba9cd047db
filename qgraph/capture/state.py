"""What a prepared module keeps: its variants, and why a kind of call has none; how its tensors are found by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qgraph.capture.guards import GuardMiss
from qgraph.capture.structure import Unsupported, aliases, signature
from qgraph.capture.variants import Call, Variant, called_by_graph
from qgraph.graph import Shared
from qgraph.placement import Owner


@dataclass(frozen=True, slots=True)
class Opaque:
    """A call that could not be captured, and why; the module runs its own Python for it."""

    names: tuple[str, ...]
    signature: Any
    training: bool
    reason: str
    where: str
    first: bool = False  # perhaps the first such call alone


_ONE_TENSOR = (signature(torch.empty(0)), ())


class ModuleState:
    """The captured side of one module; deep-copied and pickled with it."""

    def __init__(self, shared: Shared, path: str, forward: Callable[..., Any]) -> None:
        self.shared = shared
        self.path = path
        self.variants: list[Variant] = []
        self.opaque: list[Opaque] = []
        self.python_sites: dict[tuple[str, ...], Any] = {}
        self.misses = 0
        self.frozen = False  # whether it has lost float weights, which its Python would need
        self.gone: frozenset[str] = frozenset()  # the names of its own among them
        self.gave_tensor: bool | None = None  # whether its first result was one
        self.asked = 0  # of the modules in `shared.varying`, how many its graphs ask for their structure
        self.left: tuple[Any, ...] = ()  # of its children, those that have no captured class, as they last were
        self.weights_below: frozenset[str] | None = None  # the last names of the matrices in the module, once asked for
        self.positional = positional_names(forward)

    def owner(self, module: nn.Module) -> Owner:
        return Owner(module, self.path, self.shared)

    def install(self, module: nn.Module, path: str) -> None:
        """Capture a module below this one from now on."""
        if self.shared.install is not None:
            self.shared.install(module, f"{self.path}.{path}".lstrip("."), self.shared)

    def names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        """A name for each argument of a call, keywords in the order of their names."""
        known = self.positional[: len(args)]
        if len(known) < len(args):
            known += tuple(f"args_{i}" for i in range(len(known), len(args)))
        return known + tuple(sorted(kwargs)) if kwargs else known

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Describe a call of the forward; `signature` is None for one that no graph can take."""
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor:  # most layers: nothing to look into
            return Call(self.positional[:1] or ("args_0",), _ONE_TENSOR, args)
        names = self.names(args, kwargs)
        values = (*args, *[kwargs[name] for name in names[len(args) :]]) if kwargs else args
        try:
            given = (*map(signature, values), aliases(values))
        except Unsupported as error:
            return Call(names, None, values, f"takes {error}")
        return Call(names, given, values)

    def select(self, module: nn.Module, call: Call) -> Variant | None:
        """The variant that holds for a call."""
        for variant in self.variants:
            if variant.accepts(module, call):
                return variant
        return None

    def candidates(self, module: nn.Module, call: Call, first: Variant, key: Any) -> Iterator[Variant]:
        """The variants that may hold for a call of these sizes; the ones that did before come first."""
        if key in first.validated:
            yield first
        others = [v for v in self.variants if v is not first or key not in first.validated]
        others.sort(key=lambda v: key not in v.validated)
        for variant in others:
            if variant is first or variant.accepts(module, call):
                yield variant

    def returned(self, result: Any) -> None:
        """Note a result. Graphs around this module take a tensor for granted where all were: if this one is not, they
        have to ask from now on, and the one that is waiting for it gets a `GuardMiss`.
        """
        tensor = isinstance(result, Tensor)
        if self.gave_tensor is None:
            self.gave_tensor = tensor
        elif tensor is not self.gave_tensor and self.path not in self.shared.varying:
            self.shared.varying += (self.path,)
            if self.gave_tensor and called_by_graph():
                raise GuardMiss(f"{self.path} returns a {type(result).__name__}, not a tensor", by_size=False)

    def keep_sites(self, found: list[tuple[Any, str, list[Tensor]]]) -> None:
        """Note sites that Python has met: each with its place in the code and the weights there."""
        for site, where, weights in found:
            sizes = [tuple(weight.shape) for weight in weights]
            self.python_sites.setdefault(tuple(p.site for p in site.weights), (site, where, sizes))

    def give_up(self, call: Call, training: bool, reason: str, where: str = "<unknown>:0", first: bool = False) -> None:
        """Note that calls of this kind run as Python."""
        if self.known_opaque(call, training) is None:
            self.opaque.append(Opaque(call.names, call.signature, training, reason, where, first))

    def try_again(self, training: bool) -> bool:
        """Forget the calls of a mode that may have been Python's for being the first; whether there were any."""
        stay = [entry for entry in self.opaque if entry.training is not training or not entry.first]
        found, self.opaque = len(stay) < len(self.opaque), stay
        if found and not stay:
            self.python_sites.clear()
        return found

    def known_opaque(self, call: Call, training: bool) -> Opaque | None:
        for entry in self.opaque:
            if (entry.names, entry.signature, entry.training) == (call.names, call.signature, training):
                return entry
        return None


def positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments that a module's forward (bound to it) takes by position."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)


def find_attribute(module: nn.Module, tensor: Tensor) -> str | None:
    """The path under `module` by which a tensor is reached: a parameter, a buffer, an attribute of its own or of its
    class, or a list of them.
    """
    for own in (module._parameters, module._buffers):
        for name, value in own.items():
            if value is tensor:
                return name
    for name, value in module.__dict__.items():
        if value is tensor:
            return name
        if isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if item is tensor:
                    return f"{name}[{i}]"
    for path, child in module.named_modules():
        if path and not path.startswith("qgraph."):
            for name, value in (*child._parameters.items(), *child._buffers.items(), *child.__dict__.items()):
                if value is tensor:
                    return f"{path}.{name}"
    shared = [name for base in type(module).__mro__ for name, value in vars(base).items() if value is tensor]
    return shared[0] if shared else None


def is_weight(module: nn.Module, path: str, tensor: Tensor) -> bool:
    """Whether what a module holds at `path` (of `find_attribute`) is a parameter, or is put there in place of one.

    `functional_call` swaps parameters for tensors; torch's older reparametrizations (weight_norm, spectral_norm, prune)
    compute the tensor in a hook from parameters of the same name with a suffix.
    """
    if isinstance(tensor, nn.Parameter) or tensor.requires_grad:
        return True
    holder, _, name = path.rpartition(".")
    parameters = module.get_submodule(holder)._parameters
    return any(f"{name}{suffix}" in parameters for suffix in ("", "_v", "_orig"))
