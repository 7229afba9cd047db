"""Readable names in the file: nodes and tensors carry module paths, and the tracer's own annotations go.

Stack traces in node metadata would take more bytes than the codes of a small layer, and show paths of the
user's machine.
"""

from __future__ import annotations

import ast
import itertools
import re
import string
from collections.abc import Collection, Container, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

PREFIX = "model."  # the wrapper that flattens inputs and outputs holds the user's model under this name
SHARED = "qgraph."  # constants that several layers use: tables, shapes, axes
SCOPES = "pkg.torch.onnx.name_scopes"
_SLICE = re.compile(r"\.slice\((\S+), (\S+), (\S+)\)\.(\d+)")
_WINDOWS = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool")
_NEUTRAL = {"strides": 1, "dilations": 1, "pads": 0}  # of each axis, where a window's attribute is left out
_TOLD = {  # by the weight; momentum is how statistics are learned
    "Conv": ("kernel_shape",),
    "ConvTranspose": ("kernel_shape",),
    "BatchNormalization": ("momentum",),
}


def module_outputs(graph: ir.Graph, model: nn.Module) -> dict[str, ir.Value]:
    """Module path -> the value that the module's last node computes, for every module the graph shows."""
    found: dict[str, ir.Value] = {}
    for node in graph:
        for path in _scopes(node, model):
            found[path] = node.outputs[0]
    return found


def rename(graph: ir.Graph, model: nn.Module) -> None:
    """Name nodes ``<module path>/<operator>``, strip the wrapper's prefix from parameters, drop the
    annotations.
    """
    taken: set[str] = set()
    for node, path in list(_paths(graph, model)):
        node.name = unique(f"{path}/{node.op_type}" if path else node.op_type, taken)
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.initializers.values()]:
        value.metadata_props.clear()
        name = value.name or ""
        if name.startswith(PREFIX) and name[len(PREFIX) :] not in graph.initializers:
            value.name = name[len(PREFIX) :]
    for value in graph.inputs:
        value.metadata_props.clear()
    graph.metadata_props.clear()


def shorten(graph: ir.Graph, named: Collection[str]) -> None:
    """Intermediate values and constants get the shortest names, the most used first, and no shapes (any runtime
    infers them): in a small file they are most of the bytes. Parameters and what holds them keep theirs: names that
    are `named`, or of several parts.
    """
    kept = {id(value) for value in (*graph.inputs, *graph.outputs)}
    values = [value for node in graph for value in node.outputs]
    for value in graph.initializers.values():
        forget_type(value)
        name = value.name or ""
        if name in named or ("." in name and not name.startswith(SHARED)):
            kept.add(id(value))
        else:
            values.append(value)
    values = [value for value in values if id(value) not in kept]
    inside = {name for node in graph for name in _names_inside(node)}
    taken = inside | {v.name for v in (*graph.inputs, *graph.outputs, *graph.initializers.values()) if id(v) in kept}
    names = (name for name in identifiers() if name not in taken)
    for i, value in enumerate(values):
        value.name = f"{SHARED}{i}"  # out of the way
    for value in sorted(values, key=lambda value: -len(value.uses())):
        value.name, value.shape = next(names), None
        if value.const_value is None:
            value.type = None


def forget_type(value: ir.Value) -> None:
    """Take shape and type off a constant, whose tensor says both; an output has to say them too."""
    if not value.is_graph_output():
        value.shape = value.type = None


def drop_defaults(graph: ir.Graph) -> None:
    """Take out attributes that say what the operator's definition says anyway."""
    for node in graph:
        for name, default in _defaults(node.op_type, node.domain, graph.opset_imports.get(node.domain, 1)).items():
            if name in node.attributes and _same(node.attributes[name].value, default):
                del node.attributes[name]
        for name, neutral in _NEUTRAL.items():
            if (
                node.op_type in _WINDOWS
                and name in node.attributes
                and set(node.attributes[name].as_ints()) == {neutral}
            ):
                del node.attributes[name]
        for name in _TOLD.get(node.op_type, ()):
            node.attributes.pop(name, None)
        if node.op_type == "Reshape" and "allowzero" in node.attributes and _has_no_zero(node.inputs[1]):
            del node.attributes["allowzero"]
        if node.op_type == "Transpose" and "perm" in node.attributes:
            order = list(node.attributes["perm"].as_ints())
            if order == sorted(order, reverse=True):
                del node.attributes["perm"]


