"""Which values of a tensor share one scale, and how to lay them out as rows of groups.

Every operation of this package works on blocks of shape (rows, groups, values); this module is the only place
that knows how such a block comes out of a weight or an activation and goes back. No arithmetic on values
lives here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qgraph.config import QuantSpec

GroupKind = Literal["tensor", "channel", "token"]


@dataclass(frozen=True, slots=True)
class Groups:
    """The partition of a tensor into groups.

    Parameters
    ----------
    kind : {"tensor", "channel", "token"}
        What one row is. "tensor": the whole tensor. "channel": one index along `axis`, the other dimensions
        contracted in their order. "token": one vector along the last dimension.
    axis : int
        The channel dimension; may be negative. With "tensor" it only says along which rows N:M sparsity runs.
    block : int, optional
        Groups are runs of `block` values inside a row, the last one ragged. None, or a block at least as long
        as the row: the row is one group.

    Examples
    --------
    >>> Groups("channel", axis=0, block=128).shape((64, 300))
    (64, 3)
    """

    kind: GroupKind
    axis: int = 0
    block: int | None = None

    @staticmethod
    def for_weight(spec: QuantSpec | None, axis: int) -> Groups:
        """Groups of a weight whose output channels lie along `axis`; without a spec one a channel."""
        if spec is None or spec.granularity == "channel":
            return Groups("channel", axis)
        if spec.granularity == "tensor":
            return Groups("tensor", axis)
        if spec.granularity == "block":
            return Groups("channel", axis, spec.group_size)
        return Groups("token")

    @staticmethod
    def for_activation(spec: QuantSpec | None, conv: bool) -> Groups:
        """Groups of an activation: a row is a token, at a convolution a sample, in blocks where the spec says so."""
        if spec is not None and spec.granularity == "tensor":
            return Groups("tensor")
        if conv:
            return Groups("channel", 0)
        return Groups("token", 0, spec.group_size if spec is not None and spec.granularity == "block" else None)

    def to_rows(self, x: Tensor) -> Tensor:
        """Lay `x` out as (rows, row length), in logical order; a view where strides allow."""
        rows, length = self._rows(x.shape)
        if self.kind == "channel" and x.dim() > 1:
            x = x.movedim(self.axis, 0)
        return x.reshape(rows, length)

    def from_rows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of `to_rows` for a tensor of `shape`."""
        if self.kind != "channel" or len(shape) < 2:
            return rows.reshape(tuple(shape))
        axis = self.axis % len(shape)
        moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return rows.reshape(moved).movedim(0, axis)

    def shape(self, tensor_shape: Sequence[int]) -> tuple[int, int]:
        """(rows, groups a row): the shape of scales and zero points for a tensor of `tensor_shape`."""
        rows, length = self._rows(tensor_shape)
        return rows, sum(count for count, _ in self._runs(length))

    def pieces(self, x: Tensor) -> list[Tensor]:
        """Cut `x` into at most two tensors (rows, groups, values): the full blocks and the ragged tail."""
        rows = self.to_rows(x)
        runs = self._runs(rows.shape[1])
        parts = rows.split([count * size for count, size in runs], dim=1) if len(runs) > 1 else (rows,)
        return [part.reshape(rows.shape[0], *run) for part, run in zip(parts, runs, strict=True)]

    def join(self, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Inverse of `pieces` for a tensor of `shape`."""
        flat = [piece.reshape(piece.shape[0], piece.shape[1] * piece.shape[2]) for piece in pieces]
        return self.from_rows(flat[0] if len(flat) == 1 else torch.cat(flat, dim=1), shape)

    def cut_scales(self, scales: Tensor, shape: Sequence[int]) -> list[Tensor]:
        """Cut per-group values of shape `self.shape(shape)` (or broadcastable to it) to go with `pieces`."""
        scales = scales.expand(self.shape(shape)).unsqueeze(-1)
        runs = self._runs(self._rows(shape)[1])
        return list(scales.split([count for count, _ in runs], dim=1)) if len(runs) > 1 else [scales]

    def memory_order(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], Groups] | None:
        """For a channels-last tensor whose groups are whole rows: a permutation that makes it contiguous.

        Returns the permutation, its inverse and the groups of the permuted tensor, or None where `x` needs
        none (it is contiguous) or the order of values matters (blocks, tokens).
        """
        if self.block is not None or self.kind == "token" or x.dim() not in (4, 5) or x.is_contiguous():
            return None
        layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        if not x.is_contiguous(memory_format=layout):
            return None
        there = (0, *range(2, x.dim()), 1)
        back = (0, x.dim() - 1, *range(1, x.dim() - 1))
        return there, back, replace(self, axis=there.index(self.axis % x.dim()))

    def sparsity_rows(self) -> Groups:
        """The rows that sparsity patterns lie in: channels, also where the scale is per tensor."""
        return replace(self, kind="token" if self.kind == "token" else "channel", block=None)

    def _rows(self, shape: Sequence[int]) -> tuple[int, int]:
        if self.kind == "tensor" or len(shape) == 0:
            return 1, _product(shape)
        if self.kind == "token":
            return _product(shape[:-1]), shape[-1]
        axis = self.axis % len(shape)
        return shape[axis], _product(shape[:axis]) * _product(shape[axis + 1 :])

    def _runs(self, length: int) -> list[tuple[int, int]]:
        """(groups, values a group) of the full blocks and of the ragged tail in a row of `length`."""
        if self.block is None or self.block >= length:
            return [(1, length)]
        full, tail = length // self.block, length % self.block
        return [(full, self.block)] if tail == 0 else [(full, self.block), (1, tail)]


def _product(sizes: Sequence[int]) -> int:
    # math.prod would do for integers; the loop keeps symbolic sizes of torch.export symbolic.
    result = 1
    for size in sizes:
        result = result * size
    return result
