"""What Python reads off a tensor while a forward is recorded: sizes come back traced, everything else is a guard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qgraph.capture.source import locate
from qgraph.capture.structure import Unsupported
from qgraph.capture.values import Leaf, plain, traced

if TYPE_CHECKING:
    from qgraph.capture.recorder import Recorder


class Reads:
    """Answers for one recorder what its forward asks of a tensor."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def attribute(self, tensor: Tensor, name: str, result: Any) -> Any:
        """A property of a tensor; returns what the forward's code shall see of it."""
        if name == "shape":
            return torch.Size([self._traced_size(tensor, i, v) for i, v in enumerate(result)])
        if name == "grad_fn":
            return result
        if isinstance(result, Tensor):
            node = self._recorder.graph.call_function(getattr, (self._recorder.values.node(tensor), name))
            node.meta["where"] = locate()[0]
            return self._recorder.values.result(node, result, (tensor,), {}, {}, False)
        self.read(tensor, name, None, result)
        return result

    def size(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """One of the functions that tell a tensor's size: traced."""
        tensor = args[0]
        if name == "size" and isinstance(result, tuple):
            return torch.Size([self._traced_size(tensor, i, v) for i, v in enumerate(result)])
        if name == "size":
            dim = plain(args[1] if len(args) > 1 else kwargs["dim"])
            return self._traced_size(tensor, dim % tensor.dim(), result)
        if name == "__len__":
            self.read(tensor, "size", 0, result)
            return result
        self._recorder.values.forbid_data_dependent(tensor)
        return traced(result, Leaf(self._recorder.values.node(tensor), "numel"), self._recorder)

    def _traced_size(self, tensor: Tensor, dim: int, value: int) -> Any:
        return (
            traced(value, Leaf(self._recorder.values.node(tensor), "size", dim), self._recorder)
            if self._recorder.recording
            else value
        )

    def read(self, tensor: Tensor, name: str, argument: Any, value: Any) -> None:
        """Python was told a property of a tensor: a guard."""
        if argument is not None and not isinstance(argument, int):
            raise Unsupported(f"reads {name} with {argument!r}")
        self._recorder.guard(Leaf(self._recorder.values.node(tensor), name, argument), value)
