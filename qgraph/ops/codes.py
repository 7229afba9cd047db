"""Scales and integer codes of a block of groups: what every method (ddt, ste, lsq) shares.

All functions take float tensors of shape (rows, groups, values), reduce over the last dimension, and know
nothing of gradients. Statistics are computed in float32, or float64 for float64 values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.config import QuantSpec

TERNARY_BITS = 1.58


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are computed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_is_mean(spec: QuantSpec) -> bool:
    """Whether the linear scale of `spec` is the mean magnitude (levels within -1..1) rather than the largest one.

    ddt.md leaves the linear scale open. With the levels -1, 0, +1 a scale of max|x| rounds all but the
    outliers to 0, so ternary, and 2 bits, which have the same levels, take mean|x| (as BitNet b1.58 does) and
    clip: on Gaussian values 6.7 dB against 2.4. Binary codes do not depend on the scale, and mean|x| is the
    one that makes the gradient through the codes of the right size. From 3 bits up the scale is
    max|x| / qmax.
    """
    return spec.scheme == "linear" and spec.levels[1] == 1


def is_binary(spec: QuantSpec) -> bool:
    """Whether the levels are -1 and +1: `x >= 0` is +1."""
    return spec.bits == 1 and spec.scheme == "linear"


def affine_scale(x: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Step `(max - min) / qmax` and offset `min` of each group, shape (rows, groups, 1).

    A constant group, or one whose step would be subnormal, gets the step 1: all its codes are then 0.
    """
    low = x.amin(dim=-1, keepdim=True)
    return nonzero_scale((x.amax(dim=-1, keepdim=True) - low).div_(qmax)), low


def linear_scale(x: Tensor, spec: QuantSpec, sparse: bool) -> Tensor:
    """Step of each group for levels symmetric about 0, shape (rows, groups, 1): `scale_is_mean` says which.

    With `sparse` the mean is that of the kept (nonzero) values. A group of zeros has the step 0;
    `nonzero_scale` gives what to divide by.
    """
    if scale_is_mean(spec):
        return mean_magnitude(x, sparse)
    if torch.compiler.is_compiling():  # one reduction, and no tensor for |x|
        return x.abs().amax(dim=-1, keepdim=True).div(spec.levels[1])
    largest = torch.maximum(x.amax(dim=-1, keepdim=True), -x.amin(dim=-1, keepdim=True))
    return largest.div_(spec.levels[1])


def mean_magnitude(x: Tensor, sparse: bool) -> Tensor:
    """mean|x| over each group, over its nonzero values with `sparse`; 0 for a group of zeros."""
    return x.abs().sum(dim=-1, keepdim=True).div_(kept_count(x, sparse))


def kept_count(x: Tensor, sparse: bool) -> Tensor | int:
    """How many values of a group are kept, at least 1."""
    if not sparse:
        return x.shape[-1]
    kept = x.clone().ne_(0)  # in floats: bool makes torch's loops several times slower
    return kept.sum(dim=-1, keepdim=True, dtype=work_dtype(x.dtype)).clamp_(min=1)


def nonzero_scale(scale: Tensor) -> Tensor:
    """`scale` with 1 in the place of a zero or subnormal one (codes are then 0); NaN and Inf stay."""
    return scale.masked_fill(scale < torch.finfo(scale.dtype).tiny, 1.0)


def round_affine(f: Tensor) -> Tensor:
    """Codes of `f = (x - min) / step`; f lies in 0..qmax by construction, so nothing is clipped."""
    return f.round()


def round_linear(f: Tensor, spec: QuantSpec, sparse: bool) -> Tensor:
    """Codes of `f = x / step`, as floats: half to even and clipped; binary takes the sign.

    Binary has no level 0: a value of 0 is coded +1, but 0 in a sparse tensor, where it marks a pruned place.
    """
    if is_binary(spec):
        return f.sign() if sparse else (f >= 0).to(f.dtype).mul_(2).sub_(1)
    return f.round().clamp_(*spec.levels)
