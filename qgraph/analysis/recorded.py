"""What every module of a model computes in one run: by hooks, which are removed again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qgraph.errors import InspectError
from qgraph.graph import config_of, unwrapped

SEQUENTIAL = ("LSTM", "GRU", "RNN", "MultiheadAttention")  # what else they return says nothing more


@dataclass(slots=True)
class Recorded:
    """The outputs of one run by module path; `order` has path and number of each call in the order of execution.

    `calls`: for each call of the module the tensors that it returns; of a file those that may be among them, the
    likeliest first. `kinds`: the class of each module, of those too that did not run. `idle`: modules that
    gave back what they were given, as a dropout does in eval. `several`: those that return more than one tensor.
    """

    title: str
    calls: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    order: list[tuple[str, int]] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)
    several: set[str] = field(default_factory=set)
    is_file: bool = False

    def add(self, path: str, candidates: list[Tensor]) -> None:
        """Keep one more call of a module."""
        calls = self.calls.setdefault(path, [])
        self.order.append((path, len(calls)))
        calls.append(candidates)


def record_module(name: str, model: nn.Module, inputs: Any) -> Recorded:
    """Run a model in eval mode without gradients and keep the floating tensors of each module's output.

    Raises
    ------
    InspectError
        When the model does not run on the inputs.
    """
    from qgraph.exporters.signature import flat_model, flatten_inputs

    model = unwrapped(model)
    found = Recorded(title_of(model))
    modes = {module: module.training for module in model.modules()}
    handles = []
    try:
        flat = flat_model(model, flatten_inputs(model, inputs, None))
        for path, module in model.named_modules():
            if "qgraph" not in path.split("."):
                found.kinds[path] = type(module).__name__
                handles.append(module.register_forward_hook(_Keep(path, found)))
        model.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            flat.call([tensor.clone() for tensor in flat.inputs.tensors])
    except Exception as error:
        raise InspectError(
            f"compare: {name} ({found.title}) does not run on the inputs: {type(error).__name__}: {error}. "
            f"Pass inputs that both accept."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return found


class _Keep:
    """Forward hook: copies, since a later operation may write into the output."""

    def __init__(self, path: str, found: Recorded) -> None:
        self.path, self.found = path, found

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        from qgraph.exporters.signature import flatten_outputs

        floats = [t for t in flatten_outputs(output, set())[0] if t.is_floating_point()]
        if floats:
            if args and floats[0] is args[0]:
                self.found.idle.add(self.path)
            if floats[1:]:
                self.found.several.add(self.path)
            kept = floats[:1] if self.found.kinds[self.path] in SEQUENTIAL else floats
            self.found.add(self.path, [tensor.detach().to("cpu", copy=True) for tensor in kept])


def parents(path: str) -> list[str]:
    """The modules around one, the model itself ("") last."""
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in reversed(range(len(parts)))]


def title_of(model: nn.Module) -> str:
    """The class of a model, and the config it is prepared with."""
    config = config_of(model)
    name = type(model).__name__
    return name if config is None else f"{name} at {config}"
