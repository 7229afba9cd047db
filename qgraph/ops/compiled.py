"""Our operations under torch.compile: each is one call of its graph, not looked into before that graph is whole.

Its tracer follows an autograd Function, forward and backward, a line at a time: most of the time that a prepared model
took to compile. What comes after it runs the same Python, and fuses what that does as if it had been traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from qgraph.ops.sharded import is_sharded

F = TypeVar("F", bound=Callable[..., Tensor])


def one_call(*kinds: type) -> Callable[[F], F]:
    """For an `operation(x, *settings, **tensors)`; `kinds` are the dataclasses that the settings are."""

    def decorate(operation: F) -> F:
        @functools.wraps(operation)
        def run(x: Tensor, *settings: Any, **tensors: Tensor | None) -> Tensor:
            if not torch.compiler.is_dynamo_compiling() or is_sharded(x):
                return operation(x, *settings, **tensors)
            take_whole()
            hash(settings)  # the compiler makes symbols of numbers that vary; hashed they are guarded
            fields = tuple(tuple(getattr(s, name) for name in s.__match_args__) for s in settings)
            return call(fields, tuple(tensors), x, *tensors.values())

        def call(fields: tuple[Any, ...], names: tuple[str, ...], x: Tensor, *values: Tensor | None) -> Tensor:
            settings = (_made(kind, tuple(map(_number, given))) for kind, given in zip(kinds, fields, strict=True))
            return operation(x, *settings, **dict(zip(names, values, strict=True)))

        def take_whole() -> None:
            torch.compiler.allow_in_graph(call)

        # Run while tracing, not traced. The decorator for it imports the compiler: seconds, whether compiled or not.
        take_whole._dynamo_marked_constant = True  # type: ignore[attr-defined]
        call.__name__ = call.__qualname__ = operation.__name__
        return run  # type: ignore[return-value]

    return decorate


@functools.lru_cache(maxsize=256)
def _made(kind: type, fields: tuple[Any, ...]) -> Any:
    return kind(*fields)


def _number(field: Any) -> Any:
    """A symbol of one value as that value; anything else as it is."""
    if isinstance(field, torch.SymInt):
        return int(field)
    return float(field) if isinstance(field, torch.SymFloat) else field
