"""Large weights are written one by one: the file is the one that onnx would write, but for their place in it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.exporters.write import STREAMED_ABOVE, save

KINDS = [np.float32, np.uint8, np.int64, np.bool_, np.float16, ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.uint4]


def _model(arrays: dict[str, np.ndarray]) -> ir.Model:
    weights = []
    for name, array in arrays.items():
        tensor = ir.tensor(array, name=name)
        shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        weights.append(ir.Value(name=name, shape=shape, type=kind, const_value=tensor))
    nodes = [
        ir.Node(
            "", "Identity", [value], outputs=[ir.Value(name=f"{value.name}.out", type=value.type, shape=value.shape)]
        )
        for value in weights
    ]
    graph = ir.Graph(
        [], [node.outputs[0] for node in nodes], nodes=nodes, initializers=weights, name="main", opset_imports={"": 21}
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: np.dtype(kind).name)
def test_large_weights_are_in_the_file_as_small_ones_are(kind, tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"small": (3, 5), "large": (2, STREAMED_ABOVE + 3), "middle": (7,), "larger": (2 * STREAMED_ABOVE + 1,)}
    arrays = {name: rng.integers(0, 7, size).astype(kind) for name, size in sizes.items()}
    model = _model(arrays)
    expected = {tensor.name: tensor for tensor in ir.to_proto(model).graph.initializer}
    save(model, tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    found = onnx.load(tmp_path / "m.onnx")
    assert [tensor.name for tensor in found.graph.initializer] == ["small", "middle", "large", "larger"]
    for tensor in found.graph.initializer:
        if kind is not np.int64:  # small ones are shortened
            assert tensor == expected[tensor.name]
        assert np.array_equal(ir.from_proto(tensor).numpy(), arrays[tensor.name])
    assert list(model.graph.initializers) == list(sizes)
    assert all(np.array_equal(model.graph.initializers[name].const_value.numpy(), arrays[name]) for name in arrays)


def test_a_file_of_small_weights_is_the_one_that_onnx_writes(tmp_path):
    model = _model({"a": np.arange(12, dtype=np.float32), "b": np.zeros((3, 3), np.uint8)})
    save(model, tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "m.onnx") == ir.to_proto(model)
