"""Our autograd Functions under ``torch.vmap``: run for each member of the batch, whose groups are its own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch import predispatch

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


def each_member(function: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """`function` of each tensor that a batched one stands for, and of those of others; the results batched likewise."""
    if not is_batched(x):
        return function(x, *others)
    pairs = zip(*(itertools.repeat(None) if t is None else _members(t) for t in (x, *others)), strict=False)
    results = torch.stack([each_member(function, *pair) for pair in pairs])
    return predispatch._add_batch_dim(results, 0, torch._C._functorch.maybe_get_level(x))  # which a trace records


def _members(x: Tensor) -> tuple[Tensor, ...]:
    return torch._C._functorch.get_unwrapped(x).unbind(torch._C._functorch.maybe_get_bdim(x))


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
