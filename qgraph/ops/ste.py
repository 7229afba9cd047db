"""Straight-through quantization, the baseline: min/max scale, and a mean-magnitude scale that is learned
through.

Works on one piece of a tensor, shape (rows, groups, values). Sparse values are taken as they come: their
gradient passes on to the sparsifier, which hands it to the dense values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.ops import native
from qgraph.ops.codes import (
    TERNARY_BITS,
    affine_scale,
    kept_count,
    linear_scale,
    mean_magnitude,
    nonzero_scale,
    round_affine,
    round_linear,
    scale_is_mean,
    work_dtype,
)


class StraightThrough(torch.autograd.Function):
    """`s q + b` with the identity as gradient, also where codes are clipped, as in BitNet b1.58."""

    @staticmethod
    def forward(x: Tensor, spec: QuantSpec, sparse: bool) -> Tensor:
        # Not with a mean for its scale: its sum has to be that of `ste_codes`, or codes would differ.
        if native.quantizes(spec, x) and not sparse and not scale_is_mean(spec):
            return native.forward(x.detach(), None, spec, regress=False)[0]
        q, step, offset = ste_codes(x, spec, sparse)
        y = q.mul_(step) if offset is None else torch.addcmul(offset, q, step)
        return y.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class AbsMean(torch.autograd.Function):
    """`y = s q` with `s = c mean|x|`, and the gradient flowing through s as well.

    The codes are straight-through, `q = x / s + noise` with the noise (rounding and clipping) constant, so
    `dL/dx = h + (c sign(x) / n) sum(h noise)`; n counts the kept values of a sparse tensor.
    """

    @staticmethod
    def forward(x: Tensor, spec: QuantSpec, sparse: bool) -> Tensor:
        q, step, _ = ste_codes(x, spec, sparse)
        return q.mul_(step).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.spec, ctx.sparse = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        x = x.detach()  # scale and noise are piecewise linear in x: no second derivative but through h
        q, step, _ = ste_codes(x, ctx.spec, ctx.sparse)
        noise = q.sub_(x / nonzero_scale(step))
        push = (grads[0] * noise).sum(dim=-1, keepdim=True) * absmean_factor(ctx.spec)
        grad = grads[0] + x.sign() * (push / kept_count(x, ctx.sparse))
        return grad.to(x.dtype), None, None


def absmean_factor(spec: QuantSpec) -> float:
    """c of `s = c mean|x|`: 1 for binary and ternary, else LSQ's 2 / sqrt(qmax)."""
    return 1.0 if spec.bits <= TERNARY_BITS else 2 / spec.levels[1] ** 0.5


def ste_codes(x: Tensor, spec: QuantSpec, sparse: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (a fresh float tensor), step (0 for zeros, if linear) and offset (affine only) of each group."""
    wide = x.to(work_dtype(x.dtype))
    if spec.scheme == "affine":
        step, low = affine_scale(wide, spec.levels[1])
        return round_affine((wide - low).div_(step)), step, low
    if spec.scale == "absmean":
        step = mean_magnitude(wide, sparse).mul_(absmean_factor(spec))
    else:
        step = linear_scale(wide, spec, sparse)
    return round_linear(wide / nonzero_scale(step), spec, sparse), step, None
