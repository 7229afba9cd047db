"""What a forward reads and changes outside of all modules: globals, by the names in its code and in what that calls.

Python reads a global without telling anyone. So the names are taken from the bytecode before the forward runs, with
what they stand for: the graph holds for as long as those that it takes for constants stay the same. A forward that
changes one (appends to a list, counts) stays Python, since its graph would not.
"""

from __future__ import annotations

import builtins
import functools
import gc
import importlib
import inspect
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qgraph.capture.attributes import CONSTANTS, CONTAINERS, DEEPEST, LARGEST, is_constant
from qgraph.capture.bytecode import Name, attributes_named, names_outside
from qgraph.capture.calls import Constant, Global
from qgraph.capture.guards import Guard
from qgraph.capture.source import HERE, TORCH
from qgraph.capture.structure import Step

if TYPE_CHECKING:
    from qgraph.capture.recorder import Recorder

_MOST_FUNCTIONS = 64  # that a forward's code leads to
_LIBRARY = os.path.dirname(os.__file__) + os.sep
_OF_USERS = ("types", "argparse")  # of the standard library, where the objects are that users keep their own values in
_LIBRARIES = frozenset({"torch", *sys.stdlib_module_names})
_NOTHING = object()


@dataclass(slots=True)
class _Met:
    """What a name, and the steps that code takes from there, stood for when the forward began."""

    names: Mapping[str, Any]
    steps: tuple[Step, ...]
    before: Any
    module: str | None  # of Python's, whose globals they are, where a guard can name it
    where: str

    def __str__(self) -> str:
        return f"{self.steps[0].key}{''.join(map(str, self.steps[1:]))}"


class _Object:
    """An object, compared by identity, and what it holds, compared by value."""

    def __init__(self, value: Any, contents: Any = None) -> None:
        self.value, self.contents = value, contents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and other.value is self.value and other.contents == self.contents

    __hash__ = None  # type: ignore[assignment]


class GlobalReads:
    """What one recorder's forward may read or change outside of modules."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._codes: set[CodeType] = set()
        self._met: dict[tuple[int, str], _Met] = {}
        self._memos: list[Any] = []

    def begin(self, forward: Any) -> None:
        """Keep what the names in the forward's code, and in the functions that it leads to, stand for."""
        self.follow(forward, type(self._recorder.module))

    def finish(self) -> None:
        """The forward is through: what it changed costs the graph; what it took for a constant becomes a guard."""
        for met in self._met.values():
            now = _value(met.names, met.steps)
            if _described(now) != met.before:
                self._recorder.fail(f"changes {met}, which is outside of the model")
            elif met.module is not None:
                for condition in _conditions(f"{_alias(met.module)}.{met}", now):
                    self._recorder.guards.setdefault(condition, Guard(condition, met.where, (met.module,)))

    def source_of(self, tensor: Tensor) -> Any:
        """What gives a tensor that no module holds, as a function of a graph: a global, or a constant, which a variable
        around the forward is, and what a function with `functools.lru_cache` has returned; None for others.
        """
        for met in self._met.values():
            if met.before == _Object(tensor):
                if met.module is None:
                    return Constant(tensor)
                return Global((met.module, (Step(True, met.steps[0].key), *met.steps[1:])))
        return Constant(tensor) if any(_remembers(memo, tensor) for memo in self._memos) else None

    def follow(self, value: Any, kind: type) -> None:
        """The same for what is about to be called; `kind`, whose methods its code may call."""
        for layer in _layers(value):
            if isinstance(layer, functools._lru_cache_wrapper):
                self._memos.append(layer)
            if isinstance(layer, FunctionType) and layer.__code__ not in self._codes:
                cells = dict(zip(layer.__code__.co_freevars, layer.__closure__ or (), strict=True))
                self._visit(layer.__code__, layer.__globals__, cells, kind)

    def _visit(self, code: CodeType, names: dict[str, Any], cells: dict[str, CellType], kind: type) -> None:
        if len(self._codes) >= _MOST_FUNCTIONS or not _by_user(code.co_filename):
            return
        self._codes.add(code)
        for name in names_outside(code):
            if not name.enclosed or name.name in cells:
                self._keep(name, cells if name.enclosed else names, code, kind)
        for attribute in attributes_named(code):
            for base in kind.__mro__:
                self.follow(base.__dict__.get(attribute), kind)

    def _keep(self, name: Name, names: dict[str, Any], code: CodeType, kind: type) -> None:
        if not name.enclosed and name.name not in names and hasattr(builtins, name.name):
            return
        steps = [Step(False, name.name)]
        value = _value(names, steps)
        for step in name.steps:
            part = _part(value, step)
            if part is _NOTHING:  # a method, or not there: all of the object may matter
                self.follow(inspect.getattr_static(value, str(step.key), None), kind)
                break
            value = part
            steps.append(step)
        self.follow(value, kind)
        if not isinstance(value, ModuleType):
            where = f"{code.co_filename}:{code.co_firstlineno}"
            met = _Met(names, tuple(steps), _described(value), None if name.enclosed else _module_of(names), where)
            self._met.setdefault((id(names), str(met)), met)


