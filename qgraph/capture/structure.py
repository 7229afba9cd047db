"""The structure of Python values that cross a forward: what is inside, and a signature that says what a graph assumed.

Nothing here knows about graphs; the recorder and the guards stand on it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 8
_SCALARS = (bool, str, bytes, float, complex, type(None), type(Ellipsis), slice, range, enum.Enum)
_TORCH_SCALARS = (torch.dtype, torch.device, torch.layout, torch.memory_format)

_LEAVES = (*_SCALARS, *_TORCH_SCALARS, int, Tensor, nn.Module, type)


class Unsupported(Exception):
    """A value that a graph cannot carry; the text says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One access on the way to a part of a value: ``.name`` or ``[key]``."""

    attribute: bool
    key: Any

    def __str__(self) -> str:
        return f".{self.key}" if self.attribute else f"[{self.key!r}]"

    def get(self, value: Any) -> Any:
        return getattr(value, self.key) if self.attribute else value[self.key]

    def put(self, holder: Any, value: Any) -> None:
        if self.attribute:
            setattr(holder, self.key, value)
        else:
            holder[self.key] = value


def is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


def parts(value: Any) -> list[tuple[Step, Any]] | None:
    """The parts of a container or a plain object, each with how to reach it; None for a leaf."""
    if isinstance(value, _LEAVES):
        return None
    if isinstance(value, tuple) and hasattr(type(value), "_fields"):
        return [(Step(True, name), getattr(value, name)) for name in type(value)._fields]  # type: ignore[attr-defined]
    if isinstance(value, (tuple, list)):
        return [(Step(False, i), item) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value):
        return [(Step(True, f.name), getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    if isinstance(value, dict):
        return [(Step(False, key), item) for key, item in value.items()]
    attributes = getattr(value, "__dict__", None)
    if attributes is None or callable(value):
        return None
    return [(Step(True, name), item) for name, item in attributes.items()]


def walk(
    value: Any, path: tuple[Step, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[tuple[Step, ...], Any]]:
    """Every part of `value`, itself first, with its path; an object met twice is walked once."""
    seen = set() if seen is None else seen
    yield path, value
    inner = parts(value)
    if inner is None or id(value) in seen or len(path) >= _DEPTH:
        return
    seen.add(id(value))
    for step, item in inner:
        yield from walk(item, (*path, step), seen)


def signature(value: Any, top: bool = True, depth: int = 0) -> Any:
    """What a captured graph assumes of a value: types, structure, None-ness and constants, but no tensor's size.

    An int at the top of an argument, or in a tuple, is not part of it: graphs take those as inputs, so that a size
    passed from parent to child does not tie the child to that size.
    """
    if isinstance(value, Tensor):
        return "parameter" if isinstance(value, nn.Parameter) else "tensor"
    if value is None or isinstance(value, (bool, str)):
        return (type(value).__name__, value)
    if isinstance(value, (int, torch.SymInt)):
        return "int" if top else ("int", int(value))
    if isinstance(value, (*_SCALARS, *_TORCH_SCALARS)):
        return (type(value).__name__, str(value) if isinstance(value, (slice, range)) else value)
    if depth > _DEPTH:
        raise Unsupported(f"a value nested deeper than {_DEPTH} levels")
    inner = parts(value)
    if inner is None:
        return (type(value).__name__, id(value))
    ints = (top and isinstance(value, tuple)) or has_counters(value)
    return (
        type(value).__name__,
        tuple((step.attribute, step.key, signature(item, ints and not parts(item), depth + 1)) for step, item in inner),
    )


def has_counters(value: Any) -> bool:
    """Whether the ints among an object's attributes are inputs of a graph: a plain object that a forward may change."""
    kind = type(value)
    if isinstance(value, (tuple, list, dict, *_LEAVES)) or dataclasses.is_dataclass(value):
        return False
    return kind.__setattr__ is object.__setattr__ and parts(value) is not None


def aliases(values: tuple[Any, ...]) -> tuple[int, ...]:
    """Which tensors among a call's arguments are one and the same: () where all differ, else each one's first place.

    A forward may ask (``key is value``), and one node of a graph stands for one tensor.
    """
    if len(values) < 2 and (not values or isinstance(values[0], Tensor)):
        return ()
    tensors = [item for value in values for _, item in walk(value) if isinstance(item, Tensor)]
    first = [next(j for j, other in enumerate(tensors) if other is tensor) for tensor in tensors]
    return () if all(i == j for i, j in enumerate(first)) else tuple(first)


def same(old: Any, new: Any) -> bool:
    """Whether two values are one object, or equal plain scalars (which Python may rebuild)."""
    if old is new:
        return True
    scalar = (bool, int, float, str, bytes, tuple)
    return type(old) is type(new) and isinstance(old, scalar) and not parts(old) and old == new
