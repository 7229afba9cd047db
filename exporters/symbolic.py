"""Calls with a dynamic size among their arguments that torch would trace as a constant, or not translate.

Each is written in operations that take a size as it is. A function returns NotImplemented where all its sizes are
numbers, and leaves the call as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import SymInt, Tensor


def remainder(x: Any, other: Any) -> Any:
    """a remainder by a tensor."""
    return x.remainder(_tensor(other, x)) if isinstance(x, Tensor) and isinstance(other, SymInt) else NotImplemented


def power(x: Any, exponent: Any) -> Any:
    """a power with a tensor for its exponent."""
    return x.pow(_tensor(exponent, x)) if isinstance(x, Tensor) and isinstance(exponent, SymInt) else NotImplemented


def spaced(start: Any, end: Any, steps: Any = None, **options: Any) -> Any:
    """a scaled range.

    Counted from the nearer end, as torch does: both ends come out as they are.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.linspace.html
    """
    if not isinstance(steps, SymInt) or isinstance(start, Tensor) or isinstance(end, Tensor):
        return NotImplemented
    dtype = options.pop("dtype", None) or torch.get_default_dtype()
    if not dtype.is_floating_point or options.pop("out", None) is not None:
        return NotImplemented
    count: Any = steps  # torch's stubs know plain numbers alone
    places = torch.arange(count, dtype=dtype, **options)
    step = (end - start) / _tensor(count - 1, places).clamp(min=1)
    return torch.where(places < (count // 2), start + step * places, end - step * (count - 1 - places))


def one_hot(labels: Tensor, num_classes: Any = -1) -> Any:
    """a comparison with a range."""
    if not isinstance(num_classes, SymInt):
        return NotImplemented
    count: Any = num_classes
    return (labels.unsqueeze(-1) == torch.arange(count, device=labels.device)).long()


def rolled(x: Tensor, shifts: Any, dims: Any = ()) -> Any:
    """rows taken in another order."""
    shifts, dims = (tuple(v) if isinstance(v, (tuple, list)) else (v,) for v in (shifts, dims))
    if not any(isinstance(shift, SymInt) for shift in shifts) or len(shifts) != len(dims):
        return NotImplemented
    for shift, dim in zip(shifts, dims, strict=True):
        places = torch.arange(x.shape[dim], device=x.device)
        x = x.index_select(dim, remainder_of(places - shift, x.shape[dim]))
    return x


def remainder_of(places: Tensor, size: Any) -> Tensor:
    return places.remainder(_tensor(size, places) if isinstance(size, SymInt) else size)


def pooled(rank: int, reduce: Callable[..., Tensor]) -> Callable[..., Any]:
    """The rewrite of a pooling over `rank` dimensions whose windows are the whole input."""

    def pool(x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *args: Any, **options: Any) -> Any:
        """a reduction of all that is there."""
        kernel = tuple(kernel_size) if isinstance(kernel_size, (tuple, list)) else (kernel_size,) * rank
        padded = any(padding) if isinstance(padding, (tuple, list)) else padding
        # One window is one whatever the stride, the dilation and the rounding of sizes.
        other = args[2:] or options.get("return_indices") or options.get("divisor_override")
        if padded or other or not any(isinstance(size, SymInt) for size in kernel):
            return NotImplemented
        dims = tuple(range(-rank, 0))
        whole = all(size == x.shape[dim] for size, dim in zip(kernel, dims, strict=True))
        return reduce(x, dims, keepdim=True) if whole else NotImplemented

    return pool


def _tensor(size: Any, like: Tensor) -> Tensor:
    return torch.scalar_tensor(size, dtype=like.dtype, device=like.device)


SYMBOLIC: Mapping[str, Callable[..., Any]] = {
    "remainder": remainder,
    "__mod__": remainder,
    "pow": power,
    "__pow__": power,
    "linspace": spaced,
    "one_hot": one_hot,
    "roll": rolled,
    **{f"avg_pool{rank}d": pooled(rank, torch.mean) for rank in (1, 2, 3)},
    **{f"max_pool{rank}d": pooled(rank, torch.amax) for rank in (1, 2, 3)},
}
