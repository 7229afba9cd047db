"""Names that Python allows and code has to escape: captured, printed, exported, read back."""

from __future__ import annotations

import pickle

import torch
from torch import nn

import qgraph

NAMES = ('a"b', "c\\d", "e\nf")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(8, 8))
        self.register_parameter("w'\"x", nn.Parameter(torch.randn(8, 4)))

    def forward(self, x):
        for name in NAMES:
            x = torch.relu(getattr(self, name)(x))
        return x @ getattr(self, "w'\"x")


def test_names_with_quotes_and_escapes(tmp_path):
    torch.manual_seed(0)
    model, x = Named().eval(), torch.randn(3, 8)
    prepared = qgraph.prepare(model, "W4", x).eval()
    found = qgraph.inspect(prepared)
    assert not found.coverage.opaque and found.coverage.sites_quantized == 4
    assert r'getattr(self, "a\"b")' in str(found.graphs[""])
    assert torch.equal(pickle.loads(pickle.dumps(prepared))(x), prepared(x))
    with qgraph.disabled(prepared):
        assert torch.equal(prepared(x), model(x))
    report = qgraph.export(prepared, tmp_path / "model.onnx", (x,), progress=False)
    named = {f"{layer.path}.{layer.operand}".strip(".") for layer in report.layers}
    assert named == {*(f"{name}.weight" for name in NAMES), "w'\"x"}


class ByType(nn.Module):
    """Decides by the dtype of a weight in a Sequential, whose names are numbers."""

    def __init__(self):
        super().__init__()
        self.layers, self.scale = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.ParameterList([torch.rand(4)])

    def forward(self, x):
        wide = self.layers[0].weight.dtype == torch.float64 and self.scale[0].shape[0] == 4
        return self.layers(x.type(self.layers[0].weight.dtype)) * (2 if wide else 1) + self.scale[0]


def test_what_is_asked_of_a_weight_behind_a_number_is_a_guard():
    model, x = ByType(), torch.randn(3, 4)
    prepared = qgraph.prepare(model, "W4", x)
    assert not qgraph.inspect(prepared).coverage.opaque
    with qgraph.disabled(prepared):
        for dtype in (torch.float32, torch.float64, torch.float32):
            assert torch.equal(prepared.to(dtype)(x), model.to(dtype)(x))
    frozen = qgraph.freeze(prepared.eval())
    assert torch.equal(frozen(x), prepared(x))
