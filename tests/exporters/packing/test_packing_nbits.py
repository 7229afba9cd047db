"""MatMulNBits fed from packed weights: the bytes it reads, its result, and nothing else left in the graph."""

from __future__ import annotations

import numpy as np
import pytest
from packing_cases import BITS, LEVELS, SPARSITIES, folded, make_weight, session

from qgraph.exporters.lowering.builder import MICROSOFT, GraphBuilder
from qgraph.exporters.packing import emit_nbits, nbits_for, nbits_shift, pack


def expected_fields(q, p, bits, block_size):
    """What MatMulNBits' documentation asks for, spelled out: (B, B - zero point), padded with 0."""
    n, k = p.rows
    levels = q.groups.sparsity_rows().to_rows(q.codes).numpy().astype(int)
    fields = np.zeros((n, -(-k // block_size) * block_size), int)
    fields[:, :k] = levels + nbits_shift(p, bits)
    per = 8 // bits
    packed = sum(fields.reshape(n, -1, per)[:, :, i] << (bits * i) for i in range(per))
    return packed.reshape(n, -1, block_size * bits // 8), fields[:, :k] - 2 ** (bits - 1)


def check(q, bits, block_size, tmp_path, **options):
    p = pack(q, **options)
    n, k = p.rows
    b = GraphBuilder(opset=21)
    x = b.input("x", np.float32, ("tokens", k))
    weight, scales = emit_nbits(b, p, "fc.weight", bits, block_size)
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block_size}
    y = b.op("MatMulNBits", [x, weight, scales], attributes, name="fc", domain=MICROSOFT)
    b.output(y, "y", np.float32, ("tokens", n))
    assert folded(b.model(), tmp_path / "optimized.onnx", LEVELS[1]) == ["MatMulNBits"]
    b.output(weight, "B", np.uint8)
    b.output(scales, "scales", np.float32)
    values = np.random.default_rng(0).standard_normal((3, k), dtype=np.float32)
    want, centred = expected_fields(q, p, bits, block_size)
    for level in LEVELS:
        got, fields, block_scales = session(b.model(), level).run(None, {"x": values})
        np.testing.assert_array_equal(fields, want)
        wide = np.repeat(block_scales, block_size, axis=1)[:, :k] * centred
        reference = values.astype(np.float64) @ wide.T
        # Float sums of k terms in another order: a few ulp of the largest sum of magnitudes.
        np.testing.assert_allclose(got, reference, atol=1e-6 * (np.abs(values) @ np.abs(wide).T).max() + 1e-7)
        if q.spec.scheme == "affine":  # the correction that is left to the caller
            size = q.groups.block or k
            shift = np.repeat(2 ** (q.spec.bits - 1) - q.zero_point.numpy(), size, axis=1)[:, :k]
            wide = wide + np.repeat(block_scales, block_size, axis=1)[:, :k] * shift
        rows = q.groups.sparsity_rows().to_rows(q.dequantize()).numpy()
        np.testing.assert_allclose(wide, rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", ["affine", "linear"])
def test_dense(bits, scheme, tmp_path):
    # Whole blocks, a ragged last one, rows that end inside a byte, groups of two blocks, one scale, K x N.
    cases = [
        ((8, 64), 0, "channel"),
        ((7, 52), 0, 16),
        ((9, 41), 0, 32),
        ((5, 80), 0, 32),
        ((4, 40), 0, "tensor"),
    ]
    for shape, axis, group in [*cases, ((40, 6), 1, "channel"), ((4, 5, 3, 2), 0, "channel")]:
        q = make_weight(bits, shape, scheme=scheme, axis=axis, group=group)
        narrowest = nbits_for(pack(q))
        for field in (2, 4, 8):
            if field >= narrowest:
                check(q, field, 16, tmp_path)
        check(q, narrowest, 16, tmp_path, align_rows=True)


@pytest.mark.parametrize("bits", [1, 1.58, 4])
@pytest.mark.parametrize("sparsity", [*SPARSITIES, "1:4", "4:8", "2:8"])
def test_sparse(bits, sparsity, tmp_path):
    for shape, group in [((8, 64), "channel"), ((7, 52), 16), ((9, 41), "channel")]:
        q = make_weight(bits, shape, sparsity=sparsity, group=group)
        for field in (2, 4, 8):
            if field >= nbits_for(pack(q)):
                check(q, field, 16, tmp_path)


def test_what_does_not_fit_is_refused():
    b = GraphBuilder()
    with pytest.raises(ValueError, match="use 4 bits"):
        emit_nbits(b, pack(make_weight(3, (4, 32))), "fc", 2, 16)
    with pytest.raises(ValueError, match="block_size=24"):
        emit_nbits(b, pack(make_weight(3, (4, 32))), "fc", 4, 24)
    with pytest.raises(ValueError, match="groups of 8"):
        emit_nbits(b, pack(make_weight(3, (4, 32), group=8)), "fc", 4, 16)


def test_full_width_weights_need_no_node():
    """Codes that are already MatMulNBits' fields go to it as they lie in the file."""
    for bits, scheme in [(2, "affine"), (4, "affine"), (4, "linear"), (8, "affine"), (8, "linear")]:
        b = GraphBuilder(opset=21)
        emit_nbits(b, pack(make_weight(bits, (4, 32), scheme=scheme, group=16)), "fc", bits, 16)
        assert [node.op_type for node in b.nodes] == ["Reshape"]
