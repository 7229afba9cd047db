"""Sharded tensors (DTensor, as tensor parallelism makes them): handled whole, since a group may lie across shards.

Each process computes the same whole result and keeps its own part. `fully_shard` needs none of it: it gathers first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def is_sharded(x: Any) -> bool:
    """Whether `x` is a DTensor, told without the import, which takes a second."""
    return hasattr(x, "full_tensor")


def whole(x: Any) -> Any:
    """The whole of a DTensor as a plain tensor, differentiable; anything else as it is."""
    return x.full_tensor() if is_sharded(x) else x


def on_whole(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """``function(x)`` for a DTensor and a function that keeps the shape: the result is cut as `x` is."""
    from torch.distributed.tensor import DTensor, Replicate

    result = function(whole(x))
    everywhere = DTensor.from_local(result, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)
    # A sum that is still to be made has been made by now.
    return everywhere.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])
