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
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qgraph.capture.bytecode import Name, attributes_named, names_outside
from qgraph.capture.calls import Constant, Global
from qgraph.capture.contents import (
    CONTAINERS,
    NOTHING,
    RANDOM,
    Same,
    by_user,
    conditions,
    contents,
    is_constant,
    part_of,
    value_at,
)
from qgraph.capture.effects import forget_traced, holds_traced
from qgraph.capture.guards import Guard
from qgraph.capture.memos import Memos
from qgraph.capture.structure import Step
from qgraph.capture.values import plain
from qgraph.graph import OWN_FORWARD

if TYPE_CHECKING:
    from qgraph.capture.recorder import Recorder

_MOST_FUNCTIONS = 64  # that a forward's code leads to
_WRAPPERS = (FunctionType, functools._lru_cache_wrapper)
_CHANGING = (Iterator, set, deque, np.ndarray, *RANDOM)  # what may change without any attribute being set
_MODES: dict[Any, tuple[tuple[str, ...], ...]] = {  # what code may ask torch, with which arguments
    torch.is_grad_enabled: ((),),
    torch.is_inference_mode_enabled: ((),),
    torch.is_autocast_enabled: (("cpu",), ("cuda",)),
    torch.get_autocast_dtype: (("cpu",), ("cuda",)),
    torch.get_default_dtype: ((),),
}


@dataclass(slots=True)
class _Met:
    """What a name, and the steps that code takes from there, stood for when the forward began.

    `text`: for people; `guarded`: as a guard names it, None where it cannot; `modules`: of Python's, that it asks.
    """

    names: Mapping[str, Any]
    steps: tuple[Step, ...]
    before: Any
    text: str
    guarded: str | None = None
    modules: tuple[str, ...] = ()
    where: str = ""

    def forget_traced(self, now: Any) -> None:
        """Leave plain numbers in what stands there now."""
        last, holders = self.steps[-1], self.steps[:-1]
        cell = self.names.get(last.key)
        if not holds_traced(now):
            forget_traced(now)
        elif isinstance(cell, CellType) and not holders:
            cell.cell_contents = plain(now)
        else:
            last.put(value_at(self.names, holders) if holders else self.names, plain(now))


