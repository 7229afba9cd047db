"""unpack(pack(q)) is q, for every width, shape, group and sparsity; and no byte more than needed."""

from __future__ import annotations

from math import comb, log2, prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import BITS, SPARSITIES, make_weight, same

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.exporters.packing import pack, unpack
from qgraph.exporters.packing.dense import PLANES, Bits
from qgraph.exporters.packing.ternary import Ternary
from qgraph.ops.groups import Groups
from qgraph.ops.quantized import Quantized

shapes = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple) | st.tuples(
    st.integers(1, 12), st.integers(1, 70)
)


@settings(max_examples=300, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    scheme=st.sampled_from(["affine", "linear"]),
    shape=shapes,
    axis=st.integers(-1, 1),
    group=st.sampled_from(["channel", "tensor", 1, 4, 16, 128]),
    align=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_dense_weights_come_back(bits, scheme, shape, axis, group, align, seed):
    axis = axis if len(shape) > 1 else 0
    q = make_weight(bits, shape, scheme=scheme, axis=axis, group=group, seed=seed)
    p = pack(q, align_rows=align)
    assert same(unpack(p), q)
    assert p.mask is None and set(p.arrays) <= {"packed", "scale", "zero_point"}


@settings(max_examples=300, deadline=None)
@given(
    bits=st.sampled_from((*BITS, None)),
    sparsity=st.sampled_from(SPARSITIES)
    | st.tuples(st.integers(1, 32), st.integers(1, 32)).map(lambda t: f"{min(t)}:{max(t)}"),
    shape=shapes,
    axis=st.integers(-1, 1),
    group=st.sampled_from(["channel", "tensor", 4]),
    told=st.booleans(),
    align=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_sparse_weights_come_back(bits, sparsity, shape, axis, group, told, align, seed):
    axis = axis if len(shape) > 1 else 0
    q = make_weight(bits, shape, sparsity=sparsity, axis=axis, group=group, seed=seed)
    p = pack(q, sparsity=SparsitySpec.parse(sparsity) if told else None, align_rows=align)
    assert same(unpack(p), q)


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    shape=st.tuples(st.integers(1, 8), st.integers(1, 40)),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]),
    claim=st.sampled_from([None, "2:4", "1:8", "50%", "50%[2x2]"]),
    seed=st.integers(0, 10**6),
)
def test_zeros_anywhere_come_back_whatever_is_claimed(bits, shape, density, claim, seed):
    """Zeros among the kept, groups fuller than N, all pruned: never wrong, at worst larger."""
    q = make_weight(bits, shape, scheme="linear", seed=seed)
    assert q.codes is not None
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    q = Quantized(q.codes * kept, q.scale, None, q.groups, q.spec, True)
    assert same(unpack(pack(q, sparsity=SparsitySpec.parse(claim) if claim else None)), q)


def test_values_that_are_not_numbers_survive():
    values = torch.tensor([[0.0, float("nan"), float("inf"), 0.0, -1.5, 0.0, 0.0, 0.0]])
    q = Quantized(None, None, None, Groups("channel"), None, True, values)
    back = unpack(pack(q)).values
    assert back is not None
    torch.testing.assert_close(back, values, rtol=0, atol=0, equal_nan=True)


def test_a_binary_weight_that_holds_a_zero_is_still_exact():
    codes = torch.tensor([[1, -1, 0, 1]], dtype=torch.int16)
    q = Quantized(codes, torch.ones(1, 1), None, Groups("channel"), QuantSpec(1, "linear"), False)
    assert pack(q).format == "ternary"
    assert same(unpack(pack(q)), q)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(64, 96), (63, 97), (32, 16, 3, 3), (5, 7, 3, 3, 3)])
