"""How a weight is used in a graph: in a matrix product, as a table of rows, or otherwise. Matching, no rewriting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

LAYOUT = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Concat", "Gather", "Cast", "Identity")


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a weight: the node, and through it the operand and the kind of product."""

    weight: ir.Value
    node: ir.Node
    index: int


def uses_of(value: ir.Value) -> Iterator[Use]:
    """Uses of a weight, looking through a plain transpose."""
    for node, index in list(value.uses()):
        if node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]:
            for inner, at in list(node.outputs[0].uses()):
                yield Use(value, inner, at)
        else:
            yield Use(value, node, index)


def as_product(use: Use, shape: tuple[int, ...]) -> tuple[ir.Node, ir.Value, int, ir.Value | None] | None:
    """A use as a product of x with the weight matrix: (node, x, axis of the weight's outputs, bias)."""
    node = use.node
    if len(shape) != 2 or use.index != 1:
        return None
    direct = node.inputs[1] is use.weight
    x = node.inputs[0]
    if x is None:
        return None
    if node.op_type == "MatMul":
        return node, x, (1 if direct else 0), None
    if node.op_type == "Gemm":
        flags = {
            key: node.attributes[key].value for key in ("alpha", "beta", "transA", "transB") if key in node.attributes
        }
        if flags.get("transA", 0) or flags.get("alpha", 1.0) != 1.0 or flags.get("beta", 1.0) != 1.0:
            return None
        transposed = bool(flags.get("transB", 0)) == direct
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return node, x, (0 if transposed else 1), bias
    return None


def operation_of(node: ir.Node) -> str:
    """The operation behind nodes that only lay a weight out anew."""
    while node.op_type in LAYOUT and node.outputs[0].uses():
        node = next(iter(node.outputs[0].uses()))[0]
    return node.op_type


def is_gather(use: Use) -> bool:
    axis = use.node.attributes.get("axis")
    direct = use.index == 0 and use.node.inputs[0] is use.weight
    return use.node.op_type == "Gather" and direct and (axis is None or axis.as_int() == 0)
