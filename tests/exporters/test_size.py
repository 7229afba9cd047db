"""Small deep files: nodes, names and metadata take what they may, and what is said of the file can be read back."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qgraph
from qgraph.exporters.merge import separate
from qgraph.exporters.report import absolute, read_report, relative
from qgraph.modules import collecting
from tests.exporters.runtimes import INSTALLED


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


def encoder() -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(2, 9, 64)


def residual() -> tuple[nn.Module, torch.Tensor]:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(nn.Conv2d(3, 16, 3), *(Residual(16) for _ in range(6)), *head), torch.randn(2, 3, 12, 12)


def stacked() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(64, 64), nn.GELU()))), torch.randn(3, 64)


def recurrent() -> tuple[nn.Module, torch.Tensor]:
    return Last(), torch.randn(2, 7, 32)


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(32, 32, 4, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.rnn(x)[0])


MODELS = {"encoder": encoder, "residual": residual, "stacked": stacked, "recurrent": recurrent}


def exported(name, config, target, path):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    for parameter in model.parameters():  # fresh norms are equal, and would be stored once
        nn.init.normal_(parameter, std=0.1)
    prepared = qgraph.prepare(model, config, (x,)).eval()
    return Cell(path, prepared, x, qgraph.export(prepared, path, (x,), target=target, progress=False))


@dataclass(frozen=True)
class Cell:
    path: Path
    prepared: nn.Module
    x: torch.Tensor
    report: qgraph.ExportReport


def _all(cell: Cell) -> tuple:
    return tuple(getattr(cell, field.name) for field in fields(cell))


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """A model, a config and a target -> what was exported, once for all tests."""
    folder = tmp_path_factory.mktemp("cells")
    return cache(lambda *key: exported(*key, folder / f"{'-'.join(key).replace(':', 'x')}.onnx"))


# Kilobytes beyond 1.02 times the content; 16 are promised, 4 aimed at. Four encoder layers of 4-bit activations have 16
# quantizers of 13 nodes each, and a standard file has no functions to write them once. A residual block has long
# groups, whose means are taken in stages: 234 bytes above the aim.
CELLS = [
    ("encoder", "W1", {"ort": 5, "standard": 4}),
    ("encoder", "A4W1", {"ort": 6, "standard": 9}),
    ("residual", "W1.58", {"ort": 4, "standard": 4}),
    ("residual", "A4W1", {"ort": 5, "standard": 10}),
    ("stacked", "W1-2:4", {"ort": 4, "standard": 4}),
    ("stacked", "A8W4", {"ort": 4, "standard": 8}),
    ("recurrent", "W1", {"ort": 4, "standard": 4}),
]


@pytest.mark.parametrize("target", ["ort", "standard"])
@pytest.mark.parametrize(("name", "config", "kilobytes"), CELLS)
def test_a_small_deep_file_is_little_more_than_its_content(cell, name, config, kilobytes, target):
    report = cell(name, config, target).report
    assert report.file_bytes <= 1.02 * report.ideal_bytes + kilobytes[target] * 1024
    assert report.max_difference < 1e-5


@pytest.mark.parametrize("config", ["A4W1", "A4W1-2:4"])
def test_twelve_layers_with_quantized_activations_hold_what_is_promised(config, tmp_path):
    """48 quantizers of activations, which no function may write once."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False), torch.randn(2, 9, 128)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    prepared = qgraph.prepare(model, config).eval()
    path = tmp_path / "model.onnx"
    report = qgraph.export(prepared, path, (x,), target="standard", verify=False, progress=False)
    assert report.file_bytes <= 1.02 * report.ideal_bytes + 16 * 1024
    assert {node.name for node in onnx.load(path).graph.node} == {""}
    rows = {row.path for row in qgraph.compare(prepared, path, (x,)).rows}
    assert {f"layers.{i}.linear1" for i in range(12)} <= rows
    network = qgraph.inspect(path).to_networkx()
    assert {"layers.11.norm2", "layers.3"} <= set(network)


@given(st.lists(st.lists(st.sampled_from(["", "a", "b", "0", "11"]), max_size=4).map(".".join)))
def test_names_are_said_by_what_they_share_and_back(names):
    assert absolute(relative(names)) == names


