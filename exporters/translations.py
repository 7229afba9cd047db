"""How torch.onnx writes the operators of a trace: our own, and torch's table of all others, which is read once."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18
from onnxscript.values import Opset

from qgraph.exporters.lowering import recurrent
from qgraph.exporters.lowering.records import DOMAIN


def translations() -> dict[Any, Any]:
    """A `custom_translation_table`: ``qgraph::Weight`` and ``qgraph::Activation`` nodes, and what torch has none of."""
    nodes = Opset(DOMAIN, 1)
    return {
        torch.ops.qgraph.weight.default: lambda weight, site: nodes.Weight(weight, site=site),
        torch.ops.qgraph.activation.default: lambda x, site: nodes.Activation(x, site=site),
        torch.ops.qgraph.recurrent.default: recurrent.translate,
        torch.ops.aten._is_all_true.default: _is_all_true,
        operator.floordiv: _floor_divided,
    }


_read: dict[tuple[int, int], Any] = {}  # by opset and number of operators: a library may have brought some since


@contextlib.contextmanager
def table_read_once() -> Iterator[None]:
    """While active, torch.onnx.export copies the table that an earlier export read.

    It parses the source of its five hundred translations at every call, half of the time that a small export takes.
    A torch whose table is elsewhere exports as it does. For one thread at a time.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        original = ONNXRegistry.__dict__["from_torchlib"]
        operators = len(torch._C._dispatch_get_all_op_names())
    except (ImportError, KeyError, AttributeError):
        yield
        return

    def from_torchlib(cls: type, opset_version: int) -> Any:
        key = opset_version, operators
        if key not in _read:
            _read[key] = original.__get__(None, cls)(opset_version=opset_version)
        table = copy.copy(_read[key])
        table.functions = {name: list(found) for name, found in table.functions.items()}  # an export adds its own
        return table

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = original  # type: ignore[method-assign]


def _is_all_true(x: Any) -> Any:
    return opset18.Cast(
        opset18.ReduceMin(opset18.Cast(x, to=int(ir.DataType.INT64)), keepdims=0), to=int(ir.DataType.BOOL)
    )


def _floor_divided(x: Any, y: Any) -> Any:
    """Sizes divided as Python does; torch's own translation takes both for positive, which ``-(-size // 2)`` is not."""
    if not (_may_be_negative(x) or _may_be_negative(y)):
        return opset18.Div(x, y)
    return opset18.Div(opset18.Sub(x, opset18.Mod(x, y)), y)


_ARITHMETIC = frozenset({"Add", "Mul", "Div", "Mod", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Concat", "Identity"})


def _may_be_negative(size: Any) -> bool:
    """Whether a minus went into a size; a size of a tensor is none."""
    if not isinstance(size, ir.Value):
        return bool(size < 0)
    node = size.producer()
    if node is None or node.op_type in ("Neg", "Sub"):
        return node is not None
    if node.op_type == "Constant":
        value = ir.convenience.get_const_tensor(size)
        return value is not None and bool((value.numpy() < 0).any())
    return node.op_type in _ARITHMETIC and any(_may_be_negative(value) for value in node.inputs if value is not None)
