"""Scales and integer codes of a block of groups: what every method (ddt, ste, lsq) shares.

All functions take float tensors of shape (rows, groups, values), reduce over the last dimension, and know
nothing of gradients. Statistics are computed in float32, or float64 for float64 values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.specs import TERNARY

# c of the step `c mean|x - centre|`, by bits: the uniform step of least squared error for Gaussian values (Max,
# "Quantizing for minimum distortion", 1960), over their mean magnitude. One affine bit: the means of both halves.
AFFINE_FACTORS = {1: 2.0, 2: 1.2479, 3: 0.7345, 4: 0.4201, 5: 0.2358, 6: 0.1304, 7: 0.0713, 8: 0.0386}
LINEAR_FACTORS = {
    1: 1.0,
    TERNARY: 1.5341,
    2: 1.5341,
    3: 0.8156,
    4: 0.4429,
    5: 0.2422,
    6: 0.1322,
    7: 0.0718,
    8: 0.0387,
}


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


def clips(spec: QuantSpec) -> bool:
    """Whether values may lie beyond the outer levels by more than a rounding."""
    return spec.scale != "minmax" or scale_is_mean(spec)


def step_and_offset(x: Tensor, spec: QuantSpec, sparse: bool) -> tuple[Tensor, Tensor | None]:
    """Step and offset (affine only) of each group, shape (rows, groups, 1); a step of 0 is possible if linear."""
    if spec.scheme == "affine":
        return affine_scale(x, spec.levels[1]) if spec.scale == "minmax" else centred_scale(x, spec)
    if spec.scale == "minmax":
        return linear_scale(x, spec, sparse), None
    return mean_magnitude(x, sparse).mul_(absmean_factor(spec)), None


def centred_scale(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Step `c mean|x - mean x|` of each group, and the offset that puts the middle of the levels at the mean.

    Counted from the minimum, so that a constant group has spread 0 without rounding: its step is then 1 and its offset
    its value, so that all codes are 0, as with `affine_scale`.
    """
    low = x.amin(dim=-1, keepdim=True)
    above = x - low
    mean = above.mean(dim=-1, keepdim=True)
    size = above.sub_(mean).abs_().mean(dim=-1, keepdim=True).mul_(absmean_factor(spec))
    return nonzero_scale(size), low.add_(mean).sub_(size * middle(spec))


def absmean_factor(spec: QuantSpec) -> float:
    """c of the step `c mean|x|`: 1 for straight-through binary and ternary codes (BitNet b1.58), and LSQ's
    2 / sqrt(qmax) for wider linear ones; else the step that suits Gaussian values."""
    if spec.scheme == "affine":
        return AFFINE_FACTORS[int(spec.bits)]
    if spec.method == "ddt":
        return LINEAR_FACTORS[spec.bits]
    return 1.0 if spec.bits <= TERNARY else 2 / spec.levels[1] ** 0.5


def middle(spec: QuantSpec) -> float:
    """The middle of the levels: 0 if linear."""
    return (spec.levels[0] + spec.levels[1]) / 2


def window(spec: QuantSpec) -> float | None:
    """How far from the middle of the levels a position may lie for its code to pass the gradient on.

    With scale "windowed" half a spacing beyond the outer levels: so far a value is rounded to its nearest level. None
    is everywhere.
    """
    if spec.scale != "windowed":
        return None
    return (spec.levels[1] - spec.levels[0]) / 2 + (1.0 if is_binary(spec) else 0.5)


def outside(f: Tensor, spec: QuantSpec) -> Tensor | None:
    """Which positions lie outside the window; None where there is none. NaN does not."""
    reach = window(spec)
    return None if reach is None else (f - middle(spec)).abs_() > reach


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


def round_affine(f: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of `f = (x - offset) / step`; of a min/max scale they lie in 0..qmax by construction."""
    return f.round().clamp_(*spec.levels) if clips(spec) else f.round()


def round_linear(f: Tensor, spec: QuantSpec, sparse: bool) -> Tensor:
    """Codes of `f = x / step`, as floats: half to even and clipped; binary takes the sign.

    Binary has no level 0: a value of 0 is coded +1, but 0 in a sparse tensor, where it marks a pruned place.
    """
    if is_binary(spec):
        return f.sign() if sparse else (f >= 0).to(f.dtype).mul_(2).sub_(1)
    return f.round().clamp_(*spec.levels)
