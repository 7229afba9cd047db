"""ParetoQ's quantizers of at most 2 bits, a baseline: learned range `a`, levels spread evenly over it (SEQ).

Works on one piece of a tensor, shape (rows, groups, values), with a range of shape (rows, groups, 1). With k levels (2,
3 or 4) and `t = x / a`:

    1 bit       y = a sign(x)                                                  (elastic binarization)
    1.58 bits   y = a round(1.5 clip(t)) / 1.5                                 levels -2/3, 0, 2/3 of a
    2 bits      y = a (round(2 clip(t) - 0.5) + 0.5) / 2                       levels -3/4, -1/4, 1/4, 3/4 of a

`clip` is to 0.99 on either side. One bit and two are affine here, codes from 0 with a zero point in their middle, and
ternary is linear; nothing follows the data but the learned range.

Source: Liu et al., "ParetoQ", arXiv 2502.02631, eq. 2 to 4 and the code that its authors published.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.ops.codes import mean_magnitude, middle, work_dtype
from qgraph.ops.vmapped import vmapped

CLIP = 0.99


@vmapped
class StretchedElastic(torch.autograd.Function):
    """`StretchedElastic.apply(x, size, spec, sparse, count)`; `count` is how many values the tensor has.

    Gradients: `dL/dx = h` where `|x / a|` is at most 0.99 (1 bit: 1), else 0; `dL/da = g sum(h (y / a - x / a))` over
    those values plus `g sum(h y / a)` over the others (1 bit: over all), with `g = 1 / sqrt(count)`.
    """

    @staticmethod
    def forward(x: Tensor, size: Tensor, spec: QuantSpec, sparse: bool, count: int) -> Tensor:
        q, _, scale = seq_codes(x, size, spec, sparse)
        return q.sub_(middle(spec)).mul_(scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, size, ctx.spec, ctx.sparse, ctx.count = inputs
        ctx.save_for_backward(x, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, size = (saved.detach() for saved in ctx.saved_tensors)  # noise and clipping are constants
        q, t, scale = seq_codes(x, size, ctx.spec, ctx.sparse)
        level = q.sub_(middle(ctx.spec)).mul_(scale / _range(size, q))
        clipped = t.abs() > (1.0 if ctx.spec.bits == 1 else CLIP)
        slope = level if ctx.spec.bits == 1 else level - torch.where(clipped, 0, t)
        size_grad = (grads[0] * slope).sum(dim=-1, keepdim=True) * ctx.count**-0.5
        size_grad = torch.where(size < 0, -size_grad, size_grad)
        return torch.where(clipped, 0, grads[0]).to(x.dtype), size_grad.to(size.dtype), None, None, None


def seq_codes(x: Tensor, size: Tensor, spec: QuantSpec, sparse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (a fresh float tensor), positions `x / a`, and the scale between two codes."""
    wide = x.to(work_dtype(x.dtype))
    a = _range(size, wide)
    t = wide / a
    if spec.bits == 1:
        positive = (t >= 0).to(t.dtype)
        signs = t.sign() if sparse else positive.mul(2).sub_(1)
        q, scale = (signs, a) if spec.scheme == "linear" else (positive, 2 * a)
    else:
        a_side, shift = levels_a_side(spec), middle(spec)
        q, scale = (a_side * t.clamp(-CLIP, CLIP)).add_(shift).round_(), a / a_side
    # The range does not see x, and clipping (or a sign) would turn NaN and Inf into clean numbers.
    return q.add_(wide - wide), t, scale


def levels_a_side(spec: QuantSpec) -> float:
    """How many spacings of two codes the range is."""
    if spec.bits == 1:
        return 1.0 if spec.scheme == "linear" else 0.5
    return 1.5 if spec.scheme == "linear" else 2.0


def seq_initial_size(x: Tensor, spec: QuantSpec) -> Tensor:
    """Start of the range, (rows, groups, 1): mean|x| at one bit, else max|x|; 1 / sqrt(n) for a group of zeros."""
    wide = x.to(work_dtype(x.dtype))
    size = mean_magnitude(wide, sparse=True) if spec.bits == 1 else wide.abs().amax(dim=-1, keepdim=True)
    return torch.where(size < torch.finfo(size.dtype).tiny, x.shape[-1] ** -0.5, size)


def _range(size: Tensor, like: Tensor) -> Tensor:
    """What is divided by: the magnitude of the learned range, above 0."""
    return size.to(like.dtype).abs().clamp_min(torch.finfo(like.dtype).tiny)
