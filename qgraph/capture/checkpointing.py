"""Activation checkpointing: functions that torch.utils.checkpoint runs again in backward, and how they are replaced.

What is put in their place, and why, is in `qgraph.capture.opaque`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import checkpoint

from qgraph.capture.patches import Patches

_OPTIONS = 5  # of the generator, between the function and its arguments

REENTRANT = "checkpoints activations (use_reentrant=True)"  # why a forward has no graph

StopRecomputation = checkpoint._StopRecomputationError  # ends a run in backward as soon as it has what it needs

_patches = Patches()


@contextlib.contextmanager
def repeatable(wrap: Callable[[Callable[..., Any], tuple[Any, ...]], Callable[..., Any]]) -> Iterator[None]:
    """While this runs, on any thread, each function that is checkpointed is first replaced by ``wrap(function, args)``.

    Both kinds of checkpoint keep the function for backward, where it is called with arguments equal to `args`.
    """

    def install() -> None:
        generator = checkpoint._checkpoint_without_reentrant_generator
        forward = checkpoint.CheckpointFunction.forward

        def without_reentrant(function: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
            return generator(wrap(function, rest[_OPTIONS:]), *rest, **kwargs)

        def reentrant(ctx: Any, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return forward(ctx, wrap(function, args), preserve, *args)

        _patches.replace(checkpoint, "_checkpoint_without_reentrant_generator", without_reentrant)
        _patches.replace(checkpoint.CheckpointFunction, "forward", staticmethod(reentrant))

    # Under a compiler no Python runs again, and it could not look into what replaces.
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _patches.on(install):
        yield
