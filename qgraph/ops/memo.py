"""Quantized and pruned weights, remembered for as long as the weights stay as they are.

A weight is often used more than once between two changes: by every batch of an evaluation or of an accumulated
gradient, by activation checkpointing, by two layers that share it. `Memo` computes its value once, holds it, and gives
it out again with an autograd node of its own, so that every use has its own backward pass.

When a value is given out again, each of these is as it was: storage, address, shape, type and version counter of every
operand, spec and groups, and, since neither `.data`, numpy nor another process moves a version counter, the content,
by its fingerprint; a read of the weight, where quantizing it is several. So there is nothing to invalidate.

A value is held once the same weight has been met twice, or was before it last changed: a plain training loop, which
meets each weight once a step, holds nothing and pays nothing. Nothing is held while torch.compile traces (a compiled
model quantizes at each call), off the CPU or without the compiled passes (checking would take longer than it saves),
where `fully_shard` may hand out parameters that are gathered for a moment, or above `set_limit`. Copies and pickles
of a Memo are empty.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.ops import native
from qgraph.ops.ddt import DDT
from qgraph.ops.groups import Groups
from qgraph.ops.sparsity import apply_mask, sparsify
from qgraph.ops.vmapped import vmapped

DEFAULT_LIMIT = 1 << 30  # bytes that all values held in a process may take


class _Account:
    """How many bytes are held in this process, and how many may be."""

    def __init__(self) -> None:
        self.limit = DEFAULT_LIMIT
        self.held = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        with self._lock:
            granted = self.held + size <= self.limit
            self.held += size if granted else 0
        return granted

    def give_back(self, size: int) -> None:
        with self._lock:
            self.held -= size


_account = _Account()


def set_limit(size: int) -> None:
    """How many bytes of quantized weights a process may hold from now on; 0 holds none."""
    _account.limit = size


class _Held:
    """Values, and what they were computed from."""

    __slots__ = ("__weakref__", "content", "key", "size", "values", "versions")

    def __init__(self, key: tuple[Any, ...], content: tuple[Any, ...], values: tuple[Tensor, ...], size: int) -> None:
        self.key, self.content, self.values, self.size = key, content, values, size
        self.versions = [value._version for value in values]
        weakref.finalize(self, _account.give_back, size)

    def untouched(self) -> bool:
        """Whether nobody wrote into what was given out."""
        return all(value._version == was for value, was in zip(self.values, self.versions, strict=True))


class Memo:
    """The last value of one weight quantizer or sparsifier, while it holds."""

    __slots__ = ("_held", "_met", "_repeats", "off")

    def __init__(self) -> None:
        self.off = False  # True holds nothing, for a copy of a model that is run a few times and must not grow
        self._held: _Held | None = None
        self._met: tuple[Any, ...] | None = None
        self._repeats = False  # whether a weight was met again before it changed

    @property
    def bytes(self) -> int:
        """Memory of the values held."""
        return 0 if self._held is None else self._held.size

    def clear(self) -> None:
        """Release what is held."""
        self._held = self._met = None
        self._repeats = False

    def quantized(self, weight: Tensor, dense: Tensor | None, spec: QuantSpec, groups: Groups) -> Tensor | None:
        """`fake_quantize(weight, spec, groups, dense=dense)`, remembered; None where that has to compute it."""
        order = groups.memory_order(weight)
        if order is not None:  # as `fake_quantize` does
            there, back, moved = order
            value = self.quantized(weight.permute(there), None if dense is None else dense.permute(there), spec, moved)
            return None if value is None else value.permute(back)
        if spec.method != "ddt" or not native.quantizes(spec, weight, dense):
            return None
        found = self._recall((weight, dense), (spec, groups), lambda: _quantize(weight, dense, spec, groups))
        if found is None:
            return None
        pieces = groups.pieces(weight)
        fulls, pruned = (pieces, [None] * len(pieces)) if dense is None else (groups.pieces(dense), pieces)
        known = zip(found[::2], found[1::2], strict=True)
        # The nodes of `fake_quantize`: activation checkpointing compares what was saved with what is saved again.
        parts = [DDT.apply(*piece, spec, last)[0] for *piece, last in zip(fulls, pruned, known, strict=True)]
        return groups.join(parts, weight.shape)

    def pruned(
        self, weight: Tensor, sparsity: SparsitySpec, groups: Groups, mask: Tensor | None = None
    ) -> Tensor | None:
        """`sparsify(weight, sparsity, groups)`, or by a mask, remembered; None where those have to compute it."""
        if not native.applies(weight):
            return None

        def compute() -> tuple[Tensor, ...]:
            dense = weight.detach()
            return (sparsify(dense, sparsity, groups) if mask is None else apply_mask(dense, mask),)

        found = self._recall((weight,), (sparsity, groups, None if mask is None else _identity(mask)), compute)
        return None if found is None else _Pruned.apply(weight, found[0])

    def _recall(
        self, operands: tuple[Tensor | None, ...], settings: tuple[Any, ...], compute: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...] | None:
        given = [x.detach() for x in operands if x is not None]
        if self.off or not given[0].numel() or any(map(_unfit, given)) or _gathered():
            return None
        key = (*settings, *map(_identity, given))
        held, met = self._held, self._met
        if held is not None:
            if held.key == key and held.untouched() and held.content == _content(given):
                self._repeats = True
                return held.values
            self._held = None
        hold = self._repeats or met == key
        self._repeats, self._met = met == key, key
        return self._hold(key, given, compute) if hold else None

    def _hold(
        self, key: tuple[Any, ...], given: list[Tensor], compute: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...] | None:
        with torch.inference_mode(False), torch.no_grad():  # what is held must be of use to autograd too
            content, values = _content(given), compute()
        size = sum(value.untyped_storage().nbytes() for value in values)
        if _account.take(size):
            self._held = _Held(key, content, values, size)
        return values

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()


@vmapped
class _Pruned(torch.autograd.Function):
    """A value computed before, with the backward pass of `sparsify`: the identity."""

    @staticmethod
    def forward(weight: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _quantize(weight: Tensor, dense: Tensor | None, spec: QuantSpec, groups: Groups) -> tuple[Tensor, ...]:
    """The values and the statistics of each piece, in turn."""
    pieces = groups.pieces(weight.detach())
    if dense is None:
        parts = [native.forward(piece, None, spec) for piece in pieces]
    else:
        fulls = groups.pieces(dense.detach())
        parts = [native.forward(full, piece, spec) for full, piece in zip(fulls, pieces, strict=True)]
    return tuple(tensor for part in parts for tensor in part)


def _unfit(x: Tensor) -> bool:
    """Whether a tensor cannot be told from its storage: under a transform (jvp) it has none of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or x.is_inference() or not x.is_contiguous()


def _identity(x: Tensor) -> tuple[Any, ...]:
    # A weak reference keeps the number of a freed storage from being given to another one.
    return _Storage(x.untyped_storage()), x.data_ptr(), x.shape, x.dtype, x._version


class _Storage(StorageWeakRef):
    """Equal to the reference to the same storage, and to no other."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorageWeakRef) and self.cdata == other.cdata

    __hash__ = StorageWeakRef.__hash__


def _content(given: list[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(native.fingerprint, given))


def _gathered() -> bool:
    """Whether parameters may be gathered for a moment, so that holding values defeats the sharding."""
    distributed = torch.distributed
    return "torch.distributed.fsdp" in sys.modules and distributed.is_available() and distributed.is_initialized()
