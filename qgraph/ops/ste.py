"""Straight-through quantization, the baseline: min/max scale, and a mean-magnitude scale that is learned
through, with or without a window for the gradient.

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
    absmean_factor,
    kept_count,
    middle,
    nonzero_scale,
    outside,
    round_affine,
    round_linear,
    scale_is_mean,
    step_and_offset,
    work_dtype,
)
from qgraph.ops.recompute import is_large
from qgraph.ops.vmapped import vmapped


@vmapped
class StraightThrough(torch.autograd.Function):
    """`s q + b` with the identity as gradient, also where codes are clipped, as in BitNet b1.58.

    Backward needs nothing. A large tensor is kept in place of its result, to be quantized again (see `recompute`).
    """

    @staticmethod
    def forward(x: Tensor, spec: QuantSpec, sparse: bool) -> Tensor:
        if _compiled(x, spec, sparse):
            return native.forward(x, None, spec, regress=False)[0]
        q, step, offset = ste_codes(x, spec, sparse)
        y = q.mul_(step) if offset is None else torch.addcmul(offset, q, step)
        return y.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.restorable = is_large(inputs[0]) and _compiled(*inputs)
        if ctx.restorable:
            ctx.spec = inputs[1]
            ctx.save_for_backward(inputs[0])

    @staticmethod
    def restored(ctx: Any) -> Tensor:
        """The result again."""
        return native.forward(ctx.saved_tensors[0], None, ctx.spec, regress=False)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def _compiled(x: Tensor, spec: QuantSpec, sparse: bool) -> bool:
    """Not with a mean for its scale: its sum has to be that of `ste_codes`, or codes would differ."""
    return native.quantizes(spec, x) and not sparse and not scale_is_mean(spec)


@vmapped
class AbsMean(torch.autograd.Function):
    """`y = m + s (q - c)` with `s = k mean|x - m|`, `m` the mean (linear: 0), `c` the middle of the levels, and the
    gradient flowing through s and m as well.

    The codes are straight-through, `q = (x - m) / s + c + noise` with the noise (rounding and clipping) constant. With
    scale "windowed" a code is constant where its value lies outside the window: `w` is 0 there, else 1. Then
    `y = w (x + s noise) + (1 - w) (m + s (q - c))` and

        dL/dx = w h + mean((1 - w) h) + ds/dx sum(h (w noise + (1 - w) (q - c)))     (linear: without the mean)

    with `ds/dx = (k / n) (sign(x - m) - mean sign(x - m))` (linear: without the mean); n counts the kept values of a
    sparse tensor. Binary and linear this is XNOR-Net's weight with its scale learned through.

    Source: Rastegari et al., arXiv 1603.05279; Ma et al., arXiv 2402.17764.
    """

    @staticmethod
    def forward(x: Tensor, spec: QuantSpec, sparse: bool) -> Tensor:
        q, step, offset = ste_codes(x, spec, sparse)
        y = q.mul_(step) if offset is None else torch.addcmul(offset, q, step)
        return y.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.spec, ctx.sparse = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,), spec = ctx.saved_tensors, ctx.spec
        h = grads[0].to(work_dtype(x.dtype))
        x = x.detach()  # scale and noise are piecewise linear in x: no second derivative but through h
        q, step, offset = ste_codes(x, spec, ctx.sparse)
        wide = x.to(q.dtype)
        f = wide / nonzero_scale(step) if offset is None else (wide - offset).div_(step)
        moves, far = q - f, outside(f, spec)
        grad = h
        if far is not None:
            moves = torch.where(far, q - middle(spec), moves)
            grad = torch.where(far, 0, h)
        push = (h * moves).sum(dim=-1, keepdim=True) * absmean_factor(spec)
        if offset is None:
            return (grad + x.sign() * (push / kept_count(x, ctx.sparse))).to(x.dtype), None, None
        sides = (f - middle(spec)).sign_()
        sides = sides - sides.mean(dim=-1, keepdim=True)
        grad = grad + sides * (push / x.shape[-1])
        if far is not None:
            grad = grad + torch.where(far, h, 0).mean(dim=-1, keepdim=True)
        return grad.to(x.dtype), None, None


def ste_codes(x: Tensor, spec: QuantSpec, sparse: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (a fresh float tensor), step (0 for zeros, if linear) and offset (affine only) of each group."""
    wide = x.to(work_dtype(x.dtype))
    step, offset = step_and_offset(wide, spec, sparse)
    if offset is not None:
        return round_affine((wide - offset).div_(step), spec), step, offset
    return round_linear(wide / nonzero_scale(step), spec, sparse), step, None
