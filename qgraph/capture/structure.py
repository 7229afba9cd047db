"""The structure of Python values that cross a forward: what is inside, and a signature that says what a graph assumed.

Nothing here knows about graphs; the recorder and the guards stand on it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_DEPTH = 8
_SCALARS = (bool, str, bytes, float, complex, type(None), type(Ellipsis), slice, range, enum.Enum)
_TORCH_SCALARS = (torch.dtype, torch.device, torch.layout, torch.memory_format)

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)  # torch.export's sizes, and what is computed from them

_LEAVES = (*_SCALARS, *_TORCH_SCALARS, *_SYMBOLS, int, Tensor, nn.Module, type, ModuleType)


class Unsupported(Exception):
    """A value that a graph cannot carry; the text says why."""


class Step(NamedTuple):
    """One access on the way to a part of a value: ``.name`` or ``[key]``."""

    attribute: bool
    key: Any

    def __str__(self) -> str:
        return f".{self.key}" if self.attribute else f"[{self.key!r}]"

    def get(self, value: Any) -> Any:
        """The part of `value`."""
        return getattr(value, self.key) if self.attribute else value[self.key]

    def put(self, holder: Any, value: Any) -> None:
        """Set the part of `holder`."""
        if self.attribute and _is_frozen(type(holder)):
            object.__setattr__(holder, self.key, value)
        elif self.attribute:
            setattr(holder, self.key, value)
        else:
            holder[self.key] = value


def is_namedtuple(value: Any) -> bool:
    """Whether a value is a tuple with named fields."""
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


def parts(value: Any) -> list[tuple[Step, Any]] | None:
    """The parts of a container or a plain object, each with how to reach it; None for a leaf."""
    form = _form(value)
    if form == "leaf":
        return None
    if form == "sequence":
        return [(Step(False, i), item) for i, item in enumerate(value)]
    if form == "dict":
        return [(Step(False, key), item) for key, item in value.items()]
    if form == "object":
        return [(Step(True, name), item) for name, item in value.__dict__.items()]
    return [(Step(True, name), getattr(value, name, None)) for name in _fields(type(value))]


_forms: dict[type, str] = {}


def _form(value: Any) -> str:
    """How a value of this type is taken apart; every call of a forward asks, so types are looked at once."""
    kind = type(value)
    form = _forms.get(kind)
    if form is None:
        form = _forms[kind] = _classify(value)
    return form


def _classify(value: Any) -> str:
    if isinstance(value, _LEAVES):
        return "leaf"
    if is_namedtuple(value):
        return "fields"
    if isinstance(value, (tuple, list)):
        return "sequence"
    if dataclasses.is_dataclass(value):
        return "fields"
    if isinstance(value, dict):
        return "dict"
    return "leaf" if callable(value) or not hasattr(value, "__dict__") else "object"


_names: dict[Any, tuple[str, ...]] = {}


def _fields(kind: Any) -> tuple[str, ...]:
    """The names of the fields of a named tuple or a dataclass."""
    if kind not in _names:
        named = issubclass(kind, tuple)
        _names[kind] = kind._fields if named else tuple(field.name for field in dataclasses.fields(kind))
    return _names[kind]


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


def tensors_in(values: tuple[Any, ...]) -> list[Tensor]:
    """Every tensor in a call's arguments, in the order of `walk`."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif _form(value) != "leaf":
            _collect(value, found, [], 0)
    return found


def _collect(value: Any, found: list[Tensor], seen: list[Any], depth: int) -> None:
    if depth >= _DEPTH or any(value is other for other in seen):  # no ids, for the same reason as in `aliases`
        return
    seen.append(value)
    form = _form(value)
    if form == "sequence":
        items = value
    elif form in ("dict", "object"):
        items = (value if form == "dict" else value.__dict__).values()
    else:
        items = [getattr(value, name, None) for name in _fields(type(value))]
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif _form(item) != "leaf":
            _collect(item, found, seen, depth + 1)


def signature(value: Any, top: bool = True, depth: int = 0) -> Any:
    """What a captured graph assumes of a value: types, structure, None-ness and constants, but no tensor's size.

    An int at the top of an argument, in a tuple or an attribute of an object is not part of it: graphs take those as
    inputs, so that a size passed from parent to child does not tie the child to that size.
    """
    kind = type(value)
    if kind is Tensor:
        return "tensor"
    if value is None or kind is bool or kind is str:
        return (kind.__name__, value)
    if isinstance(value, Tensor):
        return "parameter" if isinstance(value, nn.Parameter) else "tensor"
    form = _form(value)
    if form == "leaf":
        return _leaf_signature(value, top)
    if depth > _DEPTH:
        raise Unsupported(f"a value nested deeper than {_DEPTH} levels")
    inside = top and isinstance(value, tuple)
    counters = has_counters(value)
    return (
        kind.__name__,
        tuple(
            (*step, signature(item, inside or (counters and type(item) is int), depth + 1))
            for step, item in parts(value) or ()
        ),
    )


def _leaf_signature(value: Any, top: bool) -> Any:
    kind = type(value)
    if isinstance(value, (bool, str)):
        return (kind.__name__, value)
    if isinstance(value, _SYMBOLS):  # where a graph has a constant, none holds: the Python keeps the size dynamic
        return "int" if top and isinstance(value, torch.SymInt) else kind.__name__
    if isinstance(value, int):
        return "int" if top else ("int", value)
    if isinstance(value, (*_SCALARS, *_TORCH_SCALARS)):
        return (kind.__name__, str(value) if isinstance(value, (slice, range)) else value)
    return (kind.__name__, id(value))


def has_counters(value: Any) -> bool:
    """Whether the ints among an object's attributes are inputs of a graph: a plain object, or a dataclass."""
    if _form(value) not in ("object", "fields") or isinstance(value, (tuple, dict)) or not hasattr(value, "__dict__"):
        return False
    return type(value).__setattr__ is object.__setattr__ or _is_frozen(type(value))


def _is_frozen(kind: type) -> bool:
    parameters = getattr(kind, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


def aliases(values: tuple[Any, ...]) -> tuple[int, ...]:
    """Which tensors among a call's arguments are one and the same: () where all differ, else each one's first place.

    A forward may ask (``key is value``), and one node of a graph stands for one tensor.
    """
    if len(values) < 2 and (not values or isinstance(values[0], Tensor)):
        return ()
    if len(values) == 2 and isinstance(values[0], Tensor) and (values[1] is None or isinstance(values[1], Tensor)):
        return () if values[0] is not values[1] else (0, 0)
    tensors = tensors_in(values)
    if torch.compiler.is_compiling():  # it takes an id for a promise that the next call brings the same object
        first = tuple(next(i for i, other in enumerate(tensors) if other is tensor) for tensor in tensors)
        return () if first == tuple(range(len(first))) else first
    places = list(map(id, tensors))
    return () if len(set(places)) == len(places) else tuple(map(places.index, places))


def memory_of(tensor: Tensor) -> int:
    """A number that tensors over the same memory have in common, for as long as one of them is held."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a transform's tensor has none of its own
        return id(tensor)


def same(old: Any, new: Any) -> bool:
    """Whether two values are one object, or equal plain scalars (which Python may rebuild)."""
    if old is new:
        return True
    scalar = (bool, int, float, str, bytes, tuple)
    return type(old) is type(new) and isinstance(old, scalar) and not parts(old) and old == new
