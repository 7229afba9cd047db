"""Memory that is free goes back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

LARGE = 1 << 20  # what is smaller leaves nothing behind that is worth the call


@functools.cache
def _trim() -> Callable[[int], int]:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return lambda _: 0
    return found


def give_back() -> None:
    """Return what is free to the system. glibc keeps arrays of up to 32 MB for later, and small ones that stay between
    them hold it in place: of an export of many layers, several times what is in use.
    """
    _trim()(0)
