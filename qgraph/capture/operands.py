"""Follow what tensors derive from while a forward runs in Python, and quantize the operands of its sites.

The same rules (`qgraph.sites`, `qgraph.placement`) decide here and in the passes that rewrite graphs.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils.weak import TensorWeakRef

from qgraph.capture.calls import transformed
from qgraph.capture.source import locate
from qgraph.capture.state import ModuleState, find_attribute, is_weight
from qgraph.capture.structure import memory_of, tensors_in, walk
from qgraph.ops.vmapped import is_batched, unwrapped
from qgraph.placement import Placed, Site, place
from qgraph.sites import CONSTANT, DATA, SiteCall, Source, after_write, combine, site_call, swaps_last_two, written


class OperandTracker:
    """Knows the source of every tensor that one running forward has met, and keeps none of them in memory for it."""

    def __init__(self, module: nn.Module, state: ModuleState) -> None:
        self.module = module
        self.owner = state.owner(module)
        self.sites: list[tuple[Site, str, list[Tensor]]] = []
        self._sources: dict[int, tuple[TensorWeakRef, Source]] = {}
        self._ordinals: dict[str, list[TensorWeakRef]] = {}

    def enter(self, name: str, value: Any) -> None:
        """Note an argument of the forward: data, or a parameter that the caller hands down."""
        source = Source("parameter", (f"{self.owner.path}.{name}".lstrip("."),))
        for _, item in walk(value):
            if isinstance(item, Tensor):
                self._set(item, source if item is value and isinstance(value, nn.Parameter) else DATA)

    def source(self, value: Any) -> Source:
        if not isinstance(value, Tensor):
            return CONSTANT
        known = self._known(value)
        if known is not None:
            return known
        path = find_attribute(self.module, value)
        if path is None and (inside := unwrapped(value)) is not None:
            source = self.source(inside)
            if is_batched(value) and source.kind == "parameter":  # a member of the batch, not the parameter itself
                source = Source("parameter", source.names)
        elif path is None:
            source = DATA
        elif is_weight(self.module, path, value):
            source = Source("parameter", (self.owner.shared.canonical_name(self.owner.path, path),), exact=True)
        else:
            source = CONSTANT
        self._set(value, source)
        return source

    def _known(self, tensor: Tensor) -> Source | None:
        """What was noted of it; another tensor may have had its id before."""
        noted = self._sources.get(id(tensor))
        return noted[1] if noted is not None and noted[0].ref() is tensor else None

    def _set(self, tensor: Tensor, source: Source) -> None:
        self._sources[id(tensor)] = (TensorWeakRef(tensor), source)

    def follow(self, args: Any, kwargs: Any, result: Any, name: str) -> None:
        """Note the source of what a function returned."""
        tensors = _tensors(args[:1] if name == "_make_dual" else (*args, *kwargs.values()))  # not the tangent
        swapped = bool(args) and isinstance(args[0], Tensor) and swaps_last_two(name, args, args[0].dim())
        source = combine(name, [self.source(t) for t in tensors], swapped)
        self._note(result, source)
        self._write(written(name, args, kwargs), source)

    def follow_child(self, module: nn.Module, path: str, args: Any, kwargs: Any, result: Any) -> None:
        """Note the source of what a child module returned: a parametrization makes a weight out of its own."""
        if tensors_in((*args, *kwargs.values())):
            self._note(result, DATA)
        elif next(module.parameters(), None) is not None:
            self._note(result, Source("parameter", (path,)))

    def handed_on(self, args: tuple[Any, ...]) -> tuple[list[Source], dict[str, list[TensorWeakRef]]]:
        """What a part of the forward has to know to run again later: the sources of its arguments, operands met."""
        return [self.source(t) for t in _tensors(args)], {key: list(met) for key, met in self._ordinals.items()}

    def take_over(self, known: tuple[list[Source], dict[str, list[TensorWeakRef]]], args: tuple[Any, ...]) -> None:
        """Begin with what `handed_on` gave, where the part runs again on `args`."""
        for tensor, source in zip(_tensors(args), known[0], strict=True):
            self._set(tensor, source)
        self._ordinals = {key: list(met) for key, met in known[1].items()}

    def _note(self, result: Any, source: Source) -> None:
        for tensor in _tensors((result,)):
            if self._known(tensor) is None:
                self._set(tensor, source)

    def _write(self, target: Any, source: Source) -> None:
        """What a call has written into derives from what it wrote, and so does all that shares its memory."""
        for tensor in _tensors((target,)):
            before = self.source(tensor)
            if after_write(before, source) == before:
                continue
            memory = memory_of(tensor)
            for key, (noted, known) in self._sources.items():
                other = noted()
                if other is tensor or (other is not None and memory_of(other) == memory):
                    self._sources[key] = (noted, after_write(known, source))

    def at(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], quantize: bool) -> tuple[Any, Any]:
        """The arguments to run a call with: at a site, its operands quantized (when `quantize`)."""
        call = site_call(name, args, kwargs, lambda t: t.dim() if isinstance(t, Tensor) else 0)
        return (args, kwargs) if call is None else self.at_call(call, args, kwargs, quantize)

    def at_call(self, call: SiteCall, args: tuple[Any, ...], kwargs: dict[str, Any], quantize: bool) -> tuple[Any, Any]:
        """The same for a call whose operands are known."""
        values = [operand.get(args, kwargs) for operand in call.operands]
        sources = [self.source(v).of(v.dtype) if isinstance(v, Tensor) else self.source(v) for v in values]
        site = place(call, sources, self.owner, lambda key, i: self._ordinal(key, values[i]))
        if site is None:
            return args, kwargs
        self.sites.append((site, locate()[0], [p.operand.get(args, kwargs) for p in site.weights]))
        if not quantize:
            return args, kwargs
        for placed in site.weights:
            weight = placed.operand.get(args, kwargs)
            with _outside_transforms(weight):
                args, kwargs = placed.operand.put(args, kwargs, self._quantized_weight(placed, weight))
        for placed in site.inputs:
            quantizer = self.owner.activation(placed, call)
            if quantizer is not None and (x := placed.operand.get(args, kwargs)) is not None:
                args, kwargs = placed.operand.put(args, kwargs, _quantized(quantizer, x))
        return args, kwargs

    def place_all(self) -> None:
        """Make the quantizers of every site met, so that a forward that stays Python has all its state at once."""
        for site, _, weights in self.sites:
            for placed, weight in zip(site.weights, weights, strict=True):
                self._weight_modules(placed, weight)
            for placed in site.inputs:
                self.owner.activation(placed, site.call)

    def _weight_modules(self, placed: Placed, weight: Tensor) -> tuple[Any, Any, Tensor]:
        """Sparsifier and quantizer of a weight, and the weight as they take it.

        The groups are those of the parameter, so a weight used transposed is turned back for its quantizer.
        """
        dense = weight.transpose(-1, -2) if placed.source.transposed else weight
        return (*self.owner.weight(placed, lambda: dense), dense)

    def _quantized_weight(self, placed: Placed, weight: Tensor) -> Tensor:
        sparsifier, quantizer, dense = self._weight_modules(placed, weight)
        result = dense
        if sparsifier is not None:
            result = sparsifier(result)
        if quantizer is not None:
            result = quantizer(result, dense) if sparsifier is not None else quantizer(result)
        return result.transpose(-1, -2) if placed.source.transposed else result

    def _ordinal(self, key: str, tensor: Tensor) -> int:
        met = self._ordinals.setdefault(key, [])
        for i, other in enumerate(met):
            if other.ref() is tensor:
                return i
        met.append(TensorWeakRef(tensor))
        return len(met) - 1


def _quantized(quantizer: Any, x: Tensor) -> Tensor:
    """An activation, quantized; inside vmap the values of one group may lie across its batch: left float there."""
    return x if is_batched(x) else quantizer(x)


def _outside_transforms(weight: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A weight that no transform runs over (vmap's batch, what grad differentiates by) is quantized outside of them."""
    if not transformed() or torch._C._functorch.is_functorch_wrapped_tensor(weight):
        return contextlib.nullcontext()
    return temporarily_clear_interpreter_stack()


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(_tensors(value))
        elif isinstance(value, dict):
            found.extend(_tensors(value.values()))
    return found
