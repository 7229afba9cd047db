"""N:M masks in every coding, rows M does not divide, by rows and in one run, in numpy and in onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
from packing_cases import LEVELS, session

from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.packing.dense import Bits
from qgraph.exporters.packing.nm import NMMask
from qgraph.exporters.packing.streams import Target

INT8, UINT8 = np.dtype(np.int8), np.dtype(np.uint8)
PATTERNS = [(n, m) for m in range(2, 33) for n in range(1, m)]


def signs(n, m, columns, random):
    """(4, columns) levels -1, 0, +1, at most n of every m not 0; all of them where the group is whole."""
    rows = np.zeros((4, columns), np.int16)
    for row in rows:
        for start in range(0, columns, m):
            places = start + random.permutation(min(m, columns - start))[:n]
            row[places] = random.choice([-1, 1], len(places))
    return rows


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("part", range(8))
def test_patterns(part, aligned):
    random = np.random.default_rng(part)
    stream = Bits.linear(1)
    for n, m in PATTERNS[part * 5 :: 40]:
        columns = 2 * m + int(random.integers(0, m))
        rows = signs(n, m, columns, random)
        coded = NMMask.encode(rows, n, m, aligned)
        assert coded is not None
        mask, data, kept = coded
        packed = stream.encode(kept)
        decoded = mask.decode(data, stream.decode(packed, kept.shape[1]), *rows.shape)
        np.testing.assert_array_equal(decoded, rows)

        b = GraphBuilder(opset=18)
        stored, where = b.initializer("packed", packed), b.initializer("mask", data)
        levels = stream.emit(b, stored, kept.shape[1], "unpack", Target(INT8))
        shape = (-1 if aligned else len(rows), columns)
        b.output(mask.emit(b, where, levels, Target(INT8).scalar(), shape, "unpack", aligned), "levels")
        field = next((bits for bits in (2, 4) if mask.has_fields(bits) and columns * bits % 8 == 0), None)
        if field is not None:
            codes = stream.emit(b, stored, kept.shape[1], "unpack", Target(UINT8, 2 ** (field - 1)))
            b.output(mask.emit_fields(b, where, codes, rows.shape, "unpack", field, aligned), "fields")
        levels, *fields = session(b.model(), LEVELS[0]).run(None, {})
        np.testing.assert_array_equal(levels, rows)
        if field is not None:
            per, size = 8 // field, columns * field // 8
            parts = (rows + 2 ** (field - 1)).reshape(len(rows), size, per).astype(int)
            want = sum(parts[:, :, i] << (field * i) for i in range(per))
            np.testing.assert_array_equal(fields[0][:, :size], want)


def test_a_group_that_is_too_full_is_refused():
    assert NMMask.encode(np.ones((2, 8), np.int16), 2, 4) is None
