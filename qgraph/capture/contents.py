"""What an object that outlives a forward holds: to tell whether it has changed, and as conditions for a graph.

Numbers, words and small containers of them are compared by value; a plain object of a user's (a config, a namespace) by
its fields; a source of random numbers by its state; everything else is the same while it is the same object.
"""

from __future__ import annotations

import enum
import inspect
import math
import os
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import CellType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qgraph.capture.source import HERE, TORCH
from qgraph.capture.structure import Step

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), enum.Enum, slice, range, torch.dtype, torch.device)
CONTAINERS = (list, tuple, dict, set, frozenset, deque)
LARGEST = 64  # a container with more in it is compared by its length alone
DEEPEST = 3  # of objects and containers inside each other
RANDOM = (random.Random, np.random.Generator, np.random.RandomState)
NOTHING = object()
_PRINTABLE = (bool, int, float, complex, str, bytes, type(None), range, torch.dtype, torch.device)
_LARGEST_ARRAY = 1 << 16  # bytes
_LIBRARY = os.path.dirname(os.__file__) + os.sep
_NOT_USERS = sys.stdlib_module_names - {"types", "argparse", "_thread"}  # where the namespaces are that users fill


class Same:
    """An object, compared by identity, and what it holds, compared by value."""

    def __init__(self, value: Any, contents: Any = None) -> None:
        self.value, self.contents = value, contents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value and other.contents == self.contents


def contents(value: Any, depth: int = 0) -> Any:
    """What can be compared later to tell whether a value, or what it holds, has changed."""
    if isinstance(value, CONSTANTS):
        return type(value), value
    if isinstance(value, CONTAINERS):
        if _length(value) > LARGEST or depth >= DEEPEST:
            return Same(value, _length(value))
        return Same(value, [contents(item, depth + 1) for item in _items(value)])
    if is_object(value) and depth < DEEPEST:
        return Same(value, {name: contents(item, depth + 1) for name, item in vars(value).items()})
    if isinstance(value, ContextVar):
        return Same(value, contents(value.get(None), depth + 1))
    if isinstance(value, RANDOM):
        return Same(value, str(_random_state(value)))
    if isinstance(value, np.ndarray):
        return Same(value, value.tobytes() if value.nbytes <= _LARGEST_ARRAY else None)
    if isinstance(value, Iterator):
        return object()  # to ask it is to change it
    return Same(value)


def conditions(text: str, value: Any, depth: int = 0) -> Iterator[str]:
    """What has to hold of an expression for a graph that took its value for a constant."""
    if value is None or isinstance(value, bool):
        yield f"{text} is {value}"
    elif isinstance(value, Tensor):
        yield f"isinstance({text}, torch.Tensor)"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"str({text}) == {str(value)!r}"
    elif type(value) in (int, float):
        yield f"type({text}) is {type(value).__name__} and {text} == {value!r}"
    elif _is_printable(value):
        yield f"{text} == {value!r}"
    elif isinstance(value, CONTAINERS):
        if any(isinstance(item, Tensor) for item in _items(value)):
            yield f"len({text}) == {len(value)}"  # of registries, which grow as code is imported, nothing is taken
    elif isinstance(value, ContextVar):
        for condition in conditions(f"{text}.get(None)", value.get(None), depth):
            yield f"torch.compiler.is_compiling() or {condition}"  # the compiler cannot read it
    elif is_object(value) and depth < DEEPEST:
        for name, item in vars(value).items():
            if name.isidentifier():
                yield from conditions(f"{text}.{name}", item, depth + 1)


def value_at(names: Mapping[str, Any], steps: tuple[Step, ...]) -> Any:
    """What a name, and the steps after it, stand for; `NOTHING` where there is nothing."""
    try:
        value = names.get(steps[0].key, NOTHING)
        value = value.cell_contents if isinstance(value, CellType) else value
        for step in steps[1:]:
            value = step.get(value)
        return value
    except (AttributeError, LookupError, TypeError, ValueError):
        return NOTHING


def part_of(value: Any, step: Step) -> Any:
    """A part of an object that users keep values in; no method, and no property, whose code would run."""
    if not step.attribute:
        holds = isinstance(value, (dict, list, tuple)) and is_constant(step.key)
        return value_at({"": value}, (Step(False, ""), step)) if holds else NOTHING
    if isinstance(value, ModuleType):
        return vars(value).get(step.key, NOTHING) if by_user(getattr(value, "__file__", None) or HERE) else NOTHING
    if not isinstance(value, type) and not is_object(value):
        return NOTHING
    part = inspect.getattr_static(value, step.key, NOTHING)
    return NOTHING if hasattr(part, "__get__") else part


def is_constant(value: Any, depth: int = 0) -> bool:
    """Whether a value is a plain one, or a small container of such."""
    if isinstance(value, CONSTANTS):
        return True
    if not isinstance(value, CONTAINERS) or _length(value) > LARGEST or depth >= DEEPEST:
        return False
    return all(is_constant(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value))


def is_object(value: Any) -> bool:
    """Whether a value is a plain object of a user's; one of the standard library has its own affairs."""
    if isinstance(value, (*CONSTANTS, *CONTAINERS, Tensor, nn.Module, type, Iterator)) or callable(value):
        return False
    return hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _NOT_USERS


def by_user(file: str) -> bool:
    """Whether code is neither ours nor torch's nor the standard library's."""
    return not file.startswith((HERE, TORCH, "<frozen")) and (not file.startswith(_LIBRARY) or "-packages" in file)


def _random_state(source: Any) -> Any:
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    return source.get_state() if isinstance(source, np.random.RandomState) else source.getstate()


def _items(value: Any) -> list[Any]:
    """Of a dict the keys and the values."""
    if isinstance(value, tuple):
        return list(tuple.__iter__(value))
    return [part for item in value.items() for part in item] if isinstance(value, dict) else list(value)


def _length(value: Any) -> int:
    """How much a container holds, also a tuple of a class that refuses to tell."""
    return tuple.__len__(value) if isinstance(value, tuple) else len(value)


def _is_printable(value: Any) -> bool:
    """Whether a constant is what its text says."""
    if isinstance(value, CONTAINERS) and type(value) in (list, tuple, dict, set, frozenset):
        return _length(value) <= LARGEST and all(map(_is_printable, _items(value)))
    return type(value) in _PRINTABLE and value == value and "inf" not in repr(value)
