"""One weight in two roles, by other groups or other bits in each: two quantizers, two layers of the file."""

import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraph
from tests.models import GPT


class Mirrored(nn.Module):
    """Decodes with the encoder's weight turned round."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 4)

    def forward(self, x):
        return F.linear(self.encode(x).tanh(), self.encode.weight.t())


class MirroredConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Conv2d(3, 6, 4, 2, 1)

    def forward(self, x):
        return F.conv_transpose2d(self.encode(x).relu(), self.encode.weight, None, 2, 1)


@pytest.mark.parametrize("target", ["ort", "standard"])
@pytest.mark.parametrize("config", ["W2", "A4W1", "W8-2:4", "2:4"])
@pytest.mark.parametrize(("make", "shape"), [(Mirrored, (3, 6)), (MirroredConvolution, (2, 3, 8, 8))])
def test_a_decoder_with_the_encoders_weight(make, shape, config, target, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(shape)
    prepared = qgraph.prepare(make(), config, (x,)).eval()
    report = qgraph.export(prepared, tmp_path / "m.onnx", (x,), target=target, progress=False)
    assert {layer.sparsity for layer in report.layers if layer.path == "encode"} == {"2:4" if "2:4" in config else None}
    (out,) = ort.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), prepared(x), rtol=1e-4, atol=1e-5)
    assert sorted(qgraph.unpack(tmp_path / "m.onnx")) == ["encode.weight", "encode.weight:2"]


@pytest.mark.parametrize(
    ("head", "expected"), [("W8", (8, None)), ("W4-2:4", (4, "2:4")), ("2:4", (None, "2:4")), (None, None)]
)
def test_a_tied_head_with_a_config_of_its_own(head, expected, tmp_path):
    x = torch.randint(0, 33, (2, 7))
    config = qgraph.QConfig.parse("W4").with_rules(qgraph.Rule("head", head))
    prepared = qgraph.prepare(GPT(), config, (x,)).eval()
    report = qgraph.export(prepared, tmp_path / "m.onnx", (x,), progress=False)
    found = [(la.spec and la.spec.bits, la.sparsity) for la in report.layers if la.path == "wte"]
    assert found == [(4, None), *([] if expected is None else [expected])]
    fresh = qgraph.prepare(GPT(), config, (x,)).eval()
    fresh.load_state_dict(prepared.state_dict())
    assert torch.equal(fresh(x), prepared(x))


class SharesItsInput(nn.Module):
    """One value for several products, in a forward whose graph holds for one size: its Python is exported."""

    def __init__(self):
        super().__init__()
        self.w, self.t = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 2, 3))

    def forward(self, x):
        expanded = self.w.expand(x.shape[0], -1, -1)
        y = torch.baddbmm(x[:, None, :], x[:, None, :], expanded)[:, 0]
        return y + torch.mm(x, self.w) + torch.tensordot(x, self.t, dims=([1], [0])).flatten(1)


def test_an_export_of_python_has_a_quantizer_for_each_use_of_a_value(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    prepared = qgraph.prepare(SharesItsInput(), "A4W2", (x,)).eval()
    qgraph.export(prepared, tmp_path / "m.onnx", (x,), progress=False)
    (out,) = ort.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), prepared(x), rtol=1e-4, atol=1e-5)
