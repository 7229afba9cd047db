"""Weights that a forward computes: from parameters alone, or, as hypernetworks do, from the model's inputs.

The first deploy as any other weight, and what computes them is not in the file. The second are another weight for each
input: they are quantized in the file as they come, as activations are, a row an output channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from qgraph.errors import ExportError
from qgraph.modules import ActivationQuantizer, Sparsifier, WeightQuantizer
from qgraph.ops import Groups

# What these return depends on the sizes of their input, not on its values.
_BY_SIZE = frozenset({
    "sym_size", "sym_numel", "sym_stride", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros",
    "new_ones", "new_full", "new_empty", "new_empty_strided",
})  # fmt: skip


class FromInputs(Exception):
    """The weights of these `names` (of `Collected.calls`) are computed from the model's inputs."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(", ".join(sorted(names)))
        self.names = names

    def sites(self, calls: Mapping[str, Sequence[str]]) -> list[str]:
        """The sites of these weights.

        Raises
        ------
        ExportError
            For one that other calls use with weights of the model's own: it has one quantizer for both.
        """
        found = sorted(site for site, names in calls.items() if not self.names.isdisjoint(names))
        for site in found:
            if not self.names.issuperset(calls[site]):
                raise ExportError(
                    f"export: {site} is called with weights that are computed from the model's inputs, and with others "
                    "that are not; expected one or the other: use a second layer for the computed ones"
                )
        return found


def names_from_inputs(program: ExportedProgram) -> set[str]:
    """The weights of a traced program, by name, that depend on values of its inputs."""
    given, reached = set(program.graph_signature.user_inputs), set[fx.Node]()
    for node in program.graph.nodes:
        own = node.op == "placeholder" and node.name in given
        if own or (not reached.isdisjoint(node.all_input_nodes) and _name(node) not in _BY_SIZE):
            reached.add(node)
    return {str(node.args[1]) for node, weight in _weights(program) if weight in reached}


def forget_computation(program: ExportedProgram) -> None:
    """Take what computes weights from parameters out of a program: only their sites are read, and ONNX may lack it."""
    graph = program.graph
    for node, computed in _weights(program):
        if computed.op == "call_function" and all(isinstance(size, int) for size in computed.meta["val"].shape):
            with graph.inserting_before(node):
                value = computed.meta["val"]
                empty = graph.call_function(torch.ops.aten.zeros.default, (list(value.shape),), {"dtype": value.dtype})
                empty.meta["val"] = value
            node.replace_input_with(computed, empty)
            _erase_unused(graph, computed)


def quantize_as_they_come(model: nn.Module, sites: Sequence[str]) -> None:
    """Let a working copy quantize the weights of these sites as activations.

    Raises
    ------
    ExportError
        For one that is pruned, or whose step is learned for each channel.
    """
    for holder in list(model.modules()):
        for name, module in list(holder._modules.items()):
            if not isinstance(module, WeightQuantizer | Sparsifier) or module.site not in sites:
                continue
            if isinstance(module, Sparsifier) or module.spec.learns or f"{name}__sparsifier" in holder._modules:
                raise ExportError(
                    f"export: {module.site} is computed from the model's inputs, another weight for each, and is "
                    "pruned or has learned steps; expected one that is quantized by its own values (ddt, ste): leave "
                    "it out with a rule, or compute it from parameters alone"
                )
            holder._modules[name] = _ByRows(module)


class _ByRows(nn.Module):
    """A weight quantizer as an activation quantizer over the rows of its groups."""

    enabled = True

    def __init__(self, quantizer: WeightQuantizer) -> None:
        super().__init__()
        self.groups = quantizer.groups
        rows = Groups("tensor") if self.groups.kind == "tensor" else Groups("token", 0, self.groups.block)
        self.by_rows = ActivationQuantizer(quantizer.spec, rows, quantizer.site)

    def forward(self, weight: Tensor, dense: Tensor | None = None) -> Tensor:
        if self.groups.kind != "channel" or weight.dim() < 2:
            return self.by_rows(weight)
        first = weight.movedim(self.groups.axis, 0)
        return self.by_rows(first.flatten(1)).reshape(first.shape).movedim(0, self.groups.axis)


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase an operator without users, and those that it alone used; not what opens or closes a vmap."""
    if node.users or not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        _erase_unused(graph, each)


def _weights(program: ExportedProgram) -> list[tuple[fx.Node, fx.Node]]:
    """The stand-ins of quantized weights, each with the node of its float weight."""
    found = [node for node in program.graph.nodes if node.target is torch.ops.qgraph.weight.default]
    return [(node, node.all_input_nodes[0]) for node in found]


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if isinstance(node.target, torch._ops.OpOverload) else str(node.target)
