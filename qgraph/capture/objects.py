"""Which plain objects a graph can make anew: those that are nothing but a class and a dict of attributes."""

from __future__ import annotations

import gc
from typing import Any

from torch import nn

from qgraph.capture.structure import Unsupported


def rebuildable(value: Any) -> bool:
    """Whether class and attributes are all there is to an object."""
    kind = type(value)
    if kind.__new__ is not object.__new__ or kind.__reduce_ex__ is not object.__reduce_ex__:
        return False
    if callable(value) or isinstance(value, (nn.Module, BaseException)) or not hasattr(value, "__dict__"):
        return False
    slotted = any(vars(base).get("__slots__") for base in kind.__mro__)
    return not slotted and all(isinstance(name, str) and name.isidentifier() for name in vars(value))


def check_own(value: Any) -> None:
    """Refuse an object that lives outside the forward: a global, or what another module holds, is no copy of itself."""
    for holder in gc.get_referrers(value):
        names = holder if isinstance(holder, dict) else ()
        if isinstance(holder, nn.Module) or any(n in names for n in ("__builtins__", "_modules", "__module__")):
            raise Unsupported(f"hands on a {type(value).__name__} that lives outside the forward")