class GlobalReads:
    """What one recorder's forward may read or change outside of modules."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._codes: set[CodeType] = set()
        self.named: set[str] = set()  # attributes, in that code
        self._met: dict[tuple[int, str], _Met] = {}
        self._memos: list[Any] = []
        self.memos = Memos()
        self.changed = False  # by the forward, perhaps once and for all: a table that its first call fills

    def begin(self, forward: Any) -> None:
        """Keep what the names in the forward's code, and in the functions that it leads to, stand for."""
        module = self._recorder.module
        self.follow(vars(module).get(OWN_FORWARD, forward), type(module))

    def finish(self) -> None:
        """The forward is through: what it changed costs the graph; what it took for a constant becomes a guard."""
        for met in self._met.values():
            now = value_at(met.names, met.steps)
            if contents(now) != met.before:
                met.forget_traced(now)
                self.changed |= self._recorder.recording
                self._recorder.fail(f"changes {met.text}")
            elif met.guarded is not None:
                for condition in conditions(met.guarded, now):
                    self._guard(condition, met.where, met.modules)

    def watch(self, own: dict[str, Any], name: str) -> None:
        """An attribute of a module that the forward reads: it may hold what changes without being set."""
        if isinstance(own[name], _CHANGING):
            self._keep(_Met(own, (Step(False, name),), contents(own[name]), f"self.{name} in forward"))

    def source_of(self, tensor: Tensor) -> Any:
        """What gives a tensor that no module holds, as a function of a graph: a global, or a constant, which a variable
        around the forward is, and what a function with `functools.lru_cache` has returned; None for others.
        """
        for met in self._met.values():
            if met.before == Same(tensor):
                if not met.modules:
                    return Constant(tensor)
                return Global((met.modules[0], (Step(True, met.steps[0].key), *met.steps[1:])))
        return Constant(tensor) if any(_remembers(memo, tensor) for memo in self._memos) else None

    def follow(self, value: Any, kind: type) -> None:
        """The same as `begin` for what is about to be called; `kind`, whose methods its code may call."""
        for layer in _layers(value):
            if isinstance(layer, functools._lru_cache_wrapper):
                self._memos.append(layer)
            if isinstance(layer, FunctionType) and layer.__code__ not in self._codes:
                self._visit(layer, kind)

    def _visit(self, function: FunctionType, kind: type) -> None:
        code = function.__code__
        if len(self._codes) >= _MOST_FUNCTIONS or not by_user(code.co_filename):
            return
        self._codes.add(code)
        where = f"{code.co_filename}:{code.co_firstlineno}"
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        for name in names_outside(code):
            if not name.enclosed:
                self._global(name, function.__globals__, where, kind)
            elif name.name in cells:
                self._outside(name, cells, where, kind)
        self.named |= attributes_named(code)
        for attribute in attributes_named(code):
            for base in kind.__mro__:
                self.memos.add(base, attribute, base.__dict__.get(attribute))
                self.follow(base.__dict__.get(attribute), kind)
            self._of_class(attribute, where, kind)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if isinstance(value, CONTAINERS):
                text = "the default of an argument"
                self._keep(_Met({text: value}, (Step(False, text),), contents(value), text))

    def _global(self, name: Name, names: dict[str, Any], where: str, kind: type) -> None:
        if name.name not in names and hasattr(builtins, name.name):
            return
        function = _of_torch(names, name)
        for arguments in _MODES.get(function, ()):
            asked = f"torch.{function.__name__}({', '.join(map(repr, arguments))})"
            for condition in conditions(asked, function(*arguments)):
                self._guard(condition, where)
        self._outside(name, names, where, kind)

    def _outside(self, name: Name, names: Mapping[str, Any], where: str, kind: type) -> None:
        steps: tuple[Step, ...] = (Step(False, name.name),)
        value = value_at(names, steps)
        self.memos.add(names, name.name, value)
        for step in name.steps:
            part = part_of(value, step)
            if isinstance(value, ModuleType):
                self.memos.add(vars(value), str(step.key), part)
            if part is NOTHING:  # a method, or not there: all of the object may matter
                self.follow(inspect.getattr_static(value, str(step.key), None), kind)
                break
            value, steps = part, (*steps, step)
        self.follow(value, kind)
        if isinstance(value, ModuleType):
            return
        text = f"{name.name}{''.join(map(str, steps[1:]))}"
        home = None if name.enclosed else _home(names)
        guarded = None if home is None else f"{_alias(home)}.{text}"
        modules = () if home is None else (home,)
        text += ", which is outside of the model"
        self._keep(_Met(names, steps, contents(value), text, guarded, modules, where))

    def _of_class(self, name: str, where: str, kind: type) -> None:
        """A constant of the module's class, which code may read by its type."""
        value = inspect.getattr_static(kind, name, NOTHING)
        if is_constant(value) and not hasattr(nn.Module, name):
            steps = (Step(False, "class"), Step(True, name))
            text = f"{name} of the class"
            self._keep(_Met({"class": kind}, steps, contents(value), text, f"type(self).{name}", (), where))

    def _keep(self, met: _Met) -> None:
        self._met.setdefault((id(met.names), met.text), met)

    def _guard(self, condition: str, where: str, modules: tuple[str, ...] = ()) -> None:
        self._recorder.guards.setdefault(condition, Guard(condition, where, modules))


def modules_named(guards: tuple[Guard, ...]) -> dict[str, ModuleType]:
    """Python's modules whose globals guards ask for, by the names that they have there."""
    return {_alias(name): importlib.import_module(name) for guard in guards for name in guard.modules}


def _alias(module: str) -> str:
    return f"__{module.replace('.', '__')}"  # the name of no argument


def _home(names: Mapping[str, Any]) -> str | None:
    """The name of the module of Python's that has these globals."""
    name = names.get("__name__")
    return name if isinstance(name, str) and getattr(sys.modules.get(name), "__dict__", None) is names else None


def _of_torch(names: dict[str, Any], name: Name) -> Any:
    """The function of torch that a name and the steps after it lead to, if they do."""
    value = names.get(name.name)
    for step in name.steps:
        if not isinstance(value, ModuleType) or value.__name__.partition(".")[0] != "torch":
            break
        value = getattr(value, step.key, None)
    return value if inspect.isbuiltin(value) or isinstance(value, FunctionType) else None


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
            value = vars(value).get("__wrapped__") if isinstance(value, _WRAPPERS) else None


def _remembers(memo: Any, tensor: Tensor) -> bool:
    """Whether a function with `functools.lru_cache` has returned a tensor, by itself or among others."""
    held = gc.get_referents(memo)
    for _ in range(2):
        inner = [value for value in held if isinstance(value, CONTAINERS)]
        held += [item for value in inner for item in (value.values() if isinstance(value, dict) else value)]
    return any(item is tensor for item in held)
