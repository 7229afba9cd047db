"""Quantized operands are not kept for backward: they are computed again there from what they were made of.

The backward pass of a product needs both of its operands, so a product of quantized ones would hold those beside the
values that they were made of, which DDT needs for its own: for weights a second copy of the model, for activations a
second one of each. From the statistics of their groups quantized values are one pass over memory, the same to the bit.
What was quantized straight-through is one pass more; its float values are, as a rule, kept by the operation before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 18  # values: below, the bookkeeping takes longer than the pass and frees little
# Their results lie in the memory of what they are given.
_LAYOUTS = frozenset({"ViewBackward0", "PermuteBackward0", "TransposeBackward0", "TBackward0", "AliasBackward0"})


def is_large(tensor: Tensor) -> bool:
    """Whether a quantized tensor of this size is computed again; none of a trace, whose sizes are tensors."""
    return not torch.jit.is_tracing() and tensor.numel() >= LARGE


@functools.lru_cache(maxsize=256)
def recomputing(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, a product, without quantized operands among what it keeps for backward.

    Everything else is kept as it always is: small operands, and those that the compiled CPU passes have not made; and
    all of them where torch compiles, which sees to memory itself, or traces, or where a checkpoint or the user has
    hooks for what is saved.
    """

    def run(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not any(map(_quantizer_of, args)):
            return function(*args, **kwargs)
        if not _hooks_are_free():
            return function(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            return function(*args, **kwargs)

    run.__name__ = function.__name__  # the rest stays ours: generated code calls by qualified name
    return run


def _hooks_are_free() -> bool:
    """Whether nobody has hooks for what is saved, or forbids them."""
    autograd: Any = torch._C._autograd
    return autograd._saved_tensors_hooks_is_enabled() and autograd._top_saved_tensors_default_hooks(True) is None


class _Kept:
    """A tensor that is saved as it is, and watched as autograd watches what it saves without hooks."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def __call__(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"{self.tensor.dtype} tensor of shape {[*self.tensor.shape]} is at version {self.tensor._version}; "
                f"expected version {self.version}."
            )
        return self.tensor


class _Recomputed:
    """A quantized tensor: the node of the operation that made it, and how it lies in the memory of its result."""

    __slots__ = ("layout", "node")

    def __init__(self, tensor: Tensor, node: Any) -> None:
        self.node, self.layout = node, (tensor.size(), tensor.stride(), tensor.storage_offset())

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.node._forward_cls.restored(self.node).as_strided(*self.layout)


def _pack(tensor: Tensor) -> _Kept | _Recomputed:
    node = _quantizer_of(tensor)
    return _Kept(tensor) if node is None else _Recomputed(tensor, node)


def _unpack(packed: _Kept | _Recomputed) -> Tensor:
    return packed()


def _quantizer_of(tensor: Any) -> Any:
    """The node of the operation whose result a large tensor shows, where that can be had again; else None."""
    if type(tensor) is not Tensor or not is_large(tensor):
        return None
    node: Any = tensor.grad_fn
    while node is not None and node.name() in _LAYOUTS:
        node = node.next_functions[0][0]
    return node if getattr(node, "restorable", False) else None  # as ours say of themselves
