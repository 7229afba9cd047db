"""The denoising dequantization transform: hand-written forward and closed-form backward.

Works on one piece of a tensor, shape (rows, groups, values); `qgraph.ops.fake_quantize` cuts and joins. The
plain autograd version that these are held to is in `reference.py`.

Everything is computed in units of the step s, so that no statistic depends on the magnitude of the values.
With `f = (x - b) / s` for the dense x, `q` the codes, `e = f - q` (all the noise: rounding, clipping,
pruning), bars for means over the group and `qc = q - mean q` (linear: `qc = q`):

    V = mean(qc^2) + lam,   a = mean(f qc) / V = (mean(qc^2) + mean(e qc)) / V,   k = 1 - a
    y = s a qc + mean x     (linear: without mean x)

A constant group (max = min) gives y = x exactly if affine: all codes are equal, and the mean carries it. A linear
scheme has no mean to carry it: the ridge shrinks a constant as it shrinks every group, `y = x E / (E + lam)` with
`E = mean(q^2)`, 1% at one bit and 1e-6 at 8. It is exact for 0, or with lam = 0. No closed form with a ridge can
do better without a jump where a group becomes constant. Gradients are finite throughout.

Source: arXiv 2409.09245, restated in the project's ddt.md, whose `a` is `s a` here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.ops import ddt_cpu, native
from qgraph.ops.codes import nonzero_scale, outside, round_affine, round_linear, step_and_offset, work_dtype
from qgraph.ops.recompute import is_large
from qgraph.ops.vmapped import vmapped


@vmapped
class DDT(torch.autograd.Function):
    """`y, stats = DDT.apply(dense, sparse, spec, known)`: denoised values and the statistics that define them.

    Parameters
    ----------
    dense : Tensor, shape (rows, groups, values), float
        The original values; the only input that receives a gradient.
    sparse : Tensor of the same shape, or None
        `dense` with pruned values set to 0, taken as `dense + constant`: its part of the gradient is in that
        of `dense`.
    spec : QuantSpec
    known : tuple of both results, optional
        Where they were computed before: given out again, as tensors and with a node of their own.

    Notes
    -----
    Backward, upstream gradient h, `m = mean(h qc)`, with step and offset constant:

        dL/dx = a h + k mean(h) + (m / V) (2 k qc + e - mean e)     (linear: without mean(h) and mean(e))

    which is ddt.md's form after `xc / s = qc + e - mean e`; written so that nothing large cancels at 8 bits. With scale
    "windowed", which is no part of the paper, codes of values outside the window (`codes.window`) are constants: there

        dL/dx = mean(h) + (m / V) qc     (linear: without mean(h))

    Kept for it: `dense`, six scalars a group, and `sparse`, or of a large one which values it prunes. Codes are
    recomputed.
    """

    @staticmethod
    def forward(
        dense: Tensor, sparse: Tensor | None, spec: QuantSpec, known: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if known is not None:
            return known[0].detach(), known[1].detach()
        if native.quantizes(spec, dense, sparse):
            return native.forward(dense, sparse, spec)
        if ddt_cpu.applies(dense, sparse):
            return ddt_cpu.forward(dense, sparse, spec)
        qc, stats = centred_codes(dense, sparse, spec)
        step, offset, _, mean_f, slope, _ = stats.split(1, dim=-1)
        gain = slope * step
        y = torch.addcmul(torch.addcmul(offset, mean_f, step), qc, gain) if spec.scheme == "affine" else qc.mul_(gain)
        return y.to(dense.dtype), stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        dense, sparse, ctx.spec, known = inputs
        compiled = is_large(dense) and native.quantizes(ctx.spec, dense, sparse)
        ctx.restorable = compiled and known is None  # what is remembered is held all the same
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        kept = sparse if sparse is None or not compiled else sparse.bool()
        ctx.save_for_backward(dense, kept, output[1])

    @staticmethod
    def restored(ctx: Any) -> Tensor:
        """The denoised values again."""
        return native.restored(*_saved(ctx), ctx.spec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grads[0] is None:
            return None, None, None, None
        dense, sparse, stats = _saved(ctx)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad = differentiable_gradient(grads[0], dense, sparse, ctx.spec)
        elif native.quantizes(ctx.spec, dense, sparse, grads[0]):
            grad = native.gradient(grads[0], dense, sparse, stats, ctx.spec)
        elif ddt_cpu.applies(dense, sparse) and type(grads[0]) is Tensor:
            grad = ddt_cpu.gradient(grads[0], dense, sparse, stats, ctx.spec)
        else:
            grad = gradient(grads[0], dense, sparse, stats, ctx.spec)
        return grad, None, None, None


def _saved(ctx: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """`dense`, `sparse` and the statistics of a forward pass; of large `sparse` a byte a value was kept."""
    dense, sparse, stats = ctx.saved_tensors
    if sparse is not None and sparse.dtype == torch.bool:
        sparse = dense.detach() * sparse.view(torch.uint8)  # a product with bool is slower, and torch.where by far
    return dense, sparse, stats


def centred_codes(dense: Tensor, sparse: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """`qc` and the statistics (step, offset, mean q, mean f, a, V), shape (rows, groups, 6), of each group.

    Linear schemes have offset, mean q and mean f 0, and `qc` is q.
    """
    wide = dense.to(work_dtype(dense.dtype))
    pruned = None if sparse is None else sparse.to(wide.dtype)
    if native.quantizes(spec, dense, sparse):  # the very step of the forward pass, so that codes are the same
        _, stats = native.forward(dense, sparse, spec)
        step, offset, mean_q = stats[..., :1], stats[..., 1:2] if spec.scheme == "affine" else None, stats[..., 2:3]
        return _codes_and_noise(wide, pruned, step, offset, spec)[0].sub_(mean_q), stats
    step, offset = _step_and_offset(wide if pruned is None else pruned, spec, pruned is not None)
    q, noise = _codes_and_noise(wide, pruned, step, offset, spec)
    if offset is not None:
        mean_q = q.mean(dim=-1, keepdim=True)
        mean_f = mean_q + noise.mean(dim=-1, keepdim=True)
        q = q.sub_(mean_q)
    else:
        mean_q = mean_f = offset = torch.zeros_like(step)
    covariance = noise.mul_(q).mean(dim=-1, keepdim=True)
    variance = noise.copy_(q).mul_(q).mean(dim=-1, keepdim=True)  # the buffer is free by now
    ridge = _nonzero(variance + spec.lam)
    slope = (variance + covariance) / ridge
    return q, torch.cat([step, offset, mean_q, mean_f, slope, ridge], dim=-1)


def gradient(h: Tensor, dense: Tensor, sparse: Tensor | None, stats: Tensor, spec: QuantSpec) -> Tensor:
    """dL/d dense from the upstream gradient `h` and the statistics of the forward pass."""
    affine = spec.scheme == "affine"
    step, offset, mean_q, _, slope, ridge = stats.split(1, dim=-1)
    wide = dense.to(step.dtype)
    pruned = None if sparse is None else sparse.to(step.dtype)
    h = h.to(step.dtype)
    q, noise = _codes_and_noise(wide, pruned, step, offset if affine else None, spec)
    far = outside(q + noise if pruned is None else _positions(pruned, step, offset if affine else None), spec)
    if affine:
        q = q.sub_(mean_q)
    push = (h * q).mean(dim=-1, keepdim=True).div_(ridge)
    rest = 1 - slope
    level = h.mean(dim=-1, keepdim=True) if affine else torch.zeros_like(push)
    constant = None if far is None else torch.addcmul(level, q, push)
    grad = q.mul_(2 * push * rest).addcmul_(noise, push).addcmul_(h, slope)
    if affine:
        grad = grad.add_(rest * level - push * noise.mean(dim=-1, keepdim=True))
    if far is not None and constant is not None:
        grad = torch.where(far, constant, grad)
    return grad.to(dense.dtype)


def differentiable_gradient(h: Tensor, dense: Tensor, sparse: Tensor | None, spec: QuantSpec) -> Tensor:
    """`gradient` in plain differentiable operations of `h` and `dense`, for a second backward pass.

    Step, offset and noise are constants here as they are in the first derivative.
    """
    wide, h = dense.to(work_dtype(dense.dtype)), h.to(work_dtype(dense.dtype))
    with torch.no_grad():
        pruned = None if sparse is None else sparse.to(wide.dtype)
        step, offset = _step_and_offset(wide if pruned is None else pruned, spec, pruned is not None)
        _, noise = _codes_and_noise(wide, pruned, step, offset, spec)
        far = outside(_positions(wide if pruned is None else pruned, step, offset), spec)
    f = wide / step if offset is None else (wide - offset) / step
    q = f - noise
    if far is not None:
        q = torch.where(far, q.detach(), q)
    if offset is not None:
        q, f = q - q.mean(dim=-1, keepdim=True), f - f.mean(dim=-1, keepdim=True)
    ridge = _nonzero((q * q).mean(dim=-1, keepdim=True) + spec.lam)
    slope = (f * q).mean(dim=-1, keepdim=True) / ridge
    push = (h * q).mean(dim=-1, keepdim=True) / ridge
    grad = slope * h + push * (f + (1 - 2 * slope) * q)
    level = torch.zeros_like(push) if offset is None else h.mean(dim=-1, keepdim=True)
    grad = grad + (1 - slope) * level
    if far is not None:
        grad = torch.where(far, level + push * q, grad)
    return grad.to(dense.dtype)


def _step_and_offset(x: Tensor, spec: QuantSpec, sparse: bool) -> tuple[Tensor, Tensor | None]:
    step, offset = step_and_offset(x, spec, sparse)
    return (step if offset is not None else nonzero_scale(step)), offset


def _codes_and_noise(
    dense: Tensor, pruned: Tensor | None, step: Tensor, offset: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """q and e = f - q, two fresh tensors that the caller may overwrite; f is that of the dense values."""
    f = _positions(dense, step, offset)
    source = f if pruned is None else _positions(pruned, step, offset)
    q = round_affine(source, spec) if offset is not None else round_linear(source, spec, pruned is not None)
    return q, f.sub_(q)


def _positions(x: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    return x / step if offset is None else (x - offset).div_(step)


def _nonzero(ridge: Tensor) -> Tensor:
    """With lam = 0 a group of equal codes has V = 0; its slope is 0 / 1. NaN stays."""
    return ridge.masked_fill(ridge == 0, 1.0)