def restore_parameters(graph: ir.Graph, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give float weights that the tracer folded into anonymous transposed constants their names back.

    A weight that is looked up and multiplied with (tied embeddings) is then stored once; runtimes fold the transpose.
    """
    by_shape: dict[tuple[int, ...], list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in parameters:
        if parameter.dim() == 2 and parameter.is_floating_point():
            by_shape.setdefault(tuple(parameter.shape), []).append((name, parameter))
    for name, value in list(graph.initializers.items()):
        if value.const_value is None or len(value.const_value.shape) != 2:
            continue
        rows, columns = value.const_value.shape.numpy()
        candidates = by_shape.get((columns, rows), [])
        for own, parameter in sorted(candidates, key=lambda item: item[0] not in graph.initializers):
            array = parameter.detach().cpu().numpy()
            if name != own and array.dtype == value.const_value.numpy().dtype and _is_transpose(value, array):
                _transpose_of(graph, value, own, array)
                break


def _is_transpose(value: ir.Value, array: np.ndarray) -> bool:
    assert value.const_value is not None
    return bool(np.array_equal(value.const_value.numpy(), array.T)) and bool(value.uses())


def _transpose_of(graph: ir.Graph, value: ir.Value, name: str, array: np.ndarray) -> None:
    source = graph.initializers.get(name)
    if source is None:
        tensor = ir.tensor(array, name=name)
        source = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(source)
    node = ir.node("Transpose", [source], {"perm": [1, 0]}, name=f"{name}/Transpose")
    node.outputs[0].name = f"{name}/transposed"
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    graph.insert_before(graph[0], node)
    ir.convenience.replace_all_uses_with(value, node.outputs[0])
    del graph.initializers[value.name or ""]


def thin_names(graph: ir.Graph, lowered: Iterable[ir.Node]) -> None:
    """Of the nodes that unpack one weight or quantize one activation, only the last keeps its name.

    Names of the steps in between say nothing that the last does not, and would be a third of a small file.
    """
    last: dict[str, ir.Node] = {}
    nodes = [node for node in lowered if node.graph is not None]
    for node in nodes:
        last[stem(node.name or "")] = node
    taken = {node.name for node in graph} - {node.name for node in nodes}
    for node in nodes:
        name = stem(node.name or "")
        if last[name] is node:
            node.name = node.name if "/" in (node.name or "") or name in taken else name
        elif node.domain == "":
            node.name = None


def module_names(graph: ir.Graph, modules: Container[str]) -> None:
    """Of the nodes of one module, those of its weights included, only the last keeps a name: the module's path."""
    last: dict[str, ir.Node] = {}
    for node in graph:
        path = stem(node.name or "")
        while path and path not in modules:
            path = path.rpartition(".")[0]
        node.name = None
        last[path] = node
    for path, node in last.items():
        node.name = path or None


def stem(name: str) -> str:
    """``fc.weight.unpack`` of ``fc.weight.unpack_3``, ``fc.input`` of ``fc.input/Round``."""
    return name.rpartition("/")[0] or re.sub(r"_\d+$", "", name)


def merge_reshapes(graph: ir.Graph) -> None:
    """Take out each Reshape that another one follows at once, and each of an initializer to the shape it
    has.
    """
    for node in list(graph):
        if node.op_type != "Reshape" or node.outputs[0].is_graph_output():
            continue
        source, target = node.inputs[0], node.inputs[1]
        if source is None or target is None:
            continue
        same = (
            source.const_value is not None
            and target.const_value is not None
            and list(source.const_value.shape.numpy()) == target.const_value.numpy().tolist()
        )
        if same or all(_forgets_shape(user, index) for user, index in node.outputs[0].uses()):
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            graph.remove(node, safe=True)


def _has_no_zero(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and 0 not in value.const_value.numpy()


def _forgets_shape(user: ir.Node, index: int) -> bool:
    """Whether a node is a Reshape to a shape of its own, whatever the shape of its input."""
    return user.op_type == "Reshape" and index == 0 and _has_no_zero(user.inputs[1])


def _scopes(node: ir.Node, model: nn.Module) -> list[str]:
    """Paths of the modules around a node, outermost first, the user's model itself left out."""
    text = node.metadata_props.get(SCOPES)
    if not text:
        return []
    try:
        scopes = ast.literal_eval(text)[:-1]  # the last one is the operation
    except (SyntaxError, ValueError):
        return []
    return [_own_path(scope[len(PREFIX) :], model) for scope in scopes if scope.startswith(PREFIX)]


def _own_path(path: str, model: nn.Module) -> str:
    """``layers.3`` of ``layers.slice(2, None, None).1``, which the tracer calls a block of ``self.layers[2:]``."""
    while found := _SLICE.search(path):
        holder = path[: found.start()]
        *limits, place = map(ast.literal_eval, found.groups())
        try:
            names = [name for name, _ in model.get_submodule(holder).named_children() if name.isdigit()]
            own = names[slice(*limits)][place]
        except (AttributeError, IndexError):  # a container with a slice of its own: no name is worth a failure
            return path
        path = f"{holder}.{own}{path[found.end() :]}"
    return path


@cache
def _defaults(op_type: str, domain: str, opset: int) -> dict[str, Any]:
    if not onnx.defs.has(op_type, domain):
        return {}
    attributes = onnx.defs.get_schema(op_type, opset, domain).attributes
    known = {name: attribute.default_value for name, attribute in attributes.items()}
    return {name: onnx.helper.get_attribute_value(value) for name, value in known.items() if value.name}


def _same(value: Any, default: Any) -> bool:
    if isinstance(default, bytes):
        return bool(value == default.decode())
    return bool(np.float32(value) == np.float32(default)) if isinstance(default, float) else bool(value == default)


def _names_inside(node: ir.Node) -> Iterator[str]:
    """Names in the bodies of loops and branches, which see those of the graph around them."""
    for attribute in node.attributes.values():
        graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else []
        for graph in graphs:
            yield from (value.name or "" for value in (*graph.inputs, *graph.initializers.values()))
            for inner in graph:
                yield from (value.name or "" for value in inner.outputs)
                yield from _names_inside(inner)


def identifiers() -> Iterator[str]:
    """a, b, .., 9, aa, ab, .."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_letters + string.digits, repeat=length))


def _paths(graph: ir.Graph, model: nn.Module) -> Iterator[tuple[ir.Node, str]]:
    """Each node with the path of its module; where the tracer lost it, of the one around the nodes before and after."""
    nodes = list(graph)
    paths = [scopes[-1] if (scopes := _scopes(node, model)) else None for node in nodes]
    after: list[str] = []
    for path in reversed(paths):
        after.append(path if path is not None else (after[-1] if after else ""))
    before = ""
    for node, path, following in zip(nodes, paths, reversed(after), strict=True):
        before = path if path is not None else common_path(before, following)
        yield node, before


def common_path(one: str, other: str) -> str:
    """The innermost module that holds both, or is one of them."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return ".".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def unique(name: str, taken: set[str]) -> str:
    """The name, with a number behind it where it is taken; it is taken from then on."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
