"""Learned step size quantization, the baseline: `y = s clip(round(x / s))` with s a parameter.

Works on one piece of a tensor, shape (rows, groups, values), with a step of shape (rows, groups, 1).

Linear schemes are LSQ for signed values, here with the symmetric levels of the spec; the binary one takes the
sign. The affine scheme is LSQ's unsigned form on `x - b`, b the minimum of the group, held constant: LSQ+
initializes its offset so and learns it, here it follows the data instead, so that one learned number a group
is the whole state.

Source: Esser et al., arXiv 1902.08153, eq. 3 and section 2.2; Bhalgat et al., arXiv 2004.09576.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.errors import ConfigError
from qgraph.ops.codes import is_binary, mean_magnitude, round_linear, work_dtype
from qgraph.ops.vmapped import vmapped


@vmapped
class LearnedStep(torch.autograd.Function):
    """`LearnedStep.apply(x, step, spec, sparse, count)`; `count` is how many values share one step.

    Gradients: `dL/dx = h` where `x / s` lies within the levels, else 0; `dL/ds = g sum(h (q - x / s))` over
    the values within the levels plus `g sum(h q)` over the clipped ones, with `g = 1 / sqrt(count qmax)`. A
    step that training pushes below 0 counts as its magnitude.
    """

    @staticmethod
    def forward(x: Tensor, step: Tensor, spec: QuantSpec, sparse: bool, count: int) -> Tensor:
        q, _, size, offset = lsq_codes(x, step, spec, sparse)
        y = q.mul_(size) if offset is None else torch.addcmul(offset, q, size)
        return y.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, step, ctx.spec, ctx.sparse, ctx.count = inputs
        ctx.save_for_backward(x, step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, step = (saved.detach() for saved in ctx.saved_tensors)  # noise and clipping are constants
        q, f, _, _ = lsq_codes(x, step, ctx.spec, ctx.sparse)
        low, high = ctx.spec.levels
        inside = (f >= low) & (f <= high)
        slope = q.sub_(torch.where(inside, f, 0))
        step_grad = (grads[0] * slope).sum(dim=-1, keepdim=True) * (ctx.count * high) ** -0.5
        step_grad = torch.where(step < 0, -step_grad, step_grad)
        # where, not a product: a NaN in f is not `inside`, and its gradient must not look like a clean 0.
        clipped = (f < low) | (f > high)
        return torch.where(clipped, 0, grads[0]).to(x.dtype), step_grad.to(step.dtype), None, None, None


def required_step(step: Tensor | None, spec: QuantSpec) -> Tensor:
    """`step`, or the error that says where to get one."""
    if step is None:
        raise ConfigError(
            f"quantization with method={spec.method!r}: no learned step was given; "
            "pass step=, a parameter that starts at qgraph.ops.initial_step(x, spec, groups)."
        )
    return step


def lsq_codes(x: Tensor, step: Tensor, spec: QuantSpec, sparse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Codes (a fresh float tensor), positions x / s, step size and offset (affine only)."""
    wide = x.to(work_dtype(x.dtype))
    size = step.to(wide.dtype).abs()
    size = size.clamp_min(torch.finfo(size.dtype).tiny)
    if spec.scheme == "affine":
        low = wide.amin(dim=-1, keepdim=True)
        f = (wide - low).div_(size)
        q = f.round().clamp_(*spec.levels)
    else:
        low, f = None, wide / size
        q = round_linear(f, spec, sparse)
    # The step does not see x, and clipping (or a sign) would turn NaN and Inf into clean numbers.
    return q.add_(wide - wide), f, size, low


def lsq_initial_step(x: Tensor, spec: QuantSpec) -> Tensor:
    """Start of the step, (rows, groups, 1): LSQ's `2 mean|x| / sqrt(qmax)`; affine: LSQ+'s `range / qmax`.

    Binary takes mean|x|, the scale that is nearest to the values. A group that is 0 or constant (a layer
    initialized to 0) takes `1 / sqrt(n)` for its mean|x| or range, about what a row of n weights has: a step
    of 0 would never train.
    """
    wide = x.to(work_dtype(x.dtype))
    if spec.scheme == "affine":
        size, factor = wide.amax(dim=-1, keepdim=True) - wide.amin(dim=-1, keepdim=True), 1 / spec.levels[1]
    else:
        size = mean_magnitude(wide, sparse=True)  # of the kept values where x is pruned
        factor = 1.0 if is_binary(spec) else 2 / spec.levels[1] ** 0.5
    return torch.where(size < torch.finfo(size.dtype).tiny, x.shape[-1] ** -0.5, size).mul_(factor)
