"""Rounding: a code on a tie may go the other way and no other, and a kernel that rounds too much gives way."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

import qgraph
from qgraph.exporters import onnx as exporter
from qgraph.exporters.lowering import graph as lowering
from qgraph.exporters.onnx import export
from qgraph.exporters.verify import Verifier, WrongFile
from tests.exporters.test_export_failures import damage_every_file, refuses

TIE = torch.cat([torch.tensor([[0.0, 3.0, 0.5, 1.2]]), torch.rand(5, 4) * 3])  # the third value is on a tie


def push_first_quantizer(push, monkeypatch):
    """Have every file add a little to the first quantizer's positions before they are rounded."""
    push_first("Round", push, monkeypatch)


def push_first(op_type, push, monkeypatch):
    """Have every file add a little to what reaches its first node of a kind; files without one stay as they are."""
    lower = exporter.lower

    def lower_pushed(model, *args, **kwargs):
        lowered = lower(model, *args, **kwargs)
        pushed = next((node for node in model.graph if node.op_type == op_type), None)
        if pushed is None:
            return lowered
        amount = ir.tensor(np.float32(push), name="push")
        model.graph.register_initializer(ir.Value(name="push", const_value=amount))
        add = ir.node("Add", [pushed.inputs[0], model.graph.initializers["push"]], name="pushed")
        add.outputs[0].name = "pushed"
        model.graph.insert_before(pushed, add)
        pushed.replace_input_with(0, add.outputs[0])
        return lowered

    monkeypatch.setattr(exporter, "lower", lower_pushed)


TWO_BITS = qgraph.QConfig(qgraph.QuantSpec(4), qgraph.QuantSpec(2, granularity="token", scale="minmax"))


@pytest.mark.parametrize(("push", "accepted"), [(1e-5, True), (0.3, False)])
def test_a_code_on_a_tie_may_go_the_other_way_and_no_other(push, accepted, tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = qgraph.prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), TWO_BITS, (TIE,))
    push_first_quantizer(push, monkeypatch)
    if not accepted:
        error = refuses(net, tmp_path / "m.onnx", (TIE,), match="the first layer that differs is 0")
        assert "quantizer" in str(error)
        return
    report = export(net, tmp_path / "m.onnx", (TIE,), dynamic_shapes={})
    assert report.flips == 1 and "1 activation codes on a rounding tie" in " ".join(str(report).split())
    got = ort.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"input": TIE.numpy()})[0]
    off = np.abs(got - net.eval()(TIE).detach().numpy()).max(1) > 1e-4
    assert off.tolist() == [True, False, False, False, False, False]


@pytest.mark.parametrize(("times", "accepted"), [(-1, True), (3, False)])
def test_a_run_with_other_flips_may_be_as_far_off_as_the_one_that_is_proven(times, accepted, tmp_path, monkeypatch):
    """A fused run rounds other codes the other way than the run that is compared quantizer by quantizer."""
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[:, 2] = 10  # of the value on a tie: its flip outweighs the rest
    net = qgraph.prepare(layer, TWO_BITS, (TIE[:1],)).eval()
    push_first_quantizer(1e-5, monkeypatch)
    plain = Verifier._outputs

    def elsewhere(self, session, example):
        (found,), (expected,) = plain(self, session, example), example.reference
        return [expected.numpy() + times * (found - expected.numpy())]

    monkeypatch.setattr(Verifier, "_outputs", elsewhere)
    if accepted:
        assert export(net, tmp_path / "m.onnx", (TIE[:1],), dynamic_shapes={}).flips == 1
    else:
        refuses(net, tmp_path / "m.onnx", (TIE[:1],), match="layers that were compared one by one agree")


class CallsTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.second(h) + torch.tanh(self.second(h * h))


def test_a_tie_before_a_layer_that_is_called_twice(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = qgraph.prepare(CallsTwice(), TWO_BITS, (TIE,))
    push_first_quantizer(1e-5, monkeypatch)
    report = export(net, tmp_path / "m.onnx", (TIE,), dynamic_shapes={})
    assert report.flips >= 1 and max(layer.max_difference for layer in report.layers) < 1e-4


def test_a_layer_that_is_called_twice_and_wrong_is_named(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = qgraph.prepare(CallsTwice(), "W4", (TIE,))
    damage_every_file("second.weight.packed", monkeypatch, byte=0)
    refuses(net, tmp_path / "m.onnx", (TIE,), match="the first layer that differs is second")


@pytest.mark.parametrize(
    ("layer", "config", "purpose", "kernel", "plain"),
    [
        (nn.Linear(64, 96), "W4", "size", "MatMulNBits", "unpacked bits4"),
        (nn.Linear(512, 512), "A4W1", None, "MatMulInteger", "unpacked bits1"),
    ],
)
def test_a_kernel_that_rounds_too_much_gives_way(tmp_path, monkeypatch, layer, config, purpose, kernel, plain):
    torch.manual_seed(0)
    x = torch.randn(3, layer.in_features)
    net = qgraph.prepare(layer, config, (x,))
    build = exporter._build

    def build_or_complain(job, *args):
        built = build(job, *args)
        if job.options.float_kernels:
            assert kernel in built.report.layers[0].form
            raise WrongFile("rounded too much", shape_only=False, rounding=True)
        return built

    monkeypatch.setattr(exporter, "_build", build_or_complain)
    monkeypatch.setattr(lowering, "LARGE", 1)  # codes of large weights are let go once packed: made again
    report = export(net, tmp_path / "m.onnx", (x,), optimize_for=purpose)
    assert report.layers[0].form == plain and "rounded too much" in report.layers[0].notes[0]


@pytest.mark.parametrize(("push", "accepted"), [(3e-4, True), (0.1, False)])
def test_so_does_one_that_a_layer_alone_shows(push, accepted, tmp_path, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    net = qgraph.prepare(nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 3)), "W4", (x,))
    with torch.no_grad():
        net[2].bias += 3.0  # the outputs show less of it
    push_first("MatMulNBits", push, monkeypatch)
    if accepted:
        assert export(net, tmp_path / "m.onnx", (x,), optimize_for="size").layers[0].form == "unpacked bits4"
    else:
        refuses(net, tmp_path / "m.onnx", (x,), optimize_for="size", match="the first layer that differs is 0")
