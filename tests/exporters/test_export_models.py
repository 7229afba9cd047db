"""Whole models: inputs and outputs of any structure, dynamic sizes, tied weights, names, metadata, the
report.
"""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import qgraph
from qgraph.errors import ExportError, InspectError
from qgraph.exporters.onnx import export
from qgraph.exporters.report import read_report
from qgraph.exporters.translations import table_read_once
from qgraph.modules import exporting, run_state
from tests.exporters.running import TOLERANCE, differ, run
from tests.models import CASES, CNN, GPT

# Each model of the project's zoo: which input names, and which of their sizes must come out dynamic.
DYNAMIC = {
    "cnn": {"x": [0]},
    "resnet": {"x": [0]},
    "unet": {"x": [0]},
    "recurrent": {"ids": [0, 1]},
    "gpt": {"ids": [0, 1]},
    "encoder": {"x": [0, 1]},
    "cross_attention": {"x": [0, 1], "memory": [0, 1]},
    "functional": {"x": [0]},
    "structured": {"batch_ids": [0, 1]},
    "twice": {"x": [0]},
    "parametrized": {"input": [0]},
    "self_named": {},  # it branches on its batch size
    "custom_function": {"x": [0]},
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_the_zoo(name, tmp_path):
    torch.manual_seed(0)
    case = CASES[name]
    example = case.inputs(0)
    net = qgraph.prepare(case.make(), "W4", example).eval()
    report = export(net, tmp_path / "m.onnx", example)
    assert report.max_difference is not None and report.max_difference < TOLERANCE
    assert sum("second shape" in run for run in report.verified) == (2 if DYNAMIC[name] else 0)
    inputs = {value.name: value for value in onnx.load(tmp_path / "m.onnx").graph.input}
    for label, dims in DYNAMIC[name].items():
        found = [i for i, dim in enumerate(inputs[label].type.tensor_type.shape.dim) if dim.dim_param]
        assert found == dims, label


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor | None = None
    label: str = "pair"


class Structures(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, pair, options, *, scale=None, flag=True):
        y = self.fc(pair.left) + options["shift"][0]
        if scale is not None and flag:
            y = y * scale
        return {"y": y, "pairs": [Pair(y + 1), (y * 2, "text", 3)], "nothing": None, "size": y.shape[0]}


def test_structures_become_named_tensors(tmp_path):
    torch.manual_seed(0)
    pair, options = Pair(torch.randn(3, 8)), {"shift": [torch.randn(8)], "other": 1}
    net = qgraph.prepare(Structures(), "W4", (pair, options), example_kwargs={"scale": torch.tensor(2.0)}).eval()
    kwargs = {"scale": torch.tensor(2.0), "flag": True}
    report = export(net, tmp_path / "m.onnx", (pair, options), example_kwargs=kwargs)
    assert report.inputs == ("pair_left", "options_shift_0", "scale")
    assert report.outputs == ("y", "pairs_0_left", "pairs_1_0")
    dropped = " ".join(report.dropped)
    assert all(text in dropped for text in ("nothing (NoneType)", "size (int)", "pairs_0_label (str)", "pairs_1_1"))
    left = torch.randn(5, 8)
    want = net(Pair(left), options, **kwargs)["y"]
    got = run(tmp_path / "m.onnx", pair_left=left, options_shift_0=options["shift"][0], scale=np.float32(2.0))
    assert differ(want, got[0]) < TOLERANCE
    np.testing.assert_allclose(got[2], 2 * got[0], rtol=1e-6)


class SameTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        y = self.fc(x)
        return y, y, x


def test_one_tensor_as_several_outputs(tmp_path):
    net = qgraph.prepare(SameTwice(), "A4W4", (torch.randn(3, 8),)).eval()
    x = torch.randn(4, 8)
    report = export(net, tmp_path / "m.onnx", (x,))
    assert len(set(report.outputs)) == 3
    first, second, third = run(tmp_path / "m.onnx", x=x)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(third, x.numpy())


class NoTensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return {"size": self.fc(x).shape[0]}


def test_a_model_without_tensor_outputs_is_refused(tmp_path):
    x = torch.randn(3, 8)
    with pytest.raises(ExportError, match="returns no tensor"):
        export(qgraph.prepare(NoTensor(), "W4", (x,)), tmp_path / "m.onnx", (x,))


@pytest.mark.parametrize("target", ["standard", "ort"])
def test_a_tied_weight_is_stored_once(target, tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(0, 33, (2, 7))
    net = qgraph.prepare(GPT(), "W2", (ids,)).eval()
    export(net, tmp_path / "m.onnx", (ids,), target=target)
    tensors = {tensor.name: tensor for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    of_size = [name for name, tensor in tensors.items() if name.endswith(".packed") and tensor.dims[0] == 33]
    assert len(of_size) == 1
    tied = next(name for name, _ in net.named_parameters() if f"{name}.packed" == of_size[0])
    assert tied not in tensors


def test_a_tied_weight_left_float_is_stored_once_under_its_name(tmp_path):
    ids = torch.randint(0, 33, (2, 7))
    config = qgraph.QConfig.parse("W4").with_rules(qgraph.Rule("wte", None), qgraph.Rule("head", None))
    net = qgraph.prepare(GPT(), config, (ids,)).eval()
    report = export(net, tmp_path / "m.onnx", (ids,))
    shape = list(net.wte.weight.shape)
    tables = [t.name for t in onnx.load(tmp_path / "m.onnx").graph.initializer if sorted(t.dims) == sorted(shape)]
    assert len(tables) == 1 and tables[0] in {"wte.weight", "head.weight"}
    assert {item.name: item.reason for item in report.leftovers}[tables[0]] == "a rule leaves it float"


def test_wrappers_around_a_prepared_model(tmp_path):
    net = qgraph.prepare(nn.Linear(8, 8), "W4").eval()
    report = export(torch.compile(net), tmp_path / "m.onnx", (torch.randn(2, 8),))
    assert report.inputs == ("input",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_computed_in_float32(dtype, tmp_path):
    x = torch.randn(3, 16, dtype=dtype)
    net = qgraph.prepare(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype), "A4W4", (x,))
    report = export(net, tmp_path / "m.onnx", (x,))
    assert any("float32" in note for note in report.notes)
    assert net[0].weight.dtype == dtype
    assert run(tmp_path / "m.onnx", input=x.float())[0].dtype == np.float32


def test_a_default_type_of_float64(tmp_path):
    x = torch.randn(3, 16)
    net = qgraph.prepare(nn.Linear(16, 4), "W4-50%", (x,))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        export(net, tmp_path / "m.onnx", (x,))  # compares the file with the model
    finally:
        torch.set_default_dtype(before)


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 16, mode="mean")
        self.cell = nn.GRUCell(16, 12)
        self.rnn = nn.RNN(16, 6, 2, nonlinearity="relu", bidirectional=True)

    def forward(self, ids):
        y = self.bag(ids)
        return self.cell(y), self.rnn(y.expand(4, -1, -1))


def test_bags_cells_and_plain_recurrent_layers(tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (3, 6))
    net = qgraph.prepare(Bags(), "W4", (ids,)).eval()
    report = export(net, tmp_path / "m.onnx", (ids,))
    ops = {layer.path: layer.op for layer in report.layers}
    assert ops == {"bag": "Gather", "cell": "Gemm", "rnn": "RNN"}


def test_names_and_metadata(tmp_path):
    x = torch.randn(2, 3, 16, 16)
    net = qgraph.prepare(CNN(), "A4W1", (x,)).eval()
    report = export(net, tmp_path / "m.onnx", (x,))
    proto = onnx.load(tmp_path / "m.onnx")
    assert proto.producer_name == "qgraph" and proto.producer_version
    names = {tensor.name for tensor in proto.graph.initializer}
    nodes = " ".join(node.name for node in proto.graph.node)
    for layer in report.layers:
        assert f"{layer.path}.{layer.operand}.packed" in names
        assert layer.path in nodes
    assert str(Path(__file__).parent) not in str(proto)  # no paths of this machine
    data = {item.key: item.value for item in proto.metadata_props}
    assert data["qgraph.config"] == "A4W1" and len(json.loads(data["qgraph.layers"])["layers"]) == len(report.layers)


def test_the_report(tmp_path):
    x = torch.randn(2, 3, 16, 16)
    net = qgraph.prepare(CNN(), "A4W1", (x,)).eval()
    report = export(net, tmp_path / "m.onnx", (x,))
    text = str(report)
    assert all(layer.path in text for layer in report.layers)
    assert "bits per quantized weight" in text and "left float" in text and "run no faster" in text
    assert json.loads(report.to_json())["layers"][0]["bits"] == 1
    assert all(layer.max_difference is not None and layer.max_difference < 1e-5 for layer in report.layers)
    kept = {item.name for item in report.leftovers}
    assert any("bias" in name for name in kept)
    assert report.ideal_bytes < report.file_bytes

    again = read_report(tmp_path / "m.onnx")
    assert [layer.spec for layer in again.layers] == [layer.spec for layer in report.layers]
    assert [layer.activation for layer in again.layers] == [layer.activation for layer in report.layers]
    assert (again.file_bytes, again.ideal_bytes) == (report.file_bytes, report.ideal_bytes)
    (tmp_path / "other.onnx").write_bytes(b"not onnx at all")
    with pytest.raises(InspectError, match=r"other\.onnx"):
        read_report(tmp_path / "other.onnx")


@pytest.mark.parametrize("config", ["A4W1", "A8W4@32", "W1.58-2:4"])
def test_the_standard_target_runs_in_another_runtime(config, tmp_path):
    torch.manual_seed(0)
    net = qgraph.prepare(nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 5)), config).eval()
    x = torch.randn(6, 40)
    export(net, tmp_path / "m.onnx", (x,), target="standard")
    got = ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, {"input": x.numpy()})[0]
    off = np.abs(got - net(x).detach().numpy()) > TOLERANCE * net(x).abs().max().item()
    assert off.mean() < 0.2  # rounding ties


