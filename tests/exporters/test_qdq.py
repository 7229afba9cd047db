"""target="qdq": weights behind DequantizeLinear, static activations as QuantizeLinear and DequantizeLinear."""

import collections

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import qgraph
from qgraph import ExportError, QuantSpec
from qgraph.config import SparsitySpec
from qgraph.exporters.lowering import qdq
from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.packing import pack, unpack
from qgraph.ops import Groups, quantize, sparsify


def packed_weight(shape, bits, granularity="channel", scheme=None, axis=0, sparse=False):
    torch.manual_seed(0)
    block = int(granularity) if granularity.isdigit() else None
    spec = QuantSpec(bits, scheme, "block" if block else granularity, block)
    groups = Groups.for_weight(spec, axis)
    dense = torch.randn(shape)
    if not sparse:
        return pack(quantize(dense, spec, groups))
    sparsity = SparsitySpec.parse("2:4")
    pruned = sparsify(dense, sparsity, groups.sparsity_rows())
    return pack(quantize(pruned, spec, groups, dense=dense), sparsity=sparsity)


@pytest.mark.parametrize(
    ("packed", "opset", "kind"),
    [
        (packed_weight((8, 24), 8, scheme="linear"), 21, "int8"),
        (packed_weight((8, 24), 8), 21, "uint8"),
        (packed_weight((8, 24), 4, "tensor"), 21, "uint4"),
        (packed_weight((8, 24), 4, scheme="linear"), 18, "int8"),
        (packed_weight((8, 20), 3, "16", "linear"), 21, "int4"),  # the last block is shorter
        (packed_weight((20, 8), 4, "16", axis=1), 21, "uint4"),
        (packed_weight((8, 3, 3, 3), 4, "16"), 21, "uint4"),
        (packed_weight((6, 8, 3), 2, axis=1), 25, "uint2"),
        (packed_weight((8, 24), 1.58), 25, "int2"),
        (packed_weight((8, 24), 1, scheme="linear", sparse=True), 21, "int4"),
    ],
)
def test_a_weight_comes_out_of_dequantize_linear(packed, opset, kind):
    b = GraphBuilder(opset=opset)
    emitted = qdq.emit_weight(b, packed, "fc.weight")
    b.output(b.op("Identity", [emitted.value]), "y", np.float32, packed.shape)
    model = b.model()
    model.ir_version = 13 if opset >= 25 else 10
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    got = ort.InferenceSession(model.SerializeToString(), options).run(None, {})[0]
    wanted = unpack(packed).dequantize().numpy()
    assert np.abs(got - wanted).max() <= 2e-7 * np.abs(wanted).max() * packed.levels[1]
    assert f" {kind} " in emitted.form
    (node,) = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert node.input[0] == "fc.weight.packed"
    arrays = {t.name.removeprefix("fc.weight."): onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    again = qdq.read(packed.shape, packed.groups, packed.spec, packed.sparse, arrays)
    assert torch.equal(again.codes, unpack(packed).codes)


def test_what_it_cannot_hold_is_refused_by_name():
    with pytest.raises(ExportError, match=r"'a\.weight'.*blocks of 16 at opset 18"):
        qdq.emit_weight(GraphBuilder(opset=18), packed_weight((8, 24), 4, "16"), "a.weight")
    pruned = pack(quantize(torch.eye(4), None, Groups("channel"), dense=torch.ones(4, 4)))
    with pytest.raises(ExportError, match=r"'a\.weight'.*pruned weight that is not quantized"):
        qdq.emit_weight(GraphBuilder(opset=21), pruned, "a.weight")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().flatten(1))


def test_a_static_model_is_pairs_of_quantize_and_dequantize(tmp_path):
    torch.manual_seed(0)
    model, x = qgraph.prepare(Net(), "A8sW4"), torch.randn(2, 3, 6, 6)
    qgraph.calibrate(model, [x])
    report = qgraph.export(model, tmp_path / "m.onnx", (x,), target="qdq", progress=False)
    assert report.max_difference <= 1e-5
    assert [layer.form for layer in report.layers] == ["DequantizeLinear int4 per channel"] * 2
    assert any("as onnxruntime does by default" in note for note in report.notes)
    file = onnx.load(tmp_path / "m.onnx")
    kinds = collections.Counter(node.op_type for node in file.graph.node)
    assert (kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (2, 4)
    assert {node.domain for node in file.graph.node} == {""}
    assert report.layers[1].bytes == 32 * 128 // 2 + 32 * 4
    found = qgraph.unpack(tmp_path / "m.onnx")
    assert np.array_equal(found["fc.weight"].weight, model.fc.qgraph.weight(model.fc.weight).detach().numpy())


def test_blocks_and_float_zero_points_stay_exact(tmp_path):
    torch.manual_seed(0)
    model, x = qgraph.prepare(nn.Linear(64, 64), "W4@32"), torch.randn(3, 5, 64)
    report = qgraph.export(model, tmp_path / "m.onnx", (x,), target="qdq", progress=False)
    assert report.max_difference <= 1e-5 and not report.flips
    assert report.layers[0].notes == ("its float zero points are an Add behind DequantizeLinear",)
    assert report.layers[0].bytes == 64 * 64 // 2 + 64 * 2 * 8  # codes; a scale and a zero point each
    assert qgraph.inspect(tmp_path / "m.onnx").layers[0].bytes_after == report.layers[0].bytes
    with pytest.raises(ExportError, match="blocks of 32 at opset 18"):
        qgraph.export(model, tmp_path / "n.onnx", (x,), target="qdq", opset=18, progress=False)
    assert not (tmp_path / "n.onnx").exists()


class Tied(nn.Module):
    """A table that is looked up and multiplied with."""

    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(32, 48), nn.Linear(48, 48)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.fc(self.table(ids)), self.table.weight)


@pytest.mark.parametrize("config", ["W4", "W1-2:4", "A8sW8", "W3@16"])
def test_a_tied_weight_has_one_form(config, tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(0, 32, (2, 9))
    prepared = qgraph.prepare(Tied(), config, (ids,)).eval()
    if "s" in config:
        qgraph.calibrate(prepared, [(ids,)])
    report = qgraph.export(prepared, tmp_path / "tied.onnx", (ids,), target="qdq")
    assert report.max_difference < 1e-5 or report.flips
    names = [tensor.name for tensor in onnx.load(tmp_path / "tied.onnx").graph.initializer]
    assert names.count("table.weight.packed") == 1
    found = qgraph.unpack(tmp_path / "tied.onnx")["table.weight"].weight
    with torch.no_grad():
        rows = prepared.table(torch.arange(32)[None])[0].numpy()
    assert np.abs(found - rows).max() <= 1e-6 * np.abs(rows).max()
