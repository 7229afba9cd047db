"""Which plain objects a graph can make anew: those that are nothing but a class and a dict of attributes."""

from __future__ import annotations

import gc
import sys
from typing import Any

from torch import Tensor, nn

from qgraph.capture.structure import Unsupported


def rebuildable(value: Any) -> bool:
    """Whether class and attributes are all there is to an object."""
    kind = type(value)
    if kind.__new__ is not object.__new__ or kind.__reduce_ex__ is not object.__reduce_ex__:
        return False
    if callable(value) or isinstance(value, (nn.Module, BaseException)) or not hasattr(value, "__dict__"):
        return False
    if "<locals>" not in kind.__qualname__ and not found_by_name(kind):
        return False  # `type("Output", (), {...})`: what the forward computed may be in the class
    slotted = any(vars(base).get("__slots__") for base in kind.__mro__)
    return not slotted and all(isinstance(name, str) and name.isidentifier() for name in vars(value))


def found_by_name(kind: type) -> bool:
    """Whether a class is what its module and name say."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


def check_class(kind: type) -> None:
    """Refuse a class that holds tensors itself, or in the functions of its body: one that the forward has made."""
    for item in (item for base in kind.__mro__ for item in vars(base).values()):
        functions = [getattr(item, name, None) for name in ("fget", "fset", "__func__")] if item is not None else []
        cells = [cell for f in (item, *functions) for cell in getattr(f, "__closure__", None) or ()]
        if any(isinstance(inner, Tensor) for inner in (item, *map(_content, cells))):
            raise Unsupported(f"makes a {kind.__name__}, a class that holds tensors")


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def check_own(value: Any) -> None:
    """Refuse an object that lives outside the forward: a global, or what another module holds, is no copy of itself."""
    for holder in gc.get_referrers(value):
        names = holder if isinstance(holder, dict) else ()
        if isinstance(holder, nn.Module) or any(n in names for n in ("__builtins__", "_modules", "__module__")):
            raise Unsupported(f"hands on a {type(value).__name__} that lives outside the forward")
