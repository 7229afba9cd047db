"""Activation quantizers as ONNX nodes against `qgraph.ops.fake_quantize`, and the explanation of rounding
ties.
"""

import numpy as np
import onnxruntime as ort
import pytest
import torch

from qgraph.config import QuantSpec
from qgraph.exporters.lowering.activation import lower_activation, reference
from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.probe import relative_difference
from qgraph.exporters.ties import explain
from qgraph.modules import ActivationForm
from qgraph.ops import Groups, fake_quantize

SPECS = [
    *(QuantSpec(bits, granularity="token") for bits in range(1, 9)),
    *(QuantSpec(bits, "linear", "token") for bits in (1, 1.58, 2, 4, 8)),
    *(QuantSpec(bits, scheme, "token", method="ste") for bits in (1, 4, 8) for scheme in ("affine", "linear")),
    *(QuantSpec(bits, "linear", "token", method="ste", scale="absmean") for bits in (1, 1.58, 4)),
    *(
        QuantSpec(bits, granularity="token", method=m, scale="windowed")
        for m in ("ddt", "ste")
        for bits in (1, 1.58, 2)
    ),
    *(QuantSpec(bits, granularity="token", scale="absmean") for bits in (1, 4)),
    *(QuantSpec(bits, granularity="tensor", method="seq") for bits in (1, 1.58, 2)),
    QuantSpec(1, "linear", "tensor", method="seq"),
    *(QuantSpec(bits, scheme, "tensor", method="lsq") for bits in (1, 4) for scheme in ("affine", "linear")),
    QuantSpec(2, granularity="token", lam=0.0),
]
LAYOUTS = {
    "token": (Groups("token"), (3, 4, 10), None),
    "ragged": (Groups("token", 0, 4), (3, 4, 10), None),
    "whole blocks": (Groups("token", 0, 5), (3, 4, 10), None),
    "one long block": (Groups("token", 0, 64), (3, 4, 10), None),
    "dynamic length": (Groups("token", 0, 4), (3, 4, 10), (None, None, None)),
    "sample": (Groups("channel", 0), (3, 4, 5, 5), ("batch", 4, 5, 5)),
    "sample blocks": (Groups("channel", 0, 32), (3, 4, 5, 5), ("batch", 4, 5, 5)),
    "dynamic sample": (Groups("channel", 0, 32), (3, 4, 5, 5), ("batch", 4, None, None)),
    "channel in the middle": (Groups("channel", 1, 8), (3, 4, 5, 5), None),
    "tensor": (Groups("tensor"), (3, 4, 10), None),
}


def run(form, x, shape=None):
    b = GraphBuilder(opset=18)
    value = b.input("x", np.float32, shape or x.shape)
    b.output(lower_activation(b, value, form, "site"), "y")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(b.model().SerializeToString(), options)
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def nodes(form, shape):
    b = GraphBuilder(opset=18)
    b.output(lower_activation(b, b.input("x", np.float32, shape), form, "site"), "y")
    return [node.op_type for node in b.graph if node.op_type != "Expand"]


def form_of(spec, groups):
    return ActivationForm(spec, groups, torch.tensor([[0.23]]) if spec.learns else None)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_method_and_width(spec):
    groups = Groups("tensor") if spec.learns else Groups("token")
    form = form_of(spec, groups)
    x = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)) * 3 + 0.2
    y, want = run(form, x), fake_quantize(x, spec, groups, step=form.step)
    found = explain(x, y, x, form)
    assert found.unexplained < 2e-6  # float32 sums over 33 values
    assert found.flips or relative_difference(want, y) < 2e-6
    rows = x.reshape(1, -1) if spec.learns else x
    step = None if form.step is None else 0.23
    by_hand = np.stack([reference(row.numpy(), spec, step) for row in rows]).reshape(x.shape)
    off = np.abs(by_hand - y.numpy()) > 1e-5 * np.abs(x).max().item()
    assert off.mean() < 0.1  # a row where a code sits on a tie


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(1.58), QuantSpec(8, "linear", method="ste")], ids=str)
def test_every_layout(layout, spec):
    groups, shape, declared = LAYOUTS[layout]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    y, want = run(ActivationForm(spec, groups), x, declared), fake_quantize(x, spec, groups)
    found = explain(x, y, x, ActivationForm(spec, groups))
    assert found.unexplained < 2e-6
    assert found.flips or relative_difference(want, y) < 2e-6


@pytest.mark.parametrize("length", [2, 33, 512, 513, 4096])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_short_rows_take_fewer_nodes_and_long_ones_are_as_exact(bits, length):
    """LayerNormalization in the place of six nodes: its sums are less exact the longer a row is."""
    form = ActivationForm(QuantSpec(bits, granularity="token"), Groups("token"))
    assert ("LayerNormalization" in nodes(form, (20, length))) == (length <= 512)
    assert "LayerNormalization" not in nodes(form, (20, None))
    rng = np.random.default_rng(length)
    x = torch.from_numpy(np.concatenate([rng.normal(5, 1, (10, length)), -np.exp(rng.normal(0, 2, (10, length)))]))
    x = x.float()
    found = explain(x, run(form, x), x, form)
    assert found.unexplained < 5e-6  # float32 sums over thousands of values that are not alike


