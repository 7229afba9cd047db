"""Static activations in files: integer products against numpy, chains of convolutions, rounding ties."""

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qgraph
from qgraph import ExportError, QuantSpec
from qgraph.exporters.lowering import chains
from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.lowering.integer import (
    Codes,
    Window,
    emit_convolution,
    emit_product,
    is_signed,
    reference,
    stretch,
    why_not,
)
from qgraph.exporters.packing import pack
from qgraph.exporters.ties_static import explain_static
from qgraph.modules import ActivationForm
from qgraph.ops import Groups, quantize
from qgraph.ops.static import FixedScale
from qgraph.runtime import verify


def packed_weight(shape, bits, scheme, axis=0, granularity="channel"):
    torch.manual_seed(int(bits))
    spec = QuantSpec(bits, scheme, granularity)
    return pack(quantize(torch.randn(shape), spec, Groups.for_weight(spec, axis)))


def run(b, y, feeds, optimize=True):
    b.output(y, "y", np.float32, [None] * 2 if len(y.shape or (1, 1)) == 2 else None)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(b.model().SerializeToString(), options).run(None, feeds)[0]


@pytest.mark.parametrize("microsoft", [True, False])
@pytest.mark.parametrize(
    ("bits", "scheme", "axis", "top", "granularity"),
    [
        (8, "linear", 0, 255, "channel"),
        (7, "linear", 1, 255, "channel"),
        (8, "linear", 0, 127, "tensor"),
        (8, "affine", 0, 255, "channel"),
        (7, "affine", 1, 255, "channel"),
        (3, "affine", 0, 15, "tensor"),
        (1, "affine", 0, 255, "channel"),
        (1.58, "linear", 0, 255, "channel"),
        (1, "linear", 1, 255, "channel"),
    ],
)
def test_products_are_exact_over_the_whole_range(bits, scheme, axis, top, granularity, microsoft):
    shape = (96, 128) if axis == 0 else (128, 96)
    packed = packed_weight(shape, bits, scheme, axis, granularity)
    assert why_not(packed, axis, top) is None
    x = (
        np.random.default_rng(0).choice([0, 1, top - 1, top], (5, 128)).astype(np.uint8)
    )  # sums of pairs at their limits
    bias = np.random.default_rng(1).standard_normal(96).astype(np.float32)
    b = GraphBuilder(opset=18)
    codes = Codes(b.input("x", np.uint8, (5, 128)), 0.02, top // 3, top)
    y = emit_product(b, codes, packed, axis, "fc.weight", b.initializer("bias", bias), None, microsoft)
    q = qgraph.exporters.packing.unpack(packed)
    levels = q.codes.numpy() if axis == 0 else q.codes.numpy().T
    scale = np.broadcast_to(q.scale.numpy().reshape(-1), (96,))
    zero = np.zeros(96) if q.zero_point is None else np.broadcast_to(q.zero_point.numpy().reshape(-1), (96,))
    wanted = reference(x, levels, scale, zero, 0.02, top // 3) + bias
    got = run(b, y, {"x": x}, optimize=microsoft)
    assert np.abs(got - wanted).max() <= 2e-6 * np.abs(wanted).max()


def test_int8_weights_only_where_no_kernel_saturates():
    seven, eight = packed_weight((64, 64), 7, "linear"), packed_weight((64, 64), 8, "linear")
    assert is_signed(seven, 255) and is_signed(eight, 127) and not is_signed(eight, 255)
    for packed, top in ((seven, 255), (packed_weight((64, 64), 1.58, "linear"), 255), (seven, 15)):
        factor = stretch(packed, top)
        assert 2 * top * factor * packed.levels[1] <= 2**15 - 1 and factor * packed.levels[1] <= 127


@pytest.mark.parametrize(
    ("kernel", "strides", "pads", "dilations"),
    [((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)), ((3, 2), (2, 1), (1, 0, 2, 1), (1, 2)), ((1, 1), (2, 2), (0,) * 4, (1, 1)),
     ((5,), (2,), (3, 1), (2,))],
)  # fmt: skip
def test_windows_are_a_convolution(kernel, strides, pads, dilations):
    packed = packed_weight((24, 16, *kernel), 5, "linear")
    sizes = (11, 9)[: len(kernel)]
    x = np.random.default_rng(0).integers(0, 256, (2, 16, *sizes)).astype(np.uint8)
    b = GraphBuilder(opset=18)
    window = Window(kernel, strides, pads, dilations, 1)
    codes = Codes(b.input("x", np.uint8, x.shape), 0.5, 100, 255)
    y = emit_convolution(b, codes, packed, window, "c.weight", None, None, True)
    y.shape = None
    values = torch.from_numpy((x.astype(np.float64) - 100) * 0.5)
    rank = len(kernel)
    around = [side for i in reversed(range(rank)) for side in (pads[i], pads[rank + i])]
    weight = qgraph.exporters.packing.unpack(packed).dequantize().double()
    convolve = F.conv2d if rank == 2 else F.conv1d
    wanted = convolve(F.pad(values, around), weight, stride=strides, dilation=dilations).numpy()
    got = run(b, y, {"x": x})
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()


class Net(nn.Module):
    """A convolution before another, with batch norm (some factors negative), pooling and a clip; one that ends in a
    sum; Linear layers; a parameter that the model's own forward multiplies with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64)
        self.second, self.third = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.fc, self.w = nn.Linear(64 * 4, 64), nn.Parameter(torch.randn(64, 70) * 0.1)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu6(self.norm(self.first(x))), 2, 1, 1)
        z = self.second(y).relu()
        z = z + self.third(z)
        return self.fc(z[:, :, :2, :2].flatten(1)).sigmoid() @ self.w


def prepared(config):
    torch.manual_seed(0)
    model = qgraph.prepare(Net(), config)
    model.train()
    for _ in range(2):
        model(torch.randn(4, 32, 8, 8))
    return model.eval()


@pytest.mark.parametrize(("config", "target"), [("A8sW7", "ort"), ("A8sW8", "standard")])
def test_a_model_of_static_activations_is_what_was_trained(config, target, tmp_path):
    model = prepared(config)
    x = torch.randn(3, 32, 8, 8)
    report = qgraph.export(model, tmp_path / "m.onnx", (x,), target=target, progress=False)
    assert report.max_difference <= 1e-5
    assert verify(tmp_path / "m.onnx", model, (x,)).max_difference <= 1e-5 or report.flips
    forms = {layer.path or "w": layer.form for layer in report.layers}
    kind = "MatMulIntegerToFloat" if target == "ort" else "MatMulInteger"
    narrow = "uint8" if config == "A8sW8" else "int8"
    windows, direct = f"windows, {kind} uint8 x {narrow}", f"{kind} uint8 x {narrow}"
    assert forms["first"] == f"QLinearConv uint8 x {narrow}"
    assert (forms["second"], forms["third"], forms["fc"], forms["w"]) == (windows, windows, direct, direct)
    plain = onnx.inliner.inline_local_functions(onnx.load(tmp_path / "m.onnx"))
    domains = {node.domain for node in plain.graph.node}
    assert domains == ({"", "com.microsoft"} if target == "ort" else {""})
    weight = qgraph.unpack(tmp_path / "m.onnx")["second.weight"].weight
    assert np.array_equal(weight, model.second.qgraph.weight(model.second.weight).detach().numpy())


class Twice(nn.Module):
    """One convolution called twice, its second result alone seen by a static quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.last = (nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(self.twice(x) + 1).relu())


def test_the_calls_of_a_layer_are_told_apart(tmp_path):
    torch.manual_seed(0)
    model, x = qgraph.prepare(Twice(), "A8sW7"), torch.randn(2, 64, 6, 6)
    qgraph.calibrate(model, [x])
    report = qgraph.export(model, tmp_path / "m.onnx", (x,), dynamic_shapes={}, progress=False)
    assert report.max_difference <= 1e-5
    kernel = "MatMulIntegerToFloat uint8 x int8"
    assert report.layers[0].form == f"QLinearConv uint8 x int8; windows, {kernel}"


def test_groups_of_a_block_keep_the_float_product_and_say_so(tmp_path):
    torch.manual_seed(0)
    model = qgraph.prepare(nn.Linear(64, 64), "A8sW4@32")
    x = torch.randn(3, 64)
    qgraph.calibrate(model, [x])
    (layer,) = qgraph.export(model, tmp_path / "m.onnx", (x,), target="standard", progress=False).layers
    assert layer.form == "unpacked bits4"
    assert "one scale a channel is what integer products take, found groups of 32" in layer.notes[0]


def test_a_wrong_bias_is_no_rounding_tie(tmp_path, monkeypatch):
    plain = chains.affine_of

    def off(conv, outputs):
        found = plain(conv, outputs)
        return found if found.bias is None else chains.Affine(found.last, found.gain, found.bias + np.float32(0.02))

    model, x = prepared("A8sW7"), torch.randn(3, 32, 8, 8)
    monkeypatch.setattr(chains, "affine_of", off)
    with pytest.raises(ExportError, match="the first layer that differs"):
        qgraph.export(model, tmp_path / "m.onnx", (x,), progress=False)


def test_only_codes_next_to_a_tie_may_differ():
    spec = QuantSpec(4, "affine", "tensor", method="ste", range="static")
    form = ActivationForm(spec, Groups("tensor"), fixed=FixedScale(1.0, 3))
    x = torch.tensor([0.0, 1.4999, 1.4, 40.0, -9.0])
    right = torch.tensor([0.0, 1.0, 1.0, 12.0, -3.0])
    assert explain_static(x, right, x, form, 1e-3).unexplained == 0
    tied = right + torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    assert explain_static(x, tied, x, form, 1e-3).flips == 1
    assert explain_static(x, tied, x, form, 1e-3).unexplained == 0
    for i in (0, 2, 3, 4):
        wrong = right.clone()
        wrong[i] += 1
        assert explain_static(x, wrong, x, form, 1e-3).unexplained == float("inf")
