"""Numbers of N:M patterns: one to one, below C(M, N), decoded alike by numpy and by the ONNX runtimes."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from packing_cases import folded, make_weight, run_everywhere

from qgraph.config import SparsitySpec
from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.packing import emit_codes, pack
from qgraph.exporters.packing.dense import pack_plane
from qgraph.exporters.packing.enumerative import decode, emit_bytes, encode


def patterns_of(n, m):
    """All patterns if they are few, else some."""
    if comb(m, n) > 20000:
        random = np.random.default_rng(0)
        return np.stack([random.permutation(np.arange(m) < n) for _ in range(500)])
    bits = np.zeros((comb(m, n), m), bool)
    for row, places in zip(bits, combinations(range(m), n), strict=True):
        row[list(places)] = True
    return bits


@pytest.mark.parametrize(("n", "m"), [(4, 8), (3, 10), (8, 9), (5, 12), (8, 16), (4, 17), (12, 24), (16, 32), (31, 32)])
def test_numbers(n, m):
    bits = patterns_of(n, m)
    numbers = encode(bits, n)
    assert numbers.min() >= 0 and numbers.max() < comb(m, n)
    assert len(set(numbers.tolist())) == len({row.tobytes() for row in bits})
    np.testing.assert_array_equal(decode(numbers, n, m), bits)
    b = GraphBuilder(opset=13)
    b.output(emit_bytes(b, b.initializer("numbers", numbers.astype(np.int32)), n, m, "mask"), "bytes")
    for (data,) in run_everywhere(b.model(), {}):
        np.testing.assert_array_equal(data, pack_plane(bits.astype(np.uint8), 1))


@pytest.mark.parametrize("sparsity", ["8:16", "4:32", "5:20"])
def test_a_weight_of_many_patterns(sparsity, tmp_path):
    shape = (512, 1011)
    q = make_weight(1, shape, sparsity=sparsity)
    p = pack(q, sparsity=SparsitySpec.parse(sparsity))
    assert p.format == f"{sparsity}+bits1"
    b = GraphBuilder(opset=18)
    b.output(emit_codes(b, p, "fc"), "codes")
    for (codes,) in run_everywhere(b.model(), {}):
        np.testing.assert_array_equal(codes, q.codes.numpy())
    assert folded(b.model(), tmp_path / "optimized.onnx") == []
