"""Float vectors of one length as one tensor, cut apart by one node: biases and norms of a file of many small layers.

The name of a vector, said where it is and where it is used, and what frames it take as many bytes as a short one.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import onnx_ir as ir

from qgraph.exporters.naming import SHARED
from qgraph.exporters.report import content_of

FEWEST = 3  # vectors, for which it pays


def merge(model: ir.Model, names: Collection[str]) -> dict[str, list[str]]:
    """Put vectors together, in place.

    Returns
    -------
    dict
        Initializer -> the names of what it holds, in order, each as long as the others.
    """
    graph, alike = model.graph, dict[int, list[ir.Value]]()
    for name in names:
        value = graph.initializers.get(name)
        held = None if value is None else value.const_value
        if value is not None and held is not None and len(held.shape) == 1 and held.dtype == ir.DataType.FLOAT:
            alike.setdefault(held.size, []).append(value)
    merged: dict[str, list[str]] = {}
    for values in (found for found in alike.values() if len(found) >= FEWEST):
        name = f"{SHARED}floats{len(merged)}"
        array = np.concatenate([value.const_value.numpy() for value in values if value.const_value is not None])
        whole = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        graph.register_initializer(whole)
        cut = ir.node("Split", [whole], {"num_outputs": len(values)}, num_outputs=len(values), name=name)
        graph.insert_before(graph[0], cut)
        merged[name] = [value.name or "" for value in values]
        for i, (value, part) in enumerate(zip(values, cut.outputs, strict=True)):
            part.name = f"{name}/{i}"
            ir.convenience.replace_all_uses_with(value, part)
            del graph.initializers[value.name or ""]
    return merged


def separate(model: onnx.ModelProto) -> None:
    """The inverse of `merge`, in place, by what the metadata says; nodes whose names are there get them back."""
    content = content_of(model)
    merged = content.get("merged", {})
    for node, name in zip(model.graph.node, content.get("nodes", ()), strict=False):
        node.name = name
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in merged}
    names: dict[str, str] = {}
    for node in [node for node in model.graph.node if node.op_type == "Split" and node.input[0] in tensors]:
        tensor = tensors[node.input[0]]
        arrays = np.split(onnx.numpy_helper.to_array(tensor), len(node.output))
        for value, name, array in zip(node.output, merged[tensor.name], arrays, strict=True):
            names[value] = name
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        model.graph.initializer.remove(tensor)
        model.graph.node.remove(node)
    _rename(model.graph, names)


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        for i, value in enumerate(node.input):
            node.input[i] = names.get(value, value)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)
    for output in graph.output:
        output.name = names.get(output.name, output.name)
