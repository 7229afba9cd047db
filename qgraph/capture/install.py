"""The installed forward: each captured module gets a subclass of its own class whose `forward` runs its graph.

The module object, its class by isinstance, its parameters, hooks and state_dict keys stay as they are.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import _pop_mode_temporarily

from qgraph.capture.guards import GuardMiss
from qgraph.capture.recorder import Recorder
from qgraph.capture.session import Session, active, capturing, current
from qgraph.capture.state import ModuleState, Snapshot, Variant, shapes
from qgraph.graph import STATE

_classes: dict[type, type] = {}


class _Running:
    """How many forwards run as Python under a recorder, outside of a capture (while torch compiles or exports)."""

    count = 0


_running = _Running()


class Captured:
    """Marks the installed subclasses."""


def install(module: nn.Module, state: ModuleState) -> None:
    """Give a module its captured class and state."""
    module.__dict__[STATE] = state
    module.__class__ = captured_class(type(module))


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    module.__dict__.pop(STATE, None)
    module.__class__ = base_class(type(module))


def base_class(cls: type) -> type:
    """The user's own class behind a captured one."""
    return cls.__mro__[1] if issubclass(cls, Captured) and Captured in cls.__bases__ else cls


def captured_class(cls: type) -> type:
    """The subclass of `cls` whose forward runs captured graphs; made once for each class."""
    found = _classes.get(cls)
    if found is None:
        found = _classes[cls] = _make_class(cls)
    return found


def _make_class(cls: Any) -> type:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return dispatch(self, cls.forward, args, kwargs)

    def named_children(self: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        # A forward that loops over its children must not meet the quantizers.
        return (item for item in cls.named_children(self) if item[0] != "qgraph")

    def reduce(self: nn.Module, protocol: int) -> Any:
        # The class is made at run time, so a pickle names the user's class.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _restore, (cls,), state

    namespace = {
        "forward": forward,
        "named_children": named_children,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls, Captured), namespace)


def _restore(cls: type) -> Any:
    return copyreg.__newobj__(captured_class(cls))  # type: ignore[attr-defined]


def dispatch(module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an installed forward: by a captured graph that holds for this call, else as recorded Python."""
    if active.count and not torch.compiler.is_compiling():
        session = current()
        if session is not None:
            return session.enter(module, forward, args, kwargs)
    if _running.count and torch._C._len_torch_function_stack() > 0:
        with _pop_mode_temporarily():
            return _run(module, forward, args, kwargs)
    return _run(module, forward, args, kwargs)


def _run(module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: ModuleState = module.__dict__[STATE]
    variant, values = state.select(module, args, kwargs)
    if variant is None:
        return run_python(module, state, forward, args, kwargs)
    if not variant.late_guards or torch.compiler.is_compiling():
        return variant.function()(module, *values)
    return _run_checked(module, state, variant, forward, values, args, kwargs)


def _run_checked(
    module: nn.Module, state: ModuleState, variant: Variant, forward: Any, values: Any, args: Any, kwargs: Any
) -> Any:
    """A graph with guards inside it: for sizes not met before, be ready to take back what ran before a miss."""
    key = shapes(values)
    if key in variant.validated:
        return variant.function()(module, *values)
    before = Snapshot(module)
    try:
        result = variant.function()(module, *values)
    except GuardMiss:
        before.restore()
        return run_python(module, state, forward, args, kwargs)
    variant.validated.add(key)
    return result


@torch.compiler.disable(recursive=False)
def run_python(module: nn.Module, state: ModuleState, forward: Any, args: Any, kwargs: Any) -> Any:
    """Run the module's own Python under the same quantizers, and capture this call for the next time."""
    if state.variants or state.opaque:
        state.misses += 1
    if torch.compiler.is_exporting():
        return _run_quantized(module, state, forward, args, kwargs)
    with capturing(quantize=True) as session:
        session._announced = module
        return session.enter(module, forward, args, kwargs)


def _run_quantized(module: nn.Module, state: ModuleState, forward: Any, args: Any, kwargs: Any) -> Any:
    """Only quantize: inside torch.export no graph of ours can be recorded, since the tensors are not real."""
    recorder = Recorder(module, state, quantize=True, reason="exported")
    names = list(state.names(args, dict(sorted(kwargs.items()))))
    _running.count += 1
    try:
        return recorder.run(forward, names, args, {name: kwargs[name] for name in sorted(kwargs)})
    finally:
        _running.count -= 1


__all__ = [
    "Captured",
    "Session",
    "base_class",
    "captured_class",
    "dispatch",
    "install",
    "run_python",
    "uninstall",
]
