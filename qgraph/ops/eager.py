"""Whether a tensor is a plain one on a CPU, outside compilation and tracing: where code may look at values, loop over
chunks and write into buffers. And whether it carries a tangent, for which the fast operations have no formula.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qgraph.ops.vmapped import unwrapped


def on_cpu(*tensors: Tensor) -> bool:
    """Whether all `tensors` are plain, contiguous tensors of a CPU and nothing compiles or traces."""
    return plain_on_cpu(*tensors) and all(x.is_contiguous() for x in tensors)


def plain_on_cpu(*tensors: Tensor) -> bool:
    """The same for tensors of any strides."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and all(
        type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in tensors
    )


def has_tangent(x: Tensor) -> bool:
    """Whether `x` is a dual tensor, of `torch.func.jvp` or `torch.autograd.forward_ad`, or may be one to a jvp around
    the transform that runs (as `torch.func.hessian` has it).
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None or _met_by_outer_jvp(x)


def _met_by_outer_jvp(x: Tensor) -> bool:
    if not torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    outer = (torch._C._functorch.get_interpreter_stack() or [])[:-1]
    levels = {i.level() for i in outer if i.key() == torch._C._functorch.TransformType.Jvp}
    inside: Tensor | None = x
    while inside is not None and torch._C._functorch.maybe_get_level(inside) not in levels:
        inside = unwrapped(inside)
    return inside is not None
