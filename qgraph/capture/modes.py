"""Modes of torch that a forward enters and leaves: gradients off, autocast. A graph enters and leaves them likewise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

if TYPE_CHECKING:
    from qgraph.capture.recorder import Recorder


class Modes:
    """Writes the modes of one recorder's forward."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._grad_modes: list[fx.Node] = []
        self._autocasts: dict[int, fx.Node] = {}

    def set_grad_enabled(self, value: bool) -> None:
        """The forward switches gradients on or off; leaving a block puts back what the graph found."""
        if not self._recorder.recording or value == torch.is_grad_enabled():
            if self._recorder.recording and not value:
                self._grad_modes.append(self._recorder.graph.call_function(torch.is_grad_enabled))
                self._recorder.graph.call_function(torch._C._set_grad_enabled, (False,))
            return
        if value and self._grad_modes:
            self._recorder.graph.call_function(torch._C._set_grad_enabled, (self._grad_modes.pop(),))
            return
        self._grad_modes.append(self._recorder.graph.call_function(torch.is_grad_enabled))
        self._recorder.graph.call_function(torch._C._set_grad_enabled, (value,))

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
