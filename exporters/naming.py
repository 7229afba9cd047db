"""Readable names in the file: nodes and tensors carry module paths, and the tracer's own annotations go.

Stack traces in node metadata would take more bytes than the codes of a small layer, and show paths of the
user's machine.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import torch

PREFIX = "model."  # the wrapper that flattens inputs and outputs holds the user's model under this name
SHARED = "qgraph."  # constants that several layers use: tables, shapes, axes
SCOPES = "pkg.torch.onnx.name_scopes"


def module_outputs(graph: ir.Graph) -> dict[str, ir.Value]:
    """Module path -> the value that the module's last node computes, for every module the graph shows."""
    found: dict[str, ir.Value] = {}
    for node in graph:
        for path in _scopes(node):
            found[path] = node.outputs[0]
    return found


def rename(graph: ir.Graph) -> None:
    """Name nodes ``<module path>/<operator>``, strip the wrapper's prefix from parameters, drop the
    annotations.
    """
    taken: set[str] = set()
    for node in graph:
        scopes = _scopes(node)
        base = f"{scopes[-1]}/{node.op_type}" if scopes else node.op_type
        node.name = _unique(base, taken)
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


def shorten(graph: ir.Graph) -> None:
    """Intermediate values get short names and no shapes (any runtime infers them): in a small file they are
    most of the bytes.
    """
    kept = {id(value) for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    taken = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    numbers = (str(number) for number in itertools.count())
    for value in list(graph.initializers.values()):
        value.shape = value.type = None  # the tensor says both
        if (value.name or "").startswith(SHARED):
            value.name = f"{SHARED}{next(numbers)}"
    for node in graph:
        for value in node.outputs:
            if id(value) not in kept:
                value.shape = value.type = None
                value.name = next(name for name in numbers if name not in taken)


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


def thin_names(nodes: Iterable[ir.Node]) -> None:
    """Of the nodes that unpack one weight or quantize one activation, only the last keeps its name.

    Names of the steps in between say nothing that the last does not, and would be a third of a small file.
    """
    last: dict[str, ir.Node] = {}
    nodes = [node for node in nodes if node.graph is not None]
    for node in nodes:
        last[stem(node.name or "")] = node
    for node in nodes:
        name = stem(node.name or "")
        if last[name] is node:
            node.name = name if "/" not in (node.name or "") else node.name
        elif node.domain == "":
            node.name = None


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


def _forgets_shape(user: ir.Node, index: int) -> bool:
    """Whether a node is a Reshape to a shape of its own, whatever the shape of its input."""
    if user.op_type != "Reshape" or index != 0 or user.inputs[1] is None:
        return False
    target = user.inputs[1].const_value
    return target is not None and 0 not in target.numpy()


def _scopes(node: ir.Node) -> list[str]:
    """Paths of the modules around a node, outermost first, the user's model itself left out."""
    text = node.metadata_props.get(SCOPES)
    if not text:
        return []
    try:
        scopes = ast.literal_eval(text)[:-1]  # the last one is the operation
    except (SyntaxError, ValueError):
        return []
    return [scope[len(PREFIX) :] for scope in scopes if scope.startswith(PREFIX)]


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
