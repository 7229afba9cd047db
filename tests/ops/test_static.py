"""Quantization at a fixed range: against ONNX's own reference, and gradients against autograd."""

import numpy as np
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qgraph import ConfigError, QuantSpec
from qgraph.ops.static import fake_quantize_static, static_codes, static_gain, static_scale


def spec_of(bits: float, scheme: str, method: str = "ste") -> QuantSpec:
    return QuantSpec(bits, scheme, "tensor", method=method, range="static")  # type: ignore[arg-type]


def onnx_quantized(x: np.ndarray, step: float, zero: int, signed: bool) -> np.ndarray:
    """x behind QuantizeLinear and DequantizeLinear."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    kind = np.int8 if signed else np.uint8
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, x.shape)],
        [helper.make_tensor_value_info("y", 1, x.shape)],
        [
            helper.make_tensor("s", 1, (), [step]),
            helper.make_tensor("z", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), (), [zero]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


@pytest.mark.parametrize("scheme", ["affine", "linear"])
@pytest.mark.parametrize("seed", range(3))
def test_eight_bits_are_quantize_linear(scheme, seed):
    torch.manual_seed(seed)
    x = torch.randn(7, 33) * 2 + seed  # some of it outside the range
    spec = spec_of(8, scheme)
    step, zero = static_scale(torch.tensor(-1.5), torch.tensor(4.0), spec)
    y = fake_quantize_static(x, spec, step=step, zero=zero, gain=torch.ones(()))
    wanted = onnx_quantized(x.numpy(), float(step), int(zero), scheme == "linear")
    assert torch.equal(y, torch.from_numpy(wanted))


@pytest.mark.parametrize("low, high", [(0.0, 3.0), (-2.0, 0.0), (1.0, 3.0), (-3.0, -1.0), (0.0, 0.0)])
def test_zero_is_always_a_value(low, high):
    for spec in (spec_of(8, "affine"), spec_of(4, "affine"), spec_of(4, "linear")):
        step, zero = static_scale(torch.tensor(low), torch.tensor(high), spec)
        assert zero == zero.round() and spec.levels[0] <= zero <= spec.levels[1]
        assert fake_quantize_static(torch.zeros(3), spec, step=step, zero=zero, gain=torch.ones(())).eq(0).all()


def test_denoised_gradient_is_that_of_the_formula():
    torch.manual_seed(0)
    x = (torch.randn(200, dtype=torch.float64) * 2).requires_grad_()
    h = torch.randn(200, dtype=torch.float64)
    spec = spec_of(3, "affine", "ddt")
    step, zero = static_scale(torch.tensor(-2.0).double(), torch.tensor(3.0).double(), spec)
    (grad,) = torch.autograd.grad(fake_quantize_static(x, spec, step=step, zero=zero), x, h)
    f = x / step
    q = f + (static_codes(x, step, zero, spec) - f).detach()  # rounding and clipping are constants
    (wanted,) = torch.autograd.grad(q * step * static_gain(x, q, step, spec.lam), x, h)
    assert torch.allclose(grad, wanted, rtol=0, atol=1e-13)


def test_clipped_values_pass_no_gradient():
    spec = spec_of(8, "linear")
    step, zero = static_scale(torch.tensor(-1.0), torch.tensor(1.0), spec)
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0, float("nan")], requires_grad=True)
    y = fake_quantize_static(x, spec, step=step, zero=zero, gain=torch.ones(()))
    y.sum().backward()
    assert x.grad is not None and x.grad[:4].tolist() == [0, 1, 1, 0]
    assert y.isnan().tolist() == [False] * 4 + [True]


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "token"},
        {"granularity": "block", "group_size": 32},
        {"granularity": "tensor", "method": "lsq"},
        {"granularity": "tensor", "scheme": "linear", "bits": 2},
        {"granularity": "tensor", "bits": 1.58},
        {"granularity": "tensor", "range": "fixed"},
    ],
)
def test_what_a_static_range_does_not_take_is_refused(options):
    with pytest.raises(ConfigError, match="range"):
        QuantSpec(**{"bits": 8, "range": "static", **options})
