"""`qgraph.inspect` on files: ours, those of others, and what is no model."""

from __future__ import annotations

import copy
import json
import math

import networkx as nx
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import qgraph
from qgraph.exporters.onnx import export
from qgraph.inspection.difference import difference


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 8))
    prepared = qgraph.prepare(model, "A8W4@16", (torch.randn(2, 32),)).eval()
    path = tmp_path_factory.mktemp("file") / "model.onnx"
    export(prepared, path, (torch.randn(2, 32),), progress=False)
    return prepared, path


def test_a_file_of_ours_says_what_the_model_said(exported):
    prepared, path = exported
    model, found = qgraph.inspect(prepared), qgraph.inspect(path)
    assert found.kind == "onnx" and found.title.startswith("model.onnx: exported by qgraph with A8W4@16")
    assert [row.name for row in found.layers] == ["0.weight", "2.weight"]
    for row, before in zip(found.layers, model.layers, strict=True):
        assert (row.shape, row.spec, row.weight) == (before.shape, before.spec, before.weight)
        assert (row.bytes_before, row.bytes_after) == (before.bytes_before, before.bytes_after)
        assert row.form
    assert found.totals.weights_quantized == 32 * 16 + 16 * 8
    assert found.file_bytes == path.stat().st_size
    names = {item.name for item in found.floats}
    assert {"0.bias", "1.weight", "1.bias", "2.bias"} <= names
    text = found.text(120)
    assert "0.weight" in text and "file: " in text
    assert {item.reason for item in found.floats} == {"no weight of a site"}  # true of biases too
    assert json.loads(found.to_json())["layers"][0]["weight"]["bits"] == 4
    assert found.graphs == {} and str(qgraph.inspect(str(path))) == str(found)


def test_the_difference_of_two_files_is_in_their_values_too(exported, tmp_path):
    prepared, path = exported
    again = copy.deepcopy(prepared)
    export(again, tmp_path / "same.onnx", (torch.randn(2, 32),), target="standard", progress=False)
    found = difference(qgraph.inspect(path), qgraph.inspect(tmp_path / "same.onnx"))
    assert not found.changes and found.same == 2
    with torch.no_grad():
        again[2].weight.mul_(-1)
    export(again, tmp_path / "other.onnx", (torch.randn(2, 32),), progress=False)
    found = difference(qgraph.inspect(path), qgraph.inspect(tmp_path / "other.onnx"))
    (change,) = found.changes
    assert (change.site, change.kind) == ("2.weight", "values")
    assert change.snr_db == pytest.approx(20 * math.log10(1 / 2), abs=0.5)  # as far as the grid is symmetric
    assert "values, -6" in str(found) and found.to_dict()["changes"][0]["snr_db"] == change.snr_db
    assert not difference(qgraph.inspect(prepared), qgraph.inspect(path)).changes


def test_a_tied_layer_is_no_difference(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            return self.head(self.emb(ids))

    ids = torch.randint(0, 12, (2, 5))
    prepared = qgraph.prepare(Tied(), "A8W4", (ids,))
    export(prepared, tmp_path / "tied.onnx", (ids,), progress=False)
    sides = qgraph.inspect(prepared), qgraph.inspect(tmp_path / "tied.onnx")
    assert [len(side.layers) for side in sides] == [2, 1]
    for a, b in (sides, sides[::-1]):
        found = difference(a, b)
        assert not found.changes and found.same == 1


def test_a_file_of_ours_as_a_network(exported):
    graph = qgraph.inspect(exported[1]).to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    (output,) = [n for n, data in graph.nodes(data=True) if data["op"] == "output"]
    (given,) = [n for n, data in graph.nodes(data=True) if data["op"] == "placeholder"]
    assert nx.has_path(graph, given, output)


def foreign(path):
    """An integer weight behind a DequantizeLinear, a float one, a 4-bit one, a bias."""
    tensors = [
        numpy_helper.from_array(np.ones((8, 6), np.int8), "wi"),
        numpy_helper.from_array(np.float32(0.5), "scale"),
        numpy_helper.from_array(np.ones((6, 5), np.float32), "wf"),
        helper.make_tensor("w4", TensorProto.INT4, (5, 3), [1] * 15),
        numpy_helper.from_array(np.ones(6, np.float32), "bias"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["wi", "scale"], ["wd"], name="block/dequantize"),
        helper.make_node("MatMul", ["x", "wd"], ["h"], name="block/matmul"),
        helper.make_node("Add", ["h", "bias"], ["hb"]),
        helper.make_node("MatMul", ["hb", "wf"], ["y"], name="head"),
        helper.make_node("DequantizeLinear", ["w4", "scale"], ["z"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", 8])],
        [value("y", TensorProto.FLOAT, ["n", 5]), value("z", TensorProto.FLOAT, [5, 3])],
        tensors,
    )
    model = helper.make_model(graph, producer_name="someone", opset_imports=[helper.make_opsetid("", 21)])
    onnx.save(model, path)


def test_a_foreign_file(tmp_path):
    path = tmp_path / "other.onnx"
    foreign(path)
    found = qgraph.inspect(path)
    assert found.title == "other.onnx: written by someone"
    rows = [(r.name, r.op, r.shape, r.dtype, r.spec, r.bytes_after) for r in found.layers]
    assert rows == [
        ("wi", "DequantizeLinear", (8, 6), "int8", "int8", 48),
        ("wf", "MatMul", (6, 5), "float32", "float", 120),
        ("w4", "DequantizeLinear", (5, 3), "int4", "int4", 8),  # 15 halves of a byte
    ]
    assert [(item.name, item.bytes, item.reason) for item in found.floats] == [
        ("scale", 4, "a scalar"),
        ("bias", 24, "1-D"),
    ]
    assert found.coverage.sites_quantized == 0 and "int8" in str(found)
    assert nx.has_path(found.to_networkx(), "x", "output:y")
    json.loads(found.to_json())


def test_external_data_is_counted_and_not_needed(tmp_path):
    path = tmp_path / "big.onnx"
    foreign(path)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="big.bin", size_threshold=0)
    found = qgraph.inspect(path)
    assert found.file_bytes == path.stat().st_size + (tmp_path / "big.bin").stat().st_size
    (tmp_path / "big.bin").unlink()
    assert [row.bytes_after for row in qgraph.inspect(path).layers] == [48, 120, 8]


def test_what_is_no_model_is_an_error(tmp_path):
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("not a protobuf, only words")
    for name, words in [
        ("missing.onnx", "no such file. Expected the path of an .onnx file; check the spelling"),
        ("", "found a folder"),
        ("empty.onnx", "found no ONNX model (0 bytes without a graph)"),
        ("text.onnx", "found no ONNX model"),
    ]:
        with pytest.raises(qgraph.InspectError) as caught:
            qgraph.inspect(tmp_path / name)
        assert words in str(caught.value) and str(tmp_path / name) in str(caught.value)
