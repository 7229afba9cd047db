"""Methods that are called beside the forward (`model.encode(x)`): what they multiply themselves is quantized as well.

Such a method runs as a forward that stays Python does. It is known by its code, which names a weight and a function of
the site table; within a forward, or under another such method, it is part of what calls it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

from qgraph.capture.bytecode import attributes_named, multiplies
from qgraph.capture.compiling import outside_graphs, under_compiler
from qgraph.capture.opaque import run_opaque, running_mode
from qgraph.capture.session import current
from qgraph.capture.state import ModuleState
from qgraph.errors import CaptureError
from qgraph.graph import STATE
from qgraph.sites import FUNCTIONS


def beside_forward(cls: type) -> dict[str, Callable[..., Any]]:
    """For each method of a user's class that may multiply by a weight: the same, run under the quantizers."""
    found = {}
    for name, method in _own_methods(cls).items():
        function = inspect.unwrap(method)
        if not isinstance(function, FunctionType) or inspect.isgeneratorfunction(function):
            continue
        named = attributes_named(function.__code__)
        if named & FUNCTIONS or multiplies(function.__code__):
            found[name] = _quantized(method, named.union(*(_names_of(cls, attribute) for attribute in named)))
    return found


def _own_methods(cls: type) -> dict[str, FunctionType]:
    methods: dict[str, FunctionType] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            methods |= {name: value for name, value in vars(base).items() if isinstance(value, FunctionType)}
    return {
        name: value for name, value in methods.items() if not name.startswith("__") and not hasattr(nn.Module, name)
    }


def _names_of(cls: type, attribute: str) -> frozenset[str]:
    """The attributes that a property or a method of the class names: it may give a weight."""
    value = inspect.getattr_static(cls, attribute, None)
    value = value.fget if isinstance(value, property) else value
    function = inspect.unwrap(value) if isinstance(value, FunctionType) else None
    return attributes_named(function.__code__) if isinstance(function, FunctionType) else frozenset()


def _quantized(original: Callable[..., Any], named: frozenset[str]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: ModuleState | None = self.__dict__.get(STATE)
        if state is not None and (gone := named & state.gone):
            raise CaptureError(
                f"{type(self).__name__}.{original.__name__} uses {', '.join(sorted(gone))}, which qgraph.freeze has "
                f"packed: a frozen model has its forward alone. Call the method on the model that was frozen."
            )
        if state is None or current() is not None or named.isdisjoint(_weights_below(self, state)):
            return original(self, *args, **kwargs)
        if under_compiler() and not torch.compiler.is_exporting():
            return outside_graphs(_run, self, state, original, args, kwargs, children=True)
        return _run(self, state, original, args, kwargs)

    return method


def _run(
    module: nn.Module, state: ModuleState, original: Any, args: tuple[Any, ...], kwargs: Any, compiler: Any = None
) -> Any:
    if running_mode() is not None:
        return original(module, *args, **kwargs)
    return run_opaque(module, state, original, args, kwargs, compiler, keep=not torch.compiler.is_exporting())


def _weights_below(module: nn.Module, state: ModuleState) -> frozenset[str]:
    """The last names of the matrices in a module."""
    if state.weights_below is None:
        state.weights_below = frozenset(_last_names(module))
    return state.weights_below


def _last_names(module: nn.Module) -> Iterator[str]:
    return (name.rpartition(".")[2] for name, parameter in module.named_parameters() if parameter.dim() > 1)