@pytest.mark.parametrize(
    "spec", [QuantSpec(1), QuantSpec(2, scale="windowed"), QuantSpec(4), QuantSpec(8, "linear", method="ste")], ids=str
)
def test_constant_groups_and_zeros(spec):
    x = torch.stack([torch.zeros(8), torch.full((8,), -2.5), torch.arange(8.0)])
    y = run(ActivationForm(spec, Groups("token")), x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, fake_quantize(x, spec, Groups("token")), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", ["minmax", "absmean"])
@pytest.mark.parametrize("bits", [1, 1.58, 2, 8])
def test_a_group_of_zeros_stays_zero(bits, scale):
    """Binary codes have no 0: the step has to be 0. Divided by is a guarded step, multiplied by the true one."""
    spec, x = QuantSpec(bits, "linear", "token", method="ste", scale=scale), torch.zeros(3, 8)
    x[1] = torch.arange(8.0) - 3
    form = ActivationForm(spec, Groups("token"))
    y = run(form, x)
    assert torch.equal(y[[0, 2]], torch.zeros(2, 8)) and y[1].abs().sum() > 0
    torch.testing.assert_close(y, fake_quantize(x, spec, Groups("token")), rtol=1e-6, atol=1e-6)
    assert explain(x, y, x, form).unexplained < 1e-6
    assert (reference(x[0].numpy(), spec) == 0).all()
    assert explain(x, y + 0.5, x, form).unexplained > 0.1


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("groups", "sizes"),
    [
        (Groups("token"), (3, 4096)),
        (Groups("token"), (3, 9000)),
        (Groups("channel", 0), (3, 64, 32, 32)),
        (Groups("channel", 0), (3, 16, 2500)),
        (Groups("channel", 1), (40, 3, 40)),
        (Groups("tensor"), (6, 2000)),
    ],
    ids=str,
)
def test_long_groups_of_mostly_zeros_are_exact(groups, sizes, bits):
    """As behind a ReLU: added up one by one, each of many equal values would be rounded the same way."""
    x = torch.rand(sizes, generator=torch.Generator().manual_seed(0))
    x[torch.rand(sizes, generator=torch.Generator().manual_seed(1)) < 0.94] = 0
    form = form_of(QuantSpec(bits), groups)
    for shape in (sizes, ("batch", *sizes[1:])):
        assert explain(x, run(form, x, shape), x, form).unexplained < 2e-6


def test_a_short_row_takes_thirteen_nodes():
    assert len(nodes(ActivationForm(QuantSpec(4, granularity="token"), Groups("token")), (3, 8))) == 13
    assert len(nodes(ActivationForm(QuantSpec(4, granularity="token", lam=0.0), Groups("token")), (3, 8))) == 20


def test_nan_is_not_hidden():
    x = torch.randn(3, 8)
    x[1, 2] = float("nan")
    y = run(ActivationForm(QuantSpec(4), Groups("token")), x)
    assert y[1].isnan().any() and torch.isfinite(y[[0, 2]]).all()


def test_a_flip_on_a_tie_is_explained_and_one_off_a_tie_is_not():
    spec, groups = QuantSpec(2, "affine", "token", method="ste"), Groups("token")
    form = ActivationForm(spec, groups)
    x = torch.tensor([[0.0, 3.0, 0.5, 1.2]])  # 0.5 is on the tie between 0 and 1
    want = fake_quantize(x, spec, groups)
    on_tie, off_tie = want.clone(), want.clone()
    on_tie[0, 2] = 1.0
    off_tie[0, 3] = 2.0
    assert explain(x, on_tie, x, form).unexplained < 1e-6 and explain(x, on_tie, x, form).flips == 1
    assert explain(x, want, x, form).flips == 0
    assert explain(x, off_tie, x, form).unexplained > 0.1


def test_a_ddt_flip_moves_its_whole_group_and_is_still_explained():
    spec, groups = QuantSpec(2, "affine", "token", scale="minmax"), Groups("token")
    form = ActivationForm(spec, groups)
    x = torch.tensor([[0.0, 3.0, 0.5 + 1e-6, 1.2]])
    other = torch.tensor([[0.0, 3.0, 0.5 - 1e-6, 1.2]])
    y = fake_quantize(other, spec, groups)
    assert relative_difference(fake_quantize(x, spec, groups), y) > 0.05
    found = explain(x, y, x, form)
    assert found.unexplained < 1e-5 and found.flips == 1
    assert explain(x, y * 1.01, x, form).unexplained > 1e-3
