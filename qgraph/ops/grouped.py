"""Products of groups of rows with a matrix each (``torch._grouped_mm``), in a form that torch.compile takes.

torch's own is compiled in bfloat16 alone. As a custom operator it is one node of the compiled graph, at any dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """``torch._grouped_mm`` by any of its signatures, compiled or not.

    Shapes of `a`, `b` and the result, `offs` (g,) int32 being where groups end: (m, k), (g, k, n), (m, n) with groups
    of rows; (g, m, k), (k, n), (m, n) with groups of columns; (m, k), (k, n), (g, m, n) with groups along k; without
    `offs` (g, m, k), (g, k, n), (g, m, n).
    """
    if not torch.compiler.is_compiling() or bias is not None:
        return torch._grouped_mm(a, b, offs, bias, out_dtype)
    result = _grouped(a, b, offs)
    return result if out_dtype is None else result.to(out_dtype)


@torch.library.custom_op("qgraph::grouped_mm", mutates_args=())
def _grouped(a: Tensor, b: Tensor, offs: Tensor | None) -> Tensor:
    return torch._grouped_mm(a, b, offs)


@_grouped.register_fake
def _(a: Tensor, b: Tensor, offs: Tensor | None) -> Tensor:
    groups = (
        () if offs is not None and (a.dim() == 3 or b.dim() == 3) else (b.shape[0] if offs is None else offs.shape[0],)
    )
    return a.new_empty((*groups, a.shape[-2], b.shape[-1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    a, b, offs = ctx.saved_tensors
    grad = grad.contiguous()
    return _grouped(grad, b.mT, offs), _grouped(a.mT, grad, offs), None


_grouped.register_autograd(_backward, setup_context=_keep)
