"""What a weight takes and what it loses: bits of codes, patterns and scales, bytes, and the error in dB.

Codes are as wide as the spec says, patterns as short as can be. A file may take less, where levels do not
occur, or more, where rows are padded; its export report says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.ops import Groups, fake_quantize, sparsify

FLOAT_BITS = 32  # of a value kept by a sparse float weight, of a scale and of a zero point


def group_count(groups: Groups, shape: Sequence[int]) -> int:
    """How many scales a weight of this shape has."""
    rows, each = groups.shape(shape)
    return rows * each


def describe_groups(groups: Groups, shape: Sequence[int]) -> str:
    """The groups of a weight as text: how many there are, and how many values share each scale."""
    count, numel = group_count(groups, shape), math.prod(shape)
    rows = groups.shape(shape)[0]
    length = numel // rows if rows else 0
    size = length if groups.block is None else min(groups.block, length)
    return f"{count} x {size}"


def code_bits(shape: Sequence[int], spec: QuantSpec | None, sparsity: SparsitySpec | None, groups: Groups) -> float:
    """Bits of all codes of a weight and, where it is sparse, of the pattern of kept weights.

    Parameters
    ----------
    shape : tuple of int
    spec : QuantSpec or None
        None: kept values are float32.
    sparsity : SparsitySpec or None
    groups : Groups
        Says in which rows an N:M pattern runs.
    """
    bits = float(FLOAT_BITS) if spec is None else spec.storage_bits
    numel = math.prod(shape)
    if sparsity is None or numel == 0:
        return numel * bits
    if sparsity.kind == "unstructured":
        kept = _kept(numel, sparsity.ratio or 0.0)
        return log2_choose(numel, kept) + kept * bits
    rows, length = _row_shape(groups, shape)
    if sparsity.kind == "n:m":
        n, m = sparsity.n or 1, sparsity.m or 1
        full, tail = divmod(length, m)
        one = log2_choose(m, n) + n * bits
        last = log2_choose(tail, min(n, tail)) + min(n, tail) * bits
        return rows * (full * one + last)
    high, wide = sparsity.block_shape or (1, 1)
    tiles = -(-rows // high) * -(-length // wide)
    kept = _kept(tiles, sparsity.ratio or 0.0)
    return log2_choose(tiles, kept) + numel * kept / tiles * bits


def scale_bits(shape: Sequence[int], spec: QuantSpec | None, groups: Groups) -> int:
    """Bits of all scales and zero points, float32 each."""
    if spec is None:
        return 0
    return group_count(groups, shape) * FLOAT_BITS * (2 if spec.scheme == "affine" else 1)


def stored_bytes(shape: Sequence[int], spec: QuantSpec | None, sparsity: SparsitySpec | None, groups: Groups) -> int:
    """Bytes of codes, pattern, scales and zero points; codes and pattern are rounded up to whole bytes."""
    # lgamma leaves a few ulp: 96.00000000000001 bits are 12 bytes
    codes = math.ceil(round(code_bits(shape, spec, sparsity, groups), 6) / 8)
    return codes + scale_bits(shape, spec, groups) // 8


def bits_per_weight(
    shape: Sequence[int], spec: QuantSpec | None, sparsity: SparsitySpec | None, groups: Groups
) -> float:
    """Codes, pattern, scales and zero points for each weight, in bits."""
    total = code_bits(shape, spec, sparsity, groups) + scale_bits(shape, spec, groups)
    return total / max(1, math.prod(shape))


@torch.no_grad()
def error_db(
    weight: Tensor,
    spec: QuantSpec | None,
    sparsity: SparsitySpec | None,
    groups: Groups,
    step: Tensor | None = None,
) -> float:
    """Signal to quantization noise of a weight, 10 log10(|w|^2 / |w - q(w)|^2); inf where q(w) is w."""
    weight = weight.detach()
    sparse = weight if sparsity is None else sparsify(weight, sparsity, groups)
    result = sparse
    if spec is not None:
        dense = None if sparsity is None else weight
        result = fake_quantize(sparse, spec, groups, dense=dense, step=step)
    return ratio_db(weight, result - weight)


def ratio_db(signal: Tensor, noise: Tensor) -> float:
    """10 log10(|signal|^2 / |noise|^2), the norms in float64."""
    loud = torch.linalg.vector_norm(signal, dtype=torch.float64).item()
    error = torch.linalg.vector_norm(noise, dtype=torch.float64).item()
    if error == 0:
        return math.inf
    return -math.inf if loud == 0 else 20 * (math.log10(loud) - math.log10(error))


def log2_choose(n: int, k: int) -> float:
    """log2 of the binomial coefficient: bits that say which k of n are kept."""
    if not 0 <= k <= n:
        return 0.0
    if n <= 64:
        return math.log2(math.comb(n, k))
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def _kept(count: int, ratio: float) -> int:
    return max(1, count - round(ratio * count))


def _row_shape(groups: Groups, shape: Sequence[int]) -> tuple[int, int]:
    rows = groups.sparsity_rows().shape(shape)[0]
    return rows, math.prod(shape) // rows if rows else 0
