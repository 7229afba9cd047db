"""Our autograd Functions under ``torch.vmap``: run for each member of the batch, whose groups are its own."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=type[torch.autograd.Function])


def is_batched(x: Tensor) -> bool:
    """Whether a vmap, under whatever other transforms, runs over a tensor."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def unwrapped(x: Tensor) -> Tensor | None:
    """What a functorch transform (vmap, grad, jvp) has made its tensor `x` of; None for any other."""
    if not torch._C._functorch.is_functorch_wrapped_tensor(x):
        return None
    return torch._C._functorch.get_unwrapped(x)


def vmapped(function: T) -> T:
    """Give an autograd Function a rule for ``torch.vmap``."""
    function.vmap = staticmethod(functools.partial(_each, function))  # type: ignore[method-assign]
    return function


def _each(function: Any, info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    results = [
        function.apply(*(a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
