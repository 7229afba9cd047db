"""The node builder: models from nothing, nodes spliced into a graph, names, shared constants."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from packing_cases import run_everywhere

from qgraph.exporters.lowering.builder import GraphBuilder


def small():
    b = GraphBuilder(opset=13)
    x = b.input("x", np.float32, ("n", 2))
    b.output(b.op("MatMul", [x, b.initializer("fc.weight", np.eye(2, dtype=np.float32))], name="fc"), "y")
    return b


def test_a_model_from_nothing():
    model = small().model()
    onnx.checker.check_model(model, full_check=True)
    x = np.ones((3, 2), np.float32)
    for (y,) in run_everywhere(model, {"x": x}):
        np.testing.assert_array_equal(y, x)


def test_nodes_go_before_an_anchor_in_a_graph_that_exists():
    graph = ir.serde.deserialize_model(small().model()).graph
    (matmul,) = list(graph)
    b = GraphBuilder(graph)
    with b.before(matmul):
        doubled = b.op("Add", [matmul.inputs[0], matmul.inputs[0]], name="fc")
        matmul.replace_input_with(0, b.op("Neg", [doubled]))
    assert [node.op_type for node in graph] == ["Add", "Neg", "MatMul"]
    assert [node.name for node in b.nodes] == ["fc_1", "Neg"]  # "fc" was taken by the graph
    for (y,) in run_everywhere(b.model(), {"x": np.ones((1, 2), np.float32)}):
        np.testing.assert_array_equal(y, [[-2, -2]])


def test_equal_constants_are_one_initializer():
    b = GraphBuilder()
    assert b.ints([1, 2]) is b.ints([1, 2])
    assert b.ints([1, 2]) is not b.ints([1, 3])
    assert b.constant(np.zeros(1, np.int32)) is not b.constant(np.zeros(1, np.float32))
    assert b.constant(np.array(3)).shape == ir.Shape(())


def test_a_name_holds_one_tensor():
    b = GraphBuilder()
    first = b.initializer("w", np.arange(3))
    assert b.initializer("w", np.arange(3)) is first
    with pytest.raises(ValueError, match=r"'w'.*another tensor"):
        b.initializer("w", np.arange(4))


def test_a_reshape_to_zero_means_zero():
    b = GraphBuilder(opset=18)
    b.output(b.reshape(b.op("Abs", [b.initializer("w", np.zeros((0, 3), np.float32))]), [3, 0]), "y")
    for (y,) in run_everywhere(b.model(), {}):
        assert y.shape == (3, 0)


def test_other_domains_are_imported():
    b = GraphBuilder()
    b.op("MatMulNBits", [b.input("x", np.float32, (1, 16))], domain="com.microsoft")
    assert b.graph.opset_imports["com.microsoft"] == 1
