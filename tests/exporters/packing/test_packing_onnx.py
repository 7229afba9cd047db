"""The ONNX decoders: exact in onnxruntime and in onnx.reference, and folded to nothing at load time."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import BITS, SPARSITIES, folded, make_weight, run_everywhere

from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.packing import emit_codes, emit_float, pack

FORBIDDEN = {"Compress", "NonZero", "DequantizeLinear"}  # not folded, or shapes that depend on data


def decoder(q, opset, **options):
    b = GraphBuilder(opset=opset)
    p = pack(q, **options)
    if q.spec is not None:
        b.output(emit_codes(b, p, "fc.weight"), "codes")
    b.output(emit_float(b, p, "fc.weight"), "weight")
    model = b.model()
    onnx.checker.check_model(model, full_check=True)
    return p, model


def check(q, opset, **options):
    """Decode in every runtime and compare, bit for bit; floats too: all do one subtraction, one product."""
    _, model = decoder(q, opset, **options)
    wanted = ([] if q.codes is None else [q.codes.numpy()]) + [q.dequantize().numpy()]
    for results in run_everywhere(model, {}):
        for got, want in zip(results, wanted, strict=True):
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, want)
    assert not FORBIDDEN & {node.op_type for node in model.graph.node}
    assert {node.domain for node in model.graph.node} <= {""}
    return model


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", ["affine", "linear"])
@pytest.mark.parametrize("opset", [13, 18, 21])
def test_dense(bits, scheme, opset, tmp_path):
    for shape, axis, group in [
        ((24, 40), 0, "channel"),
        ((7, 13), 0, 4),
        ((9, 32), 0, 16),
        ((5, 4, 3), 1, "tensor"),
    ]:
        model = check(make_weight(bits, shape, scheme=scheme, axis=axis, group=group), opset)
        assert folded(model, tmp_path / "optimized.onnx") == []


@pytest.mark.parametrize("bits", [1, 1.58, 3, 8, None])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("opset", [13, 21])
def test_sparse(bits, sparsity, opset, tmp_path):
    for shape, axis, group in [((24, 96), 0, "channel"), ((7, 53), 0, 4), ((5, 6, 3, 3), 1, "channel")]:
        model = check(make_weight(bits, shape, sparsity=sparsity, axis=axis, group=group), opset)
        assert folded(model, tmp_path / "optimized.onnx") == []


def test_a_pattern_with_a_compact_table(tmp_path):
    """4:16 has 1820 patterns; on a weight of this size a table of bit masks pays, ranked at load time."""
    q = make_weight(1, (128, 1024), sparsity="4:16")
    p, _ = decoder(q, 13)
    assert p.format == "4:16+bits1"
    assert folded(check(q, 13), tmp_path / "optimized.onnx") == []


@pytest.mark.parametrize("shape", [(6, 10), (6, 5, 3), (6, 5, 3, 3), (4, 3, 2, 3, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_linear_and_convolution_shapes(shape, axis):
    check(make_weight(3, shape, axis=axis), 18)
    check(make_weight(3, shape, axis=axis, group=8), 18)
    check(make_weight(1, shape, axis=axis, sparsity="1:3"), 18)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from((*BITS, None)),
    scheme=st.sampled_from(["affine", "linear"]),
    sparsity=st.sampled_from((None, *SPARSITIES)),
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple)
    | st.tuples(st.integers(1, 9), st.integers(1, 60)),
    group=st.sampled_from(["channel", "tensor", 4]),
    align=st.booleans(),
    opset=st.sampled_from([14, 18, 21]),
    seed=st.integers(0, 10**6),
)
def test_any_weight(bits, scheme, sparsity, shape, group, align, opset, seed):
    sparsity = sparsity if bits is not None else sparsity or "2:4"
    axis = seed % 2 if len(shape) > 1 else 0
    q = make_weight(bits, shape, scheme=scheme, sparsity=sparsity, axis=axis, group=group, seed=seed)
    check(q, opset, align_rows=align)


@pytest.mark.parametrize("dtype", [ir.DataType.INT8, ir.DataType.UINT8])
def test_integer_codes(dtype):
    for bits, scheme, add in [
        (1, "linear", 1),
        (4, "linear", 8),
        (5, "affine", 0),
        (8, "affine", -128),
        (8, "linear", 128),
    ]:
        q = make_weight(bits, (6, 20), scheme=scheme)
        levels = q.codes.numpy().astype(int) + add
        info = np.iinfo(dtype.numpy())
        b = GraphBuilder(opset=18)
        if info.min <= levels.min() and levels.max() <= info.max:
            b.output(emit_codes(b, pack(q), "fc", dtype, add), "codes")
            for (codes,) in run_everywhere(b.model(), {}):
                assert codes.dtype == info.dtype
                np.testing.assert_array_equal(codes, levels)
        else:
            with pytest.raises(ValueError, match="fc: found levels"):
                emit_codes(b, pack(q), "fc", dtype, add)


def test_half_precision_scales():
    q = make_weight(4, (8, 64), group=16)
    p = pack(q, scale_dtype=np.float16)
    b = GraphBuilder()
    b.output(emit_float(b, p, "fc"), "weight")
    for (weight,) in run_everywhere(b.model(), {}):
        np.testing.assert_allclose(weight, q.dequantize().numpy(), rtol=2**-10)  # half an ulp of float16 is 2^-11


def test_tables_are_shared_and_a_weight_used_twice_is_stored_once():
    b = GraphBuilder()
    first, second = pack(make_weight(3, (8, 20))), pack(make_weight(3, (9, 20), seed=1))
    for name, p in (("a", first), ("b", second), ("a", first)):
        b.output(emit_float(b, p, name))
    names = [tensor.name for tensor in b.model().graph.initializer]
    assert sum(name.startswith("qgraph.lut") for name in names) == 2  # the planes of three bits
    assert {name for name in names if not name.startswith("qgraph.")} == {
        f"{layer}.{part}" for layer in "ab" for part in ("packed", "scale", "zero_point")
    }


def test_another_weight_under_the_same_name_is_refused():
    b = GraphBuilder()
    emit_float(b, pack(make_weight(3, (8, 20))), "a")
    with pytest.raises(ValueError, match=r"'a\.packed'"):
        emit_float(b, pack(make_weight(3, (8, 20), seed=1)), "a")
