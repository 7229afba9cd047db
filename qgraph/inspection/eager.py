"""Rows of a model that is not prepared: every parameter of two or more dimensions, all float."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qgraph.graph import Coverage
from qgraph.inspection.floats import float_parameters, is_bias, is_norm
from qgraph.inspection.layers import FloatTensor, Layer
from qgraph.inspection.prepared import standard_op

if TYPE_CHECKING:
    import networkx

REASON = "not prepared"


def eager_layers(model: nn.Module) -> tuple[list[Layer], list[FloatTensor]]:
    """The rows and the other parameters of an unprepared model; each parameter once, under its first name."""
    layers: list[Layer] = []
    first: dict[int, Layer] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or nn.parameter.is_lazy(parameter):
                continue
            stored = first.get(id(parameter))
            if stored is None and (is_norm(module) or is_bias(name) or parameter.dim() < 2):
                continue
            layer = _layer(path, f"{path}.{name}".lstrip("."), module, parameter, stored)
            first.setdefault(id(parameter), layer)
            layers.append(layer)
    covered = {layer.name for layer in layers} | {layer.site for layer in layers}
    unique = {name for name, _ in model.named_parameters()}
    floats = [item for item in float_parameters(model, covered) if item.name in unique]
    return layers, floats


def _layer(path: str, name: str, module: nn.Module, parameter: nn.Parameter, stored: Layer | None) -> Layer:
    size = parameter.numel() * parameter.element_size()
    return Layer(
        path=path,
        name=name if stored is None else stored.name,
        op=standard_op(module),
        shape=tuple(parameter.shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        spec="float",
        weight=None,
        activation=None,
        sparsity=None,
        groups="",
        bits_per_weight=8.0 * parameter.element_size(),
        bytes_before=size if stored is None else 0,
        bytes_after=size if stored is None else 0,
        reason=REASON,
        captured=False,
        tied_to=None if stored is None else stored.site,
    )


def eager_coverage(model: nn.Module, layers: list[Layer]) -> Coverage:
    """Nothing is captured of an unprepared model."""
    return Coverage(sum(1 for _ in model.modules()), 0, 0, (), len(layers), 0, 0)


def eager_network(model: nn.Module) -> networkx.DiGraph:
    """The modules of a model without graphs as nodes: those without children, and those with weights of their own."""
    import networkx

    network = networkx.DiGraph()
    for path, module in model.named_modules():
        parts = path.split(".")
        if "qgraph" in parts:
            continue
        children = [name for name, _ in module.named_children() if name != "qgraph"]
        scope = path if children else path.rpartition(".")[0]
        if children and not any(p is not None for p in module._parameters.values()):
            continue
        data = {"path": path, "scope": scope, "target": path, "where": "", "kind": type(module).__name__}
        network.add_node(f"{path}:", op="module", **data)
    return network
