"""Pruning by magnitude: which values stay (N:M, unstructured, blocks), and zeroing the rest with an identity
gradient.

Ties are broken by position, the lowest index stays, so the same weight gives the same mask on every device. A
NaN counts as infinitely large: it is kept where it can be seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qgraph.config import SparsitySpec
from qgraph.ops import eager, native, selection
from qgraph.ops.compiled import one_call
from qgraph.ops.groups import Groups
from qgraph.ops.sharded import is_sharded, on_whole
from qgraph.ops.vmapped import vmapped

CHUNK = 1 << 19  # values a thread that comparisons of runs go over at a time, to stay in cache
SEARCHED = 1 << 14  # from so many values on a search is faster than a selection


@one_call(SparsitySpec, Groups)
def sparsify(w: Tensor, sparsity: SparsitySpec, groups: Groups) -> Tensor:
    """`w` with the values that `sparsity_mask` does not keep set to 0; the gradient is the identity.

    Pruned values receive their gradient too, so they can grow and come back.

    Parameters
    ----------
    w : Tensor, float
    sparsity : SparsitySpec
    groups : Groups
        Says what a row is; its block length plays no part.
    """
    if is_sharded(w):
        return on_whole(lambda t: sparsify(t, sparsity, groups), w)
    if eager.has_tangent(w):
        return _passed_through(w, sparsify(w.detach(), sparsity, groups))
    return _Sparsify.apply(w, sparsity, groups)


def apply_mask(w: Tensor, mask: Tensor) -> Tensor:
    """`sparsify` with a given mask, a bool tensor of the shape of the whole `w`; the gradient is the identity."""
    if is_sharded(w):
        return on_whole(lambda t: apply_mask(t, mask), w)
    if eager.has_tangent(w):
        return _passed_through(w, w.detach() * mask.to(w.dtype))
    return _Masked.apply(w, mask)


def _passed_through(w: Tensor, pruned: Tensor) -> Tensor:
    """`pruned` with the tangent of `w`; a jvp of the functions below would be more than torch.compile takes."""
    return w + (pruned - w.detach())  # exactly: w + 0 or w - w


@torch.no_grad()
def sparsity_mask(w: Tensor, sparsity: SparsitySpec, groups: Groups) -> Tensor:
    """Which values stay, a bool tensor of the shape of `w`.

    - "n:m": of every m values along a row the n of largest magnitude; of the last, shorter run at most n as
      well.
    - "unstructured": of the whole tensor all but `round(ratio * numel)`, at least one.
    - "block": the rows are tiled with `block_shape`, partial tiles at the edges included; all but
      `round(ratio * tiles)` of the tiles stay, those with the largest mean magnitude (L1 norm by size).
    """
    return _mask(w, sparsity, groups).bool()


def _mask(w: Tensor, sparsity: SparsitySpec, groups: Groups) -> Tensor:
    """The mask as ones and zeros, in float32 where that is cheaper: bool makes torch's loops several times slower."""
    if w.numel() == 0:
        return torch.ones_like(w, dtype=torch.bool)
    magnitude = w.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    if sparsity.kind == "unstructured":
        return _largest(magnitude.flatten(), sparsity.ratio or 0.0).view(w.shape)
    along = groups.sparsity_rows()
    rows = along.to_rows(magnitude)
    if sparsity.kind == "n:m":
        keep = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        chunked = eager.on_cpu(rows)
        size = max(1, CHUNK * torch.get_num_threads() // rows.shape[1]) if chunked else rows.shape[0]
        for part, out in zip(rows.split(size), keep.split(size), strict=True):
            _keep_n_of_m(part, sparsity.n or 1, sparsity.m or 1, out)
    else:
        keep = _keep_tiles(rows, sparsity.block_shape or (1, 1), sparsity.ratio or 0.0)
    return along.from_rows(keep, w.shape)


@vmapped
class _Sparsify(torch.autograd.Function):
    @staticmethod
    def forward(w: Tensor, sparsity: SparsitySpec, groups: Groups) -> Tensor:
        found = _compiled(w, sparsity, groups)
        if found is not None:
            return found
        # A product is several times faster than torch.where, and shows an Inf that is pruned as NaN.
        return w * _mask(w, sparsity, groups).to(w.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


@vmapped
class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(w: Tensor, mask: Tensor) -> Tensor:
        return w * mask.to(w.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _compiled(w: Tensor, sparsity: SparsitySpec, groups: Groups) -> Tensor | None:
    """The pruned values by compiled passes, where those apply."""
    if sparsity.kind == "block" or w.numel() == 0 or not w.is_contiguous() or not native.applies(w):
        return None
    w = w.detach()
    if sparsity.kind == "unstructured":
        return native.prune_largest(w, _kept(w.numel(), sparsity.ratio or 0.0))
    along = groups.sparsity_rows()
    rows = along.to_rows(w).contiguous()
    pruned = native.prune_runs(rows, sparsity.n or 1, sparsity.m or 1)
    return along.from_rows(pruned, w.shape).contiguous()  # laid out as `w` is


def _kept(n: int, ratio: float) -> int:
    return max(1, n - round(ratio * n))


def _keep_n_of_m(rows: Tensor, n: int, m: int, keep: Tensor) -> None:
    """Writes 1.0 or 0.0 to `keep`; the values of a run are compared as planes, one a place in the run."""
    count, length = rows.shape
    full = length - length % m
    runs, kept = (t[:, :full].view(count, full // m, m).movedim(-1, 0) for t in (rows, keep))
    kept.copy_(_among_first(runs, n))
    if full < length:
        keep[:, full:] = _among_first(rows[:, full:].t(), n).t()


def _among_first(magnitude: Tensor, n: int) -> Tensor:
    """Whether less than n values of dimension 0 come before each one, by magnitude and then by index; 1.0 or 0.0.

    Shifted comparisons of whole planes: several times as fast as a sort of many short runs.
    """
    magnitude = magnitude.contiguous()
    count = magnitude.shape[0]
    order = torch.arange(count, dtype=torch.float32, device=magnitude.device)
    before = order.view(-1, *[1] * (magnitude.dim() - 1)).expand(magnitude.shape).clone()
    greater = torch.empty_like(before)
    for shift in range(1, count):
        later_first = torch.gt(magnitude[shift:], magnitude[:-shift], out=greater[shift:])
        before[:-shift] += later_first
        before[shift:] -= later_first
    return before.lt_(n)


def _keep_tiles(rows: Tensor, block_shape: tuple[int, int], ratio: float) -> Tensor:
    (high, wide), (count, length) = block_shape, rows.shape
    down, across = -(-count // high), -(-length // wide)

    def tile_sums(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, across * wide - length, 0, down * high - count))
        return padded.view(down, high, across, wide).sum(dim=(1, 3))

    values = rows if rows.dtype == torch.float64 else rows.float()
    score = tile_sums(values) / tile_sums(torch.ones_like(values))
    keep = _largest(score.flatten(), ratio).view(down, 1, across, 1)
    tiles = keep.expand(down, high, across, wide)
    return tiles.reshape(down * high, across * wide)[:count, :length]


def _largest(magnitude: Tensor, ratio: float) -> Tensor:
    """Mask of all but the `round(ratio * n)` smallest values of a vector, at least one kept; bool, or 1.0 and 0.0."""
    n = magnitude.shape[0]
    kept = _kept(n, ratio)
    if n >= SEARCHED and magnitude.dtype == torch.float32 and eager.on_cpu(magnitude):
        found = selection.largest(magnitude, kept)
        if found is not None:
            return found
    # Not kthvalue, which CUDA refuses under torch.use_deterministic_algorithms.
    threshold = magnitude.topk(kept, sorted=False).values.amin()
    above, level = magnitude > threshold, magnitude == threshold
    return above | (level & (level.cumsum(0) <= kept - above.sum()))
