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