@pytest.mark.parametrize("target", ["ort", "standard"])
@pytest.mark.parametrize(("name", "config"), [(name, config) for name, config, _ in CELLS])
def test_what_it_says_of_itself_and_holds_comes_back(cell, name, config, target):
    path, prepared, x, report = _all(cell(name, config, target))
    onnx.checker.check_model(onnx.load(path), full_check=target == "standard")
    read = read_report(path)
    assert [layer.bytes for layer in read.layers] == [layer.bytes for layer in report.layers]
    assert read.leftovers == report.leftovers and read.ideal_bytes == report.ideal_bytes
    with collecting() as collected, torch.no_grad():
        prepared(x)
    found = qgraph.unpack(path)
    assert set(found) == set(collected.weights)
    for site, compact in collected.weights.items():
        assert np.array_equal(found[site].weight, compact.expand().dequantize().numpy())


@pytest.mark.parametrize(("name", "config"), [("encoder", "W1"), ("residual", "A4W1"), ("stacked", "W1-2:4")])
@pytest.mark.parametrize("target", ["ort", "standard"])
def test_inspect_and_compare_know_its_layers(cell, name, config, target):
    path, prepared, x, report = _all(cell(name, config, target))
    assert any(layer.stack for layer in report.layers)
    inspection = qgraph.inspect(path)
    assert {row.name for row in inspection.layers} == {row.name for row in qgraph.inspect(prepared).layers}
    nodes = [data for _, data in inspection.to_networkx().nodes(data=True)]
    assert sum(data.get("bytes_after", 0) for data in nodes) == report.ideal_bytes
    assert sum(bool(data.get("quantized")) for data in nodes) >= len(inspection.layers)
    rows = {row.path: row for row in qgraph.compare(prepared, path, (x,)).rows}
    assert {"encoder": {"layers.1", "layers.3"}, "residual": {"1.conv1"}, "stacked": {"2", "4"}}[name] <= rows.keys()
    assert all(row.max_error < 1e-4 for row in rows.values())


def test_merged_floats_come_apart_again(cell):
    path, prepared, x, _ = _all(cell("residual", "A4W1", "standard"))
    model = onnx.load(path)
    merged = {tensor.name for tensor in model.graph.initializer}
    separate(model)
    own = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert "1.norm1.bias" in own and "1.norm1.bias" not in merged
    assert np.array_equal(own["1.norm1.bias"], prepared[1].norm1.bias.detach().numpy())
    sessions = [
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for file in (path, model.SerializeToString())
    ]
    one, other = (session.run(None, {"input": x.numpy()})[0] for session in sessions)
    assert np.array_equal(one, other)


# Quantizers too, whose rows are normalized by one node there.
CELLS_ELSEWHERE = [("encoder", "W1"), ("encoder", "A4W1"), ("residual", "W1.58"), ("stacked", "W1-2:4")]


@pytest.mark.parametrize("runtime", INSTALLED)
@pytest.mark.parametrize(("name", "config"), CELLS_ELSEWHERE)
def test_a_standard_one_runs_elsewhere(cell, name, config, runtime):
    path, prepared, x, _ = _all(cell(name, config, "standard"))
    assert not onnx.load(path).functions
    with torch.no_grad():
        expected = prepared(x).numpy()
    assert np.abs(INSTALLED[runtime](path, x.numpy())[0] - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_file_is_the_same_again(cell, tmp_path):
    exported("residual", "A4W1", "ort", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == cell("residual", "A4W1", "ort").path.read_bytes()


def test_a_weight_that_two_modules_share_is_in_its_stack_once(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(12)]
    layers[9].load_state_dict(layers[2].state_dict())
    x = torch.randn(3, 64)
    prepared = qgraph.prepare(nn.Sequential(*layers), "W1", (x,)).eval()
    path = tmp_path / "model.onnx"
    report = qgraph.export(prepared, path, (x,), progress=False)
    stored = [tensor for tensor in onnx.load(path).graph.initializer if tensor.name.endswith(".packed")]
    assert [tuple(tensor.dims) for tensor in stored] == [(11 * 64, 8)]
    found = qgraph.unpack(path)
    assert found["9.weight"].shared_with == "2.weight"
    assert np.array_equal(found["9.weight"].weight, found["2.weight"].weight)
    assert sum(layer.bytes for layer in read_report(path).layers) == sum(layer.bytes for layer in report.layers)


@pytest.mark.parametrize("target", ["ort", "standard"])
def test_an_output_may_be_a_constant(target, tmp_path):
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("zero", torch.zeros(()))

        def forward(self, x):
            return self.fc(x), self.zero, self.zero, self.fc.bias, torch.arange(3)

    x = torch.randn(2, 4)
    qgraph.export(qgraph.prepare(WithLoss(), "W4", (x,)), tmp_path / "m.onnx", (x,), target=target)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [list(map(int, out.shape)) for out in session.get_outputs()[1:]] == [[], [], [4], [3]]