def test_without_verification(tmp_path):
    net = qgraph.prepare(nn.Linear(8, 8), "W4").eval()
    report = export(net, tmp_path / "m.onnx", (torch.randn(2, 8),), verify=False)
    assert report.max_difference is None and "not verified" in str(report)


def test_silent_where_there_is_no_terminal(tmp_path, capfd):
    net = qgraph.prepare(nn.Linear(8, 8), "W4").eval()
    export(net, tmp_path / "m.onnx", (torch.randn(2, 8),))
    out, err = capfd.readouterr()
    assert out == "" and err == ""


class Grouped(nn.Module):
    """Stacked experts, one product for all."""

    def __init__(self):
        super().__init__()
        self.gate, self.w = nn.Linear(8, 3), nn.Parameter(torch.randn(3, 8, 16) * 0.3)

    def forward(self, x):
        expert, order = self.gate(x).argmax(-1).sort()
        offsets = (expert[None] <= torch.arange(3)[:, None]).sum(1).int()
        return torch.nn.functional.grouped_mm(x[order], self.w, offs=offsets)[order.argsort()]


def test_grouped_products_are_written_out_and_reported(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(9, 8)
    net = qgraph.prepare(Grouped(), "W4", (x,)).eval()
    report = export(net, tmp_path / "m.onnx", (x,))
    assert report.dynamic == ("x: 0=batch",) and any("grouped_mm was written out" in note for note in report.notes)
    assert {layer.path + "." + layer.operand for layer in report.layers} == {"gate.weight", ".w"}
    x = torch.randn(14, 8)
    assert differ(net(x), run(tmp_path / "m.onnx", x=x)[0]) < TOLERANCE


def test_a_scale_over_many_values_may_round_more(tmp_path):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    net = qgraph.prepare(nn.Conv2d(3, 3, 1, groups=3, bias=False), "A4W8", (x,)).eval()
    report = export(net, tmp_path / "m.onnx", (x,))
    assert report.max_difference < 1e-4


def test_exports_in_threads_are_those_of_one(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 8)
    prepared = [qgraph.prepare(model, config).eval() for config in ("W4", "A4W1")]
    paths = [tmp_path / f"{index}.onnx" for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(qgraph.export, prepared[i % 2], path, (x,), progress=False) for i, path in enumerate(paths)]
        reports = [job.result() for job in jobs]
    for report, again in zip(reports[:2], reports[2:], strict=True):
        assert [layer.path for layer in report.layers] == ["0", "2"]
        assert report.file_bytes == again.file_bytes
    assert paths[0].read_bytes() == paths[2].read_bytes() and paths[1].read_bytes() == paths[3].read_bytes()


def test_another_thread_goes_on_quantizing_during_an_export():
    layer, x = qgraph.prepare(nn.Linear(8, 8), "A4W1").eval(), torch.randn(3, 8)
    expected = layer(x)
    asked_before = run_state()  # by a quantizer that has not looked at it yet
    with ThreadPoolExecutor(1) as pool, exporting() as emitted:
        assert not asked_before.exporting
        assert torch.equal(pool.submit(layer, x).result(), expected)
        assert not emitted
        assert not torch.equal(layer(x), expected) and len(emitted) == 2


def test_an_export_leaves_the_exporter_of_torch_as_it_was(tmp_path):
    registry = pytest.importorskip("torch.onnx._internal.exporter._registration").ONNXRegistry
    before = registry.__dict__["from_torchlib"]
    for target in ("ort", "standard"):  # the second export copies the table of the first, which had our own added
        qgraph.export(qgraph.prepare(nn.Linear(8, 8), "A4W1"), tmp_path / "a.onnx", (torch.randn(3, 8),), target=target)
        assert registry.__dict__["from_torchlib"] is before
    fresh = registry.from_torchlib(opset_version=20).functions
    assert not [name for name in fresh if "qgraph" in str(name)]
    with table_read_once():
        copied = registry.from_torchlib(opset_version=20).functions
    assert {name: len(found) for name, found in copied.items()} == {name: len(found) for name, found in fresh.items()}


class OldStyle(nn.Module):
    """Code from the days of `.data`: a mask on a weight and on scores, state from a tensor; squeezes of nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        self.register_buffer("mask", torch.ones(4, 2, 3, 3).tril())

    def forward(self, x):
        self.conv.weight.data *= self.mask
        y = self.conv(x).mean((2, 3))
        scores = y.squeeze(1).softmax(-1)
        scores.data.masked_fill_(y < 0, 0.25)
        state = x.data.new_zeros(x.shape[0], 4) + scores[:, None].squeeze((0, 1))
        return self.out(state * y).squeeze(-1)


def test_data_of_tensors_and_squeezes_of_longer_dimensions_are_written_out(tmp_path):
    path, x = tmp_path / "old.onnx", torch.randn(3, 2, 5, 5)
    model = OldStyle().eval()
    model(x)  # from here on the mask changes nothing
    prepared = qgraph.prepare(model, "W4", x).eval()
    report = qgraph.export(prepared, path, (x,), progress=False)
    assert report.dynamic == ("x: 0=batch",)
    other = torch.randn(5, 2, 5, 5)
    assert np.allclose(run(path, x=other.numpy())[0], prepared(other).detach().numpy(), atol=1e-5)