def test_dense_bytes_are_the_bits_and_no_more(bits, shape):
    for scheme in ("affine", "linear"):
        if bits == 1.58 and scheme == "affine":
            continue
        p = pack(make_weight(bits, shape, scheme=scheme))
        ternary = bits == 1.58 or (bits == 2 and scheme == "linear")  # levels -1, 0, 1 either way
        ideal = prod(shape) * (1.6 if ternary else bits) / 8
        # Each plane (each ternary lane) may end in a partial byte.
        assert p.code_nbytes <= ideal + (4 if ternary else len(PLANES[int(bits)]))
        parameters = shape[0] * 4 * (2 if scheme == "affine" else 1)
        assert p.nbytes == p.code_nbytes + parameters


# Over log2(C(M, N)) bits a group: what k patterns a byte, or whole bits a pattern, leave unused.
SLACK = {"1:2": 1.0, "1:4": 1.0, "2:4": 1.04, "3:7": 1.2, "1:8": 1.0, "2:8": 1.04, "4:8": 1.09, "1:16": 1.0}
SLACK |= {"2:16": 1.02, "4:16": 1.02, "8:16": 1.02, "2:32": 1.01, "4:32": 1.05, "8:32": 1.03, "16:32": 1.02}


@pytest.mark.parametrize("sparsity", SLACK)
@pytest.mark.parametrize("bits", [1, 4])
def test_n_of_m_bytes(sparsity, bits):
    n, m = map(int, sparsity.split(":"))
    # A large weight, so that what a file needs besides (a table, many nodes) does not decide.
    shape = (1024, 64 * m) if comb(m, n) > 256 else (64, 16 * m)
    q = make_weight(1, shape, sparsity=sparsity)
    assert q.codes is not None
    spec = QuantSpec(bits, "linear")
    q = Quantized(q.codes * (1 if bits == 1 else 5), q.scale, None, q.groups, spec, True)
    ideal = prod(shape) * (log2(comb(m, n)) + n * bits) / m / 8
    assert pack(q, sparsity=SparsitySpec.parse(sparsity)).code_nbytes <= ideal * SLACK[sparsity] + 8


@pytest.mark.parametrize("bits", [1, 4])
def test_unstructured_and_tile_bytes(bits):
    shape = (256, 256)
    for percent in (50, 70, 90, 96):
        p = pack(make_weight(bits, shape, sparsity=f"{percent}%"))
        assert p.code_nbytes <= prod(shape) * (1 + bits * (100 - percent) / 100) / 8 * 1.01
    assert 8 * pack(make_weight(bits, shape, sparsity="96%")).code_nbytes / prod(shape) < 0.41 + 0.04 * bits
    p = pack(make_weight(bits, shape, sparsity="75%[4x4]"))
    assert p.code_nbytes <= prod(shape) * (1 / 16 + bits / 4) / 8 * 1.01


def test_float_weights_that_are_sparse_only():
    p = pack(make_weight(None, (64, 64), sparsity="2:4"))
    assert p.format == "2:4+float" and p.code_nbytes <= 64 * 64 * (16 + 0.67) / 8 + 8


def test_scales_may_be_stored_in_half_precision():
    q = make_weight(4, (8, 64), group=16)
    p = pack(q, scale_dtype=np.float16)
    back = unpack(p)
    assert p.arrays["scale"].nbytes == 8 * 4 * 2
    assert q.scale is not None and back.scale is not None
    assert torch.equal(back.scale, q.scale.half().float())


def test_rows_that_fill_bytes_are_stored_by_rows_for_free():
    assert pack(make_weight(1, (5, 16))).lead == 5
    assert pack(make_weight(1, (5, 12))).lead == 1
    assert pack(make_weight(1, (5, 12)), align_rows=True).lead == 5


@pytest.mark.parametrize("stream", [*(Bits.affine(b) for b in range(1, 9)), Ternary()])
def test_the_code_of_a_level_follows_from_offset_and_step(stream):
    codes = np.arange(3 if isinstance(stream, Ternary) else 2**stream.bits)[None]
    levels = codes * stream.step + stream.offset
    assert np.array_equal(stream.decode(stream.encode(levels), levels.shape[1]), levels)
    assert stream.size(levels.shape[1]) == stream.encode(levels).shape[1]
