"""Readable names in the file: nodes and tensors carry module paths, and the tracer's own annotations go.

Stack traces in node metadata would take more bytes than the codes of a small layer, and show paths of the
user's machine.
"""

from __future__ import annotations

import ast
import itertools

import onnx_ir as ir

PREFIX = "model."  # the wrapper that flattens inputs and outputs holds the user's model under this name
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
    for value in graph.initializers.values():
        value.shape = value.type = None  # the tensor says both
    for node in graph:
        for value in node.outputs:
            if id(value) not in kept:
                value.shape = value.type = None
                value.name = next(name for name in numbers if name not in taken)


def drop_reshapes(graph: ir.Graph) -> None:
    """Take out each Reshape of an initializer to the shape that it has."""
    for node in list(graph):
        source, target = (node.inputs[0], node.inputs[1]) if node.op_type == "Reshape" else (None, None)
        if source is None or target is None or source.const_value is None or target.const_value is None:
            continue
        if (
            list(source.const_value.shape.numpy()) == target.const_value.numpy().tolist()
            and not node.outputs[0].is_graph_output()
        ):
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            graph.remove(node, safe=True)


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
