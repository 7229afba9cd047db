"""Quantization of a tensor with a fixed range: one step and one integer zero point, known before the values are.

Zero is one of the values, so that zero padding is exact, and `codes + zero point` is what ONNX's QuantizeLinear gives.
The denoising transform keeps its regression but goes through zero: `y = a q` with q counted from the zero point, the
linear form of ddt.md for either scheme, so that what is left of it at run time is one number, the gain `a / step`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.ops.codes import nonzero_scale, work_dtype
from qgraph.ops.compiled import one_call
from qgraph.ops.sharded import is_sharded, on_whole


@dataclass(frozen=True, slots=True)
class FixedScale:
    """A static range as numbers: codes are `round(x / step) + zero_point`, clipped, and stand for
    `scale * (code - zero_point)` with `scale = step * gain`. Floats are float32 values.
    """

    step: float
    zero_point: int
    gain: float = 1.0

    @property
    def scale(self) -> float:
        """What one code step is worth after dequantization."""
        return float(np.float32(self.step) * np.float32(self.gain))


def static_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Step and zero point of a range, in the shape of `low`; the zero point is integral and within the levels."""
    bottom, top = spec.levels
    if spec.scheme == "linear":
        step = nonzero_scale(torch.maximum(-low, high).div(top))
        return step, torch.zeros_like(step)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = nonzero_scale((high - low).div(top - bottom))
    return step, (bottom - low / step).round().clamp(bottom, top)


def static_codes(x: Tensor, step: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Codes counted from the zero point, as floats; NaN stays NaN."""
    bottom, top = spec.levels
    return torch.minimum(torch.maximum((x / step).round(), bottom - zero), top - zero)


def static_gain(x: Tensor, q: Tensor, step: Tensor, lam: float) -> Tensor:
    """`a / step` of the ridge regression of x on its codes: `mean(f q) / (mean(q q) + lam)` with f = x / step."""
    ridge = (q * q).mean() + lam
    return ((x / step) * q).mean() / torch.where(ridge == 0, 1, ridge)


@one_call(QuantSpec)
def fake_quantize_static(
    x: Tensor, spec: QuantSpec, *, step: Tensor, zero: Tensor, gain: Tensor | None = None
) -> Tensor:
    """`x` at a fixed scale; differentiable.

    Parameters
    ----------
    x : Tensor, float, any shape
    step, zero : Tensor, scalar
        As `static_scale` gives them.
    gain : Tensor, scalar, or None
        Of the denoising transform; None computes it from these values, and the gradient flows through it.

    Returns
    -------
    Tensor
        Of the shape and dtype of `x`. Gradient: that of ddt.md's linear case where the gain is computed here; else
        `gain` within the range and 0 where values are clipped.
    """
    if is_sharded(x):
        return on_whole(lambda t: fake_quantize_static(t, spec, step=step, zero=zero, gain=gain), x)
    if gain is None:
        return StaticDenoised.apply(x, step, zero, spec)
    return StaticRounded.apply(x, step, zero, gain, spec)


class StaticRounded(torch.autograd.Function):
    """`y = step gain q`, straight through within the range."""

    @staticmethod
    def forward(x: Tensor, step: Tensor, zero: Tensor, gain: Tensor, spec: QuantSpec) -> Tensor:
        wide = x.to(work_dtype(x.dtype))
        return static_codes(wide, step, zero, spec).mul_(step * gain).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, step, zero, gain, ctx.spec = inputs
        ctx.save_for_backward(x, step, zero, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, step, zero, gain = ctx.saved_tensors
        bottom, top = ctx.spec.levels
        f = x.to(work_dtype(x.dtype)) / step
        clipped = (f < bottom - zero - 0.5) | (f > top - zero + 0.5)  # a NaN is not clipped: its gradient stays
        return torch.where(clipped, 0, grads[0] * gain).to(x.dtype), None, None, None, None


class StaticDenoised(torch.autograd.Function):
    """`y = a q`, a being the ridge regression of x on q; all noise (rounding, clipping) is constant.

    Gradient, `m = mean(h q)`, `e = f - q`, `V = mean(q q) + lam`, `k = 1 - a / step`:

        dL/dx = (a / step) h + (m / V) (2 k q + e)

    Source: arXiv 2409.09245, the linear case.
    """

    @staticmethod
    def forward(x: Tensor, step: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
        wide = x.to(work_dtype(x.dtype))
        q = static_codes(wide, step, zero, spec)
        return (q * (step * static_gain(wide, q, step, spec.lam))).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, step, zero, ctx.spec = inputs
        ctx.save_for_backward(x, step, zero)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, step, zero = ctx.saved_tensors
        wide = x.detach().to(work_dtype(x.dtype))
        h = grads[0].to(wide.dtype)
        q = static_codes(wide, step, zero, ctx.spec)
        gain = static_gain(wide, q, step, ctx.spec.lam)
        ridge = (q * q).mean() + ctx.spec.lam
        push = (h * q).mean() / torch.where(ridge == 0, 1, ridge)
        return (gain * h + push * (2 * (1 - gain) * q + wide / step - q)).to(x.dtype), None, None, None
