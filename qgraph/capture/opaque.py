"""Run a forward as the Python it is, with the same quantizers at the same sites: for what no graph can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from qgraph.capture import calls
from qgraph.capture.operands import OperandTracker
from qgraph.capture.state import ModuleState


class SiteMode(TorchFunctionMode):
    """Quantizes the operands of every site that one forward's own code meets; children see to themselves."""

    def __init__(self, module: nn.Module, state: ModuleState) -> None:
        super().__init__()
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


def run_opaque(
    module: nn.Module,
    state: ModuleState,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The module's own forward under a `SiteMode`."""
    mode = SiteMode(module, state)
    for name, value in (*zip(state.names(args, {}), args, strict=True), *kwargs.items()):
        mode.operands.enter(name, value)
    Running.count += 1
    try:
        with mode:
            return forward(module, *args, **kwargs)
    finally:
        Running.count -= 1
