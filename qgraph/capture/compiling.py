"""torch.compile and a forward that stays Python: it is one graph break, and the children that it calls are compiled.

Left to itself the compiler would take up every frame of that Python, and of our own at work around it, and break each.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    get_eval_frame_callback,
    set_code_exec_strategy,
    set_eval_frame,
)

if TYPE_CHECKING:
    from qgraph.capture.state import ModuleState

_SKIPPED = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT)
_SKIPPED_WITH_ALL_BELOW = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
installed: set[CodeType] = set()  # of the forwards of captured classes
_entries: weakref.WeakKeyDictionary[ModuleState, Callable[..., Any]] = weakref.WeakKeyDictionary()


def under_compiler() -> bool:
    """Whether torch.compile is at work on this call: traces it, or takes up frames around and below it."""
    return torch.compiler.is_compiling() or get_eval_frame_callback() is not None


def _outside(body: Callable[..., Any], *args: Any, children: bool) -> Any:
    compiler = set_eval_frame(None)
    try:
        return body(*args, compiler if children else None)
    finally:
        set_eval_frame(compiler)


# The public torch.compiler.disable imports the compiler at once, seconds of work that most imports of us never need.
outside_graphs = torch._compile._disable_dynamo(_outside, recursive=False)


def _beside(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


# A captured graph that is not to be compiled; its children are, each by itself.
beside_graphs = torch._compile._disable_dynamo(_beside, recursive=False)


def run_child(run: Callable[..., Any], state: ModuleState, compiler: Any, args: tuple[Any, ...]) -> Any:
    """`run(*args)`, the call of a child: compiled, if the Python around it was met by a compiler."""
    # A checkpoint compares what is saved with what its second run saves, and that one is not compiled.
    if compiler is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return run(*args)
    if state not in _entries:
        _entries[state] = _own_code(run, f"{state.path}.forward")
    set_eval_frame(compiler)
    try:
        return _entries[state](*args)
    finally:
        set_eval_frame(None)


def _own_code(function: Any, name: str) -> Callable[..., Any]:
    """A copy of a function with code of its own, by which the compiler counts the versions that it makes; by the name
    it remembers sizes that varied.
    """
    own = FunctionType(function.__code__.replace(co_name=name), function.__globals__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def left_to_python(function: Any) -> Any:
    """A function whose own frame is not compiled, nor those of comprehensions in it; those of what it calls are."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        set_code_exec_strategy(code, _SKIPPED)
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return function


def leave_alone(*modules: ModuleType) -> None:
    """Have no frame of these modules compiled by itself, where one around it was broken; inside others they are."""
    for module in modules:
        for value in vars(module).values():
            for function in vars(value).values() if isinstance(value, type) else (value,):
                if isinstance(function, FunctionType) and function.__code__.co_filename == module.__file__:
                    left_to_python(function)


def leave_alone_with_all_below(*functions: Callable[..., Any]) -> None:
    """The same for these and all that they call: quantizers, and their backward where autograd calls it by itself."""
    for function in functions:
        set_code_exec_strategy(function.__code__, _SKIPPED_WITH_ALL_BELOW)


def entry(cls: Any, forward: Any) -> Callable[..., Any]:
    """The installed forward of a class, with code of its own: by code the compiler counts the versions that it makes,
    by file, line and name it remembers which sizes varied.

    That of a class of torch's stands in torch's file, so that the compiler takes it up within its caller alone, as it
    does torch's. Of the recurrent ones, which it refuses, it takes up none.
    """
    code = forward.__code__.replace(co_name=f"{cls.__qualname__}.forward")
    if is_torchs(cls):
        written = inspect.unwrap(cls.forward).__code__
        place = {"co_filename": written.co_filename, "co_firstlineno": written.co_firstlineno}
        code = code.replace(co_name=written.co_name, **place)
    forward.__code__ = code
    installed.add(code)
    return torch._compile._disable_dynamo(forward) if issubclass(cls, nn.RNNBase) else forward


def is_torchs(cls: type) -> bool:
    """Whether a class is one of torch's own layers and containers."""
    return cls.__module__.startswith("torch.nn.modules.")
