"""Products in integers of activations that have a scale a row: what is written, and that it computes the model."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import qgraph
from qgraph.exporters.lowering import dynamic
from tests.models import GPT

RATIO = 1e-5


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    monkeypatch.setattr(dynamic, "SMALLEST", 0)


def run(path, *inputs):
    session = ort.InferenceSession(str(path))
    return session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})[0]


def written(model, config, x, tmp_path, **options):
    prepared = qgraph.prepare(model, config, x).eval()
    path = tmp_path / "a.onnx"
    return prepared, qgraph.export(prepared, path, (x,), optimize_for="latency", progress=False, **options), path


def assert_same(prepared, path, x):
    with torch.no_grad():
        want = prepared(x).numpy()
    # A code on a rounding tie may go the other way: then a few rows differ, never most of them.
    rows = np.abs(run(path, x) - want).reshape(-1, want.shape[-1]).max(1) > RATIO * np.abs(want).max()
    assert rows.mean() <= 0.34


CONFIGS = ["A8W7", "A8W4", "A4W4", "A2W3", "A1W1", "A4W1", "A2W1.58", "A8W4-2:4", "A4W2-70%", "A3W5"]


@pytest.mark.parametrize("shape", [(6, 80), (2, 5, 80)], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_it_computes_the_model(config, shape, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(shape).relu() + 0.3 * torch.randn(shape)
    model = nn.Sequential(nn.Linear(80, 72), nn.ReLU(), nn.Linear(72, 96, bias=False))
    prepared, report, path = written(model, config, x, tmp_path)
    assert all(layer.form == "MatMulInteger uint8 x int8" for layer in report.layers), report
    assert report.max_difference < RATIO or report.flips
    assert "run no faster" not in str(report)
    assert_same(prepared, path, torch.cat([x, 3 * torch.randn_like(x)]))
    found = qgraph.unpack(path)["0.weight"].weight
    held = prepared[0].qgraph["weight"]
    with torch.no_grad():
        sparse = prepared[0].qgraph["weight__sparsifier"](prepared[0].weight) if "-" in config else None
        wanted = held(prepared[0].weight) if sparse is None else held(sparse, prepared[0].weight)
    assert np.abs(found - wanted.numpy()).max() <= 1e-6 * np.abs(found).max()


METHODS = [
    qgraph.QuantSpec(bits, scheme, "token", method=method, scale=scale)
    for bits, scheme, (method, scale) in itertools.product(
        (1, 4, 8), ("affine", "linear"), (("ddt", "minmax"), ("ddt", "windowed"), ("ste", "minmax"))
    )
]


@pytest.mark.parametrize("spec", METHODS, ids=str)
def test_methods_and_schemes(spec, tmp_path):
    torch.manual_seed(0)
    config = qgraph.QConfig(weight=qgraph.QuantSpec(4), activation=spec)
    x = torch.randn(6, 80) + 1
    x[0] = 0.5  # a constant row, and one of zeros
    x[1] = 0
    prepared, report, path = written(nn.Linear(80, 72), config, x, tmp_path)
    assert report.layers[0].form.startswith("MatMulInteger"), report
    assert_same(prepared, path, x)


class Shares(nn.Module):
    """One activation for two products, one of whose weights has blocks, and a product by a matrix on the right."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.w = nn.Linear(80, 72), nn.Linear(80, 72), nn.Parameter(torch.randn(72, 80) / 9)

    def forward(self, x):
        return self.a(x).tanh() + self.b(x).tanh() + (self.a(x) @ self.w)[..., :72]


def test_codes_are_made_once_and_floats_where_they_are_needed(tmp_path):
    torch.manual_seed(0)
    spec = qgraph.QuantSpec(4, granularity="token")
    blocks = qgraph.QConfig(weight=qgraph.QuantSpec(4, granularity="block", group_size=32), activation=spec)
    config = qgraph.QConfig.parse("A4W4").with_rules(qgraph.Rule("b", blocks))
    x = torch.randn(2, 5, 80)
    prepared, report, path = written(Shares(), config, x, tmp_path)
    forms = {layer.path + layer.operand: layer.form for layer in report.layers}
    assert forms["aweight"] == forms["w"] == "MatMulInteger uint8 x int8" and "Integer" not in forms["bweight"]
    assert_same(prepared, path, torch.randn(3, 5, 80))
    reason = "groups of 32"
    assert any(reason in note for layer in report.layers if layer.path == "b" for note in layer.notes)


def test_a_whole_model_at_other_sizes(tmp_path):
    torch.manual_seed(0)
    model, ids = GPT(33, 80, 2), torch.randint(0, 33, (2, 9))
    prepared, report, path = written(model, "A4W1", ids, tmp_path)
    assert sum(layer.form.startswith("MatMulInteger") for layer in report.layers) >= 8
    assert_same(prepared, path, torch.randint(0, 33, (3, 12)))
    assert report.to_json() and path.read_bytes() == _again(prepared, ids, tmp_path)


def _again(prepared, ids, tmp_path):
    qgraph.export(prepared, tmp_path / "b.onnx", (ids,), optimize_for="latency", progress=False)
    return (tmp_path / "b.onnx").read_bytes()


def test_what_stays_float(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(6, 80)
    for config, options in (("A8W4@tensor", {}), ("W4", {}), ("A8W8", {})):
        _, report, path = written(nn.Linear(80, 72), config, x, tmp_path, **options)
        assert "Integer" not in report.layers[0].form
        assert "MatMulInteger" not in {node.op_type for node in onnx.load(path).graph.node}
    prepared = qgraph.prepare(nn.Linear(80, 72), "A8W4", x).eval()
    for purpose in (None, "size"):
        report = qgraph.export(prepared, tmp_path / "c.onnx", (x,), optimize_for=purpose, progress=False)
        assert ("Integer" in report.layers[0].form) == (purpose is None)
        assert any("whole numbers are faster" in note for note in report.layers[0].notes) == (purpose is None)
    _, report, _ = written(nn.Linear(80, 72), "A8W8", x[:1], tmp_path, dynamic_shapes={})
    assert report.layers[0].form == "MatMulInteger uint8 x uint8"


def test_small_layers_stay_float(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic, "SMALLEST", 80 * 72 + 1)
    _, report, _ = written(nn.Linear(80, 72), "A8W4", torch.randn(6, 80), tmp_path)
    assert "Integer" not in report.layers[0].form
    assert any("small (below 5761 weights)" in note for note in report.layers[0].notes)
