"""Every kind of layer with every width, granularity, sparsity and activation, in both targets, run by plain
onnxruntime.
"""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from qgraph.exporters.onnx import export
from tests.exporters.cells import CELLS
from tests.exporters.layers import KINDS, Many, settled
from tests.exporters.runtimes import INSTALLED

TOLERANCE = 1e-5  # of the largest output: float32 sums of up to a hundred terms in another order
RECURRENT = ("lstm", "gru")
FEWER = {"lstm": CELLS[::4], "gru": CELLS[1::4]}  # eight weights a cell


def run(path, x, level):
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    return ort.InferenceSession(str(path), options).run(None, {"x": x.numpy()})


@pytest.mark.parametrize("target", ["standard", "ort"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_cell(kind, target, tmp_path):
    torch.manual_seed(0)
    layer = KINDS[kind]
    cells = FEWER.get(kind, CELLS)
    x, path = layer.example(layer.ragged), tmp_path / "model.onnx"
    model = settled(Many(layer, cells, layer.ragged), x)
    report = export(model, path, (x,), target=target, optimize_for="size")  # which takes all kernels

    assert {layer.path for layer in report.layers} >= {f"layers.{i}" for i in range(len(cells))}
    assert any("batch" in text for text in report.dynamic)
    second = torch.cat([x, x[:2]])  # another batch than the exporter itself tried
    for inputs in (x, second):
        with torch.no_grad():
            expected = model(inputs)
        for level in (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL):
            for cell, want, got in zip(cells, expected, run(path, inputs, level), strict=True):
                difference = np.abs(want.numpy() - got) > TOLERANCE * want.abs().max().item()
                # A code on a rounding tie may go the other way: then a few outputs differ, never most of
                # them.
                allowed = 0.0 if cell.activation is None else 0.34
                assert difference.mean() <= allowed, (kind, target, cell)
    if target == "standard":
        with torch.no_grad():
            expected = model(second)
        for name, run_in in INSTALLED.items():
            if name == "openvino" and kind in RECURRENT:
                continue  # it takes constant weights alone: the next test
            for cell, want, got in zip(cells, expected, run_in(path, second.numpy()), strict=True):
                assert_same(cell, want, got, name)


def assert_same(cell, want, got, name):
    difference = np.abs(want.numpy() - got) > TOLERANCE * want.abs().max().item()
    assert got.shape == want.shape and difference.mean() <= (0.0 if cell.activation is None else 0.34), (name, cell)


@pytest.mark.skipif("openvino" not in INSTALLED, reason="openvino is not installed")
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_in_openvino_are_stored_unpacked(kind, tmp_path):
    torch.manual_seed(0)
    layer, cells = KINDS[kind], (CELLS[0], CELLS[3], CELLS[8])
    x, path = layer.example(layer.ragged), tmp_path / "model.onnx"
    model = settled(Many(layer, cells, layer.ragged), x)
    export(model, path, (x,), target="standard", preunpacked=True)
    with torch.no_grad():
        expected = model(x)
    for cell, want, got in zip(cells, expected, INSTALLED["openvino"](path, x.numpy()), strict=True):
        assert_same(cell, want, got, "openvino")


@pytest.mark.parametrize("cell", [CELLS[0], CELLS[3], CELLS[5], CELLS[8], CELLS[11], CELLS[15]], ids=str)
@pytest.mark.parametrize("target", ["standard", "ort"])
def test_the_file_holds_the_codes_and_little_else(target, cell, tmp_path):
    torch.manual_seed(0)
    layer = KINDS["linear-3d"]
    x, path = layer.example(layer.ragged), tmp_path / "model.onnx"
    model, options = Many(layer, (cell,) * 6, layer.ragged), {"target": target, "optimize_for": "size"}
    report = export(model, path, (x,), verify=False, dynamic_shapes={}, **options)
    proto = onnx.load(path)
    assert report.file_bytes == path.stat().st_size
    assert report.file_bytes <= 1.02 * report.ideal_bytes + 16 * 1024
    assert not {f"layers.{i}.weight.value" for i in range(6)} & {tensor.name for tensor in proto.graph.initializer}
    assert {node.domain for node in proto.graph.node} <= ({"", "com.microsoft", "model"} if target == "ort" else {""})
    codes = 72 * 80 * cell.weight_spec().storage_bits / 8
    assert all(layer.bytes < 1.15 * codes + 8 * 72 * 3 for layer in report.layers if layer.shape)
