"""Run a forward as the Python it is, with the same quantizers at the same sites: for what no graph can hold.

Parts that are checkpointed run again in backward, when the forward's mode is over: they bring a mode of their own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from qgraph.capture import calls
from qgraph.capture.checkpointing import repeatable
from qgraph.capture.operands import OperandTracker
from qgraph.capture.patches import branching
from qgraph.capture.state import ModuleState


class SiteMode(TorchFunctionMode):
    """Quantizes the operands of every site that one forward's own code meets; children see to themselves."""

    def __init__(self, module: nn.Module, state: ModuleState, compiler: Any = None) -> None:
        super().__init__()
        self.module, self.state = module, state
        self.compiler = compiler  # what torch.compile had at work on the frames around, and has on those of children
        self.operands = OperandTracker(module, state)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in calls.TRANSPARENT:
            with self:
                return calls.see_through(func)(*args, **kwargs)
        name = calls.name_of(func)
        run_args, run_kwargs = self.operands.at(name, args, kwargs, quantize=True)
        result = func(*run_args, **run_kwargs)
        self.operands.follow(args, kwargs, result, name)
        return result


class Running:
    """How many forwards run under a `SiteMode`, over all threads: their children have to step out of it."""

    count = 0
    _lock = threading.Lock()

    @classmethod
    def add(cls, change: int) -> None:
        if torch.compiler.is_compiling():  # which knows no locks
            cls.count += change
            return
        with cls._lock:
            cls.count += change


def run_opaque(
    module: nn.Module,
    state: ModuleState,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    compiler: Any = None,
    keep: bool = False,
) -> Any:
    """The module's own forward, or another method, under a `SiteMode`; `keep`: note the sites that it meets."""
    mode = SiteMode(module, state, compiler)
    for name, value in (*zip(state.names(args, {}), args, strict=True), *kwargs.items()):
        mode.operands.enter(name, value)
    result = _run_under(mode, forward, (module, *args), kwargs)
    if keep:
        state.keep_sites(mode.operands.sites)
    return result


def _run_under(mode: SiteMode, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    Running.add(1)
    try:
        with repeatable(quantized_again), branching(), mode:
            return function(*args, **kwargs)
    finally:
        Running.add(-1)


def quantized_again(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """`function`, which the running forward is about to checkpoint, such that backward meets the same quantizers."""
    mode = running_mode()
    if mode is None:
        return function
    module, state, known = mode.module, mode.state, mode.operands.handed_on(args)
    alive = weakref.ref(mode)  # it knows every tensor of the forward, and backward must not keep those

    def run(*args: Any, **kwargs: Any) -> Any:
        if (now := running_mode()) is not None and now is alive():
            return function(*args, **kwargs)
        again = SiteMode(module, state)
        again.operands.take_over(known, args)
        return _run_under(again, function, args, kwargs)

    return run


def running_mode() -> Any:
    """The mode, a `SiteMode` or a recorder, whose forward's own code is running, or None."""
    modes = [m for m in _get_current_function_mode_stack() if isinstance(getattr(m, "operands", None), OperandTracker)]
    return modes[-1] if modes else None
