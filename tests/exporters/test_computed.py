"""Weights that a forward computes: from the inputs they are quantized in the file, from parameters they are its own."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import ExportError


class Hyper(nn.Module):
    """One network computes the weights of another from the inputs."""

    def __init__(self):
        super().__init__()
        self.hyper, self.main = nn.Linear(8, 8 * 4 + 4), nn.Linear(8, 4)

    def forward(self, x):
        p = self.hyper(x.mean(0))
        return torch.func.functional_call(self.main, {"weight": p[:32].view(4, 8), "bias": p[32:]}, (x,))


class HyperConv(nn.Module):
    """The same of a convolution, and with the weight turned round."""

    def __init__(self):
        super().__init__()
        self.make, self.conv, self.head = nn.Linear(3, 4 * 3 * 9), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        kernel = self.make(x.mean((0, 2, 3))).view(4, 3, 3, 3)
        y = torch.func.functional_call(self.conv, {"weight": kernel}, (x,)).mean((2, 3))
        return self.head(y)


def run(path, x):
    session = ort.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.mark.parametrize("target", ["ort", "standard"])
@pytest.mark.parametrize("config", ["W4", "A8W2", "W1@3", "W1.58@tensor", "W8"])
@pytest.mark.parametrize(("make", "shape"), [(Hyper, (5, 8)), (HyperConv, (2, 3, 6, 6))])
def test_weights_computed_from_the_inputs_are_quantized_for_each_input(tmp_path, make, shape, config, target):
    torch.manual_seed(0)
    x = torch.randn(shape)
    prepared = qgraph.prepare(make(), config, (x,)).eval()
    report = qgraph.export(prepared, tmp_path / "m.onnx", (x,), target=target, progress=False)
    assert any("computed from the inputs" in note for note in report.notes)
    for rows in (shape[0], shape[0] + 3):
        other = torch.randn(rows, *shape[1:])
        expected = prepared(other).detach().numpy()
        # A code of an activation may lie on a tie; weights have few codes, and none of them does here.
        allowed = 1e-5 if "A" not in config else 2e-2
        assert np.abs(run(tmp_path / "m.onnx", other) - expected).max() <= allowed * np.abs(expected).max()


@pytest.mark.parametrize("config", ["W4-2:4", "-50%"])
def test_pruned_weights_computed_from_the_inputs_are_refused(tmp_path, config):
    x = torch.randn(5, 8)
    prepared = qgraph.prepare(Hyper(), config, (x,)).eval()
    with pytest.raises(ExportError, match=r"main\.weight is computed from the model's inputs"):
        qgraph.export(prepared, tmp_path / "m.onnx", (x,), progress=False)
    assert not list(tmp_path.iterdir())


def test_what_computes_a_weight_from_parameters_is_not_in_the_file(tmp_path):
    x = torch.randn(5, 6)
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="matrix_exp")  # which ONNX has not
    prepared = qgraph.prepare(nn.Sequential(layer, nn.Linear(6, 2)), "W4", (x,)).eval()
    qgraph.export(prepared, tmp_path / "m.onnx", (x,), progress=False)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), prepared(x).detach().numpy(), atol=1e-5)


def test_what_a_trace_takes_off_the_example_for_good_is_found_by_other_values(tmp_path, monkeypatch):
    monkeypatch.setattr("qgraph.exporters.trace.names_from_inputs", lambda program: set())
    x = torch.randn(5, 8)
    prepared = qgraph.prepare(Hyper(), "W4", (x,)).eval()
    with pytest.raises(ExportError, match="on other values"):
        qgraph.export(prepared, tmp_path / "m.onnx", (x,), dynamic_shapes={}, progress=False)
    assert not list(tmp_path.iterdir())


class Adapted(nn.Module):
    """One network with its own weights, and with others that a step of learning makes of them."""

    def __init__(self):
        super().__init__()
        self.net, self.rate = (
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)),
            nn.Parameter(torch.tensor(0.1)),
        )

    def forward(self, x):
        own = dict(self.net.named_parameters())
        other = {name: value * (1 - self.rate) + 0.01 for name, value in own.items()}
        return self.net(x) + torch.func.functional_call(self.net, other, (x,)) * self.net(-x)


@pytest.mark.parametrize("config", ["W4", "A8W2", "W1-2:4", "-50%"])
def test_a_layer_that_is_called_with_other_weights_has_both_in_the_file(tmp_path, config):
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    prepared = qgraph.prepare(Adapted(), config, (x,)).eval()
    report = qgraph.export(prepared, tmp_path / "m.onnx", (x,), progress=False)
    names = {f"net.{i}.weight{call}" for i in (0, 2) for call in ("", "/2")}
    assert [layer.path for layer in report.layers].count("net.0") == 2
    assert set(qgraph.unpack(tmp_path / "m.onnx")) == names
    expected = prepared(x).detach().numpy()
    assert (
        np.abs(run(tmp_path / "m.onnx", x) - expected).max()
        <= (2e-2 if "A" in config else 1e-5) * np.abs(expected).max()
    )


class Both(Hyper):
    """A layer that is called with its own weights, and with others that are computed from the inputs."""

    def forward(self, x):
        return self.main(x) + super().forward(x)


def test_own_and_computed_weights_of_one_layer_are_refused(tmp_path):
    x = torch.randn(5, 8)
    prepared = qgraph.prepare(Both(), "W4", (x,)).eval()
    with pytest.raises(ExportError, match=r"main\.weight is called with weights that are computed"):
        qgraph.export(prepared, tmp_path / "m.onnx", (x,), progress=False)
    assert not list(tmp_path.iterdir())
