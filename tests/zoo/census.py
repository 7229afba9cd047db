"""An independent census: which products of a run multiply data by something made of parameters, and is it quantized.

It looks from below, at the operators that torch dispatches to, and shares no code with the capture: what is inside
composite functions is seen as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

# The operands of each product: (weight positions) for layers, pairs for products of equals.
_LAYERS = {
    "convolution": (1,), "embedding": (0,), "_embedding_bag": (0,), "_embedding_bag_forward_only": (0,),
    "mkldnn_rnn_layer": (1, 2), "_trilinear": (1,), "linear": (1,), "_conv_depthwise2d": (1,), "conv_tbc": (1,),
}  # fmt: skip
_PRODUCTS = {
    "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "mv": (0, 1), "addmv": (1, 2), "dot": (0, 1),
    "_grouped_mm": (0, 1), "addbmm": (1, 2),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a tensor is made of: parameters (the names of those not quantized yet), data, or neither."""

    parameters: frozenset[str] = frozenset()
    floating: frozenset[str] = frozenset()
    data: bool = False


@dataclass(slots=True)
class Census(TorchDispatchMode):
    """Run a model under it: `weights` are the parameters multiplied with data, `floating` those that were float."""

    model: nn.Module
    inputs: Any
    weights: set[str] = field(default_factory=set)
    floating: set[str] = field(default_factory=set)
    calls: int = 0
    _origins: dict[int, tuple[Tensor, _Origin]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)
        for name, parameter in self.model.named_parameters():
            self._know(parameter, _Origin(frozenset([name]), frozenset([name])))
        for tensor in _tensors(self.inputs):
            self._know(tensor, _Origin(data=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self._count(name, args)
        found = [self._origin(t) for t in _tensors((args, kwargs))]
        # A layer computes an activation, even from parameters alone; a bare product of two makes a weight (LoRA).
        layer = name in _LAYERS or name.startswith(("addmm", "baddbmm", "addmv"))
        layer |= name in _PRODUCTS and any(o.parameters and not o.floating for o in found)
        data = layer or any(o.data for o in found)
        made = _Origin(
            frozenset() if data else frozenset().union(*(o.parameters for o in found)),
            frozenset() if data else frozenset().union(*(o.floating for o in found)),
            data,
        )
        for tensor in _tensors(result):
            self._know(tensor, made)
        return result

    def quantized(self, tensor: Tensor, made_of: Any) -> None:
        """A quantizer made this of its inputs, perhaps by kernels that torch does not see."""
        found = [self._origin(t) for t in _tensors(made_of)]
        names = frozenset().union(*(o.parameters for o in found))
        self._know(tensor, _Origin(names, frozenset(), any(o.data for o in found)))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        weights = [self._origin(args[i]) for i in _LAYERS.get(name, ())]
        if name in _PRODUCTS:
            pair = [self._origin(args[i]) for i in _PRODUCTS[name]]
            weights = [o for o, other in zip(pair, reversed(pair), strict=True) if other.data]
        for origin in weights:
            if origin.parameters:
                self.calls += 1
                self.weights |= origin.parameters
                self.floating |= origin.floating

    def _know(self, tensor: Tensor, origin: _Origin) -> None:
        self._origins[id(tensor)] = (tensor, origin)

    def _origin(self, tensor: Any) -> _Origin:
        found = self._origins.get(id(tensor))
        return found[1] if found is not None and found[0] is tensor else _Origin()


@contextlib.contextmanager
def counting(model: nn.Module, inputs: Any, quantizers: tuple[type[nn.Module], ...] = ()) -> Iterator[Census]:
    """Count a run of `model` on `inputs`; the results of modules of the `quantizers` classes are quantized."""
    census = Census(model, inputs)

    def enter(module: nn.Module, args: Any) -> None:
        if isinstance(module, quantizers):
            _pop_mode()  # what a quantizer does inside is no product of the model

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, quantizers):
            _push_mode(census)
            if isinstance(output, Tensor):
                census.quantized(output, args)

    register = nn.modules.module
    handles = (
        register.register_module_forward_pre_hook(enter),
        register.register_module_forward_hook(leave, always_call=True),
    )
    try:
        with census:
            yield census
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


__all__ = ["Census", "counting"]
