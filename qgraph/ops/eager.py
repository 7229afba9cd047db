"""Whether a tensor is a plain one on a CPU, outside compilation and tracing: where code may look at values, loop over
chunks and write into buffers. And whether it carries a tangent, for which the fast operations have no formula.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def on_cpu(*tensors: Tensor) -> bool:
    """Whether all `tensors` are plain, contiguous tensors of a CPU and nothing compiles or traces."""
    return plain_on_cpu(*tensors) and all(x.is_contiguous() for x in tensors)


def plain_on_cpu(*tensors: Tensor) -> bool:
    """The same for tensors of any strides."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and all(
        type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in tensors
    )


def has_tangent(x: Tensor) -> bool:
    """Whether `x` is a dual tensor, of `torch.func.jvp` or `torch.autograd.forward_ad`."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None
