"""com.microsoft::MatMulNBits as the exporter uses it: exact at 4 bits, and faithful to int8 activations."""

import numpy as np
import onnxruntime as ort
import pytest
import torch

from qgraph.config import QuantSpec
from qgraph.exporters.lowering.activation import lower_activation
from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.lowering.linear import (
    INT8,
    block_sums,
    choose_kernel,
    emit_kernel,
    has_zero_points,
    reference,
)
from qgraph.exporters.packing import pack
from qgraph.modules import ActivationForm
from qgraph.ops import Groups, fake_quantize, quantize

INT8_SPEC = {block: QuantSpec(8, "linear", "block", block, method="ste") for block in (32, 64, 128)}


def product(q, axis, kernel, x, form=None, level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
    packed = pack(q)
    b = GraphBuilder(opset=20)
    value = b.input("x", np.float32, x.shape)
    if form is not None:
        value = lower_activation(b, value, form, "x")
    inputs = packed.shape[1 - axis]
    sums = block_sums(b, value, packed.groups, inputs, x.dim(), "x") if has_zero_points(packed) else None
    b.output(emit_kernel(b, packed, axis, kernel, value, sums, "w"), "y")
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    return ort.InferenceSession(b.model().SerializeToString(), options).run(None, {"x": x.numpy()})[0]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("inputs", [64, 100, 256])
@pytest.mark.parametrize(
    "spec", [QuantSpec(1), QuantSpec(1.58), QuantSpec(3), QuantSpec(4, granularity="block", group_size=32)]
)
def test_float_activations_are_exact(spec, inputs, axis):
    torch.manual_seed(0)
    w = torch.randn((96, inputs) if axis == 0 else (inputs, 96)) + 0.1
    q = quantize(w, spec, Groups.for_weight(spec, axis))
    kernel = choose_kernel(pack(q), axis, None)
    assert not isinstance(kernel, str) and (kernel.bits, kernel.accuracy) == (4, 0)
    x = torch.rand(2, 3, inputs)  # all positive: sums are as large as they can be
    dense = q.dequantize().double()
    want = (x.double() @ (dense.T if axis == 0 else dense)).numpy()
    assert np.abs(product(q, axis, kernel, x) - want).max() < 2e-6 * np.abs(want).max()


@pytest.mark.parametrize(
    "level", [ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL]
)
@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("inputs", [256, 200])  # 200: the last block is ragged
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [1.58, 2, 4, 8])
def test_int8_activations_are_what_was_trained(bits, block, inputs, tokens, level):
    torch.manual_seed(0)
    spec = QuantSpec(bits, granularity="block", group_size=block)
    form = ActivationForm(INT8_SPEC[block], Groups("token", 0, block))
    q = quantize(torch.randn(64, inputs), spec, Groups.for_weight(spec, 0))
    kernel = choose_kernel(pack(q), 0, form)
    assert not isinstance(kernel, str) and (kernel.accuracy, kernel.block) == (INT8, block)
    x = torch.randn(tokens, inputs) * 3
    x[0, 7] = 90.0  # an outlier
    want = fake_quantize(x, form.spec, form.groups).double() @ q.dequantize().double().T
    got = product(q, 0, kernel, x, form, level)
    assert np.abs(got - want.numpy()).max() < 5e-6 * want.abs().max().item()


def test_the_kernel_quantizes_as_its_reference_says():
    torch.manual_seed(0)
    spec = QuantSpec(4, "linear", "block", 32)
    q = quantize(torch.randn(64, 128), spec, Groups.for_weight(spec, 0))
    kernel = choose_kernel(pack(q), 0, ActivationForm(INT8_SPEC[32], Groups("token", 0, 32)))
    assert not isinstance(kernel, str)
    x = torch.randn(8, 128)
    want = reference(x.numpy(), 32) @ q.dequantize().double().numpy().T
    assert np.abs(product(q, 0, kernel, x) - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    ("spec", "shape", "axis", "reason"),
    [
        (QuantSpec(8), (64, 128), 0, "no exact kernel"),
        (QuantSpec(4), (16, 16), 0, "small"),
        (QuantSpec(4), (64, 128), 1, "do not run along"),
        (QuantSpec(4, granularity="block", group_size=24), (64, 144), 0, "no multiple of 32"),
        (None, (64, 128), 0, "pruned float"),
    ],
)
def test_where_there_is_no_faithful_kernel_it_says_why(spec, shape, axis, reason):
    w = torch.randn(shape)
    w[:, ::2] = 0
    q = quantize(w, spec, Groups.for_weight(spec, 0), dense=w if spec is None else None)
    assert reason in str(choose_kernel(pack(q), axis, None))
