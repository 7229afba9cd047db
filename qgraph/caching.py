"""How much memory quantized weights that are held for the next use take, and how to take it back.

When a value is held, and why it is never a stale one: `qgraph/ops/memo.py` and docs/training.md.
"""

from __future__ import annotations

from torch import nn

from qgraph.errors import ConfigError
from qgraph.graph import quantizer_modules, shared_below
from qgraph.ops import memo

__all__ = ["cached_bytes", "clear_cache", "set_cache_limit"]


def cached_bytes(prepared: nn.Module) -> int:
    """Bytes of quantized and pruned weights that a prepared model holds now for their next use.

    Raises
    ------
    CaptureError
        For a model that is not prepared.
    """
    return sum(found.bytes for found in _memos(prepared))


def clear_cache(prepared: nn.Module) -> None:
    """Release the quantized weights that a prepared model holds; they are computed again when next needed.

    Raises
    ------
    CaptureError
        For a model that is not prepared.
    """
    for found in _memos(prepared):
        found.clear()


def set_cache_limit(size: int) -> None:
    """How many bytes of quantized weights the models of this process may hold from now on; 1 GiB unless set, 0: none.

    What is held already stays until its weight changes or `clear_cache` releases it. Weights beyond the limit are
    quantized at each use.

    Raises
    ------
    ConfigError
        For a negative size, or one that is no whole number.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ConfigError(f"set_cache_limit: expected a number of bytes of at least 0, found {size!r}.")
    memo.set_limit(size)


def _memos(prepared: nn.Module) -> list[memo.Memo]:
    shared_below(prepared)  # raises where nothing is prepared
    found = [getattr(module, "memo", None) for module in quantizer_modules(prepared)]
    return [held for held in found if held is not None]