def modules_named(guards: tuple[Guard, ...]) -> dict[str, ModuleType]:
    """Python's modules whose globals guards ask for, by the names that they have there."""
    return {_alias(name): importlib.import_module(name) for guard in guards for name in guard.modules}


def _alias(module: str) -> str:
    return f"__{module.replace('.', '__')}"  # the name of no argument


def _module_of(names: Mapping[str, Any]) -> str | None:
    """The name of the module of Python's that has these globals."""
    name = names.get("__name__")
    return name if isinstance(name, str) and getattr(sys.modules.get(name), "__dict__", None) is names else None


def _layers(value: Any) -> Iterator[Any]:
    """What a value that can be called calls in turn, down to a function in Python."""
    while value is not None:
        yield value
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, (MethodType, staticmethod, classmethod)):
            value = value.__func__
        else:
            value = value.__wrapped__ if isinstance(value, functools._lru_cache_wrapper) else None


def _remembers(memo: Any, tensor: Tensor) -> bool:
    """Whether a function with `functools.lru_cache` has returned a tensor, by itself or among others."""
    held = gc.get_referents(memo)
    for _ in range(2):
        held += [item for value in held if isinstance(value, CONTAINERS) for item in _items(value)]
    return any(item is tensor for item in held)


def _items(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value)


def _by_user(file: str) -> bool:
    """Whether code is neither ours nor torch's nor the standard library's."""
    return not file.startswith((HERE, TORCH, "<frozen")) and (not file.startswith(_LIBRARY) or "-packages" in file)


def _value(names: Mapping[str, Any], steps: Any) -> Any:
    """What a name and the steps after it stand for now."""
    try:
        value = names.get(steps[0].key, _NOTHING)
        value = value.cell_contents if isinstance(value, CellType) else value
        for step in steps[1:]:
            value = step.get(value)
        return value
    except (AttributeError, LookupError, TypeError, ValueError):
        return _NOTHING


def _part(value: Any, step: Step) -> Any:
    """A part of an object that users keep values in; no method, and no property, whose code would run."""
    if not step.attribute:
        holds = isinstance(value, (dict, list, tuple)) and is_constant(step.key)
        return _value({"": value}, (Step(False, ""), step)) if holds else _NOTHING
    if isinstance(value, ModuleType):
        return vars(value).get(step.key, _NOTHING) if _by_user(getattr(value, "__file__", None) or HERE) else _NOTHING
    if not isinstance(value, type) and not _is_object(value):
        return _NOTHING
    part = inspect.getattr_static(value, step.key, _NOTHING)
    return _NOTHING if hasattr(part, "__get__") else part


def _is_object(value: Any) -> bool:
    """Whether a value is a plain object of a user's; a class of the standard library or torch has its own affairs."""
    if isinstance(value, (*CONSTANTS, *CONTAINERS, Tensor, nn.Module, type)) or callable(value):
        return False
    home = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and (home in _OF_USERS or home not in _LIBRARIES)


def _described(value: Any, depth: int = 0) -> Any:
    """What can be compared later to tell whether a value, or what it holds, has changed."""
    if isinstance(value, CONSTANTS):
        return type(value), value
    if isinstance(value, CONTAINERS):
        if len(value) > LARGEST or depth >= DEEPEST:
            return _Object(value, len(value))
        items = [part for item in value.items() for part in item] if isinstance(value, dict) else list(value)
        return _Object(value, [_described(item, depth + 1) for item in items])
    if _is_object(value) and depth < DEEPEST:
        return _Object(value, {name: _described(item, depth + 1) for name, item in vars(value).items()})
    return _Object(value)


def _conditions(text: str, value: Any, depth: int = 0) -> Iterator[str]:
    """What has to hold of an expression for a graph that took its value for a constant."""
    if value is None:
        yield f"{text} is None"
    elif isinstance(value, Tensor):
        yield f"isinstance({text}, torch.Tensor)"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"str({text}) == {str(value)!r}"
    elif type(value) in (bool, int, float):
        yield f"type({text}) is {type(value).__name__} and {text} == {value!r}"
    elif _printable(value):
        yield f"{text} == {value!r}"
    elif isinstance(value, CONTAINERS):
        if any(isinstance(item, Tensor) for item in _items(value)):
            yield f"len({text}) == {len(value)}"  # of registries, which grow as code is imported, nothing is taken
    elif _is_object(value) and depth < DEEPEST:
        for name, item in vars(value).items():
            if name.isidentifier():
                yield from _conditions(f"{text}.{name}", item, depth + 1)


def _printable(value: Any) -> bool:
    """Whether a constant is what its text says."""
    if isinstance(value, dict):
        value = [part for item in value.items() for part in item]
    elif isinstance(value, CONTAINERS):
        value = list(value)
    if isinstance(value, list):
        return len(value) <= LARGEST and all(map(_printable, value))
    kinds = (bool, int, float, complex, str, bytes, type(None), range, torch.dtype, torch.device)
    return type(value) in kinds and value == value and "inf" not in repr(value)
