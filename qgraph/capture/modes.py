"""Modes of torch that a forward enters and leaves: gradients off, autocast. A graph enters and leaves them likewise."""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.autograd import grad_mode

if TYPE_CHECKING:
    from qgraph.capture.recorder import Recorder


class Modes:
    """Writes the modes of one recorder's forward."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._grad_modes: dict[int, tuple[Any, fx.Node]] = {}  # blocks entered (held, so that no id comes twice)
        self._autocasts: dict[int, fx.Node] = {}

    def set_grad_enabled(self, value: bool) -> None:
        """The forward switches gradients on or off; leaving a block puts back what the graph found on entering it."""
        if not self._recorder.recording:
            return
        graph, (context, step) = self._recorder.graph, _grad_context()
        found = self._grad_modes.get(id(context))
        if step in ("__init__", "__enter__") and found is None:
            self._grad_modes[id(context)] = (context, graph.call_function(torch.is_grad_enabled))
        elif step in ("__exit__", "__call__") and found is not None:
            graph.call_function(torch._C._set_grad_enabled, (found[1],))
            del self._grad_modes[id(context)]
            return
        graph.call_function(torch._C._set_grad_enabled, (value,))

    @property
    def left_switched(self) -> bool:
        """Whether gradients were switched outside of any block, for good or back by a value read."""
        return bool(self._grad_modes)

    def enter_autocast(self, context: torch.autocast) -> None:
        """The forward enters an autocast block."""
        if self._recorder.recording:
            settings = (context.device, context.fast_dtype, context._enabled, context._cache_enabled)
            self._autocasts[id(context)] = self._recorder.graph.call_function(
                torch.amp.autocast_mode._enter_autocast, settings
            )

    def leave_autocast(self, context: torch.autocast) -> None:
        """The forward leaves it."""
        entered = self._autocasts.pop(id(context), None)
        if self._recorder.recording and entered is not None:
            self._recorder.graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))


def _grad_context() -> tuple[Any, str]:
    """The block (no_grad, enable_grad, set_grad_enabled) that switches gradients just now, and its method that does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != grad_mode.__file__:
        frame = frame.f_back
    while frame is not None and frame.f_back is not None and frame.f_back.f_code.co_filename == grad_mode.__file__:
        frame = frame.f_back  # no_grad switches by a set_grad_enabled of its own
    return (None, "") if frame is None else (frame.f_locals.get("self"), frame.f_code.co_name)
