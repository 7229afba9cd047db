"""Rows gathered from a packed embedding equal rows of the float table; the table itself is never unpacked."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from packing_cases import BITS, LEVELS, folded, make_weight, run_everywhere

from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.packing import emit_float, emit_gather_rows, pack

INDICES = [np.array([[0, 3, 3], [5, 1, 2]]), np.zeros((1, 1), np.int64), np.zeros((0, 2), np.int64)]


def gathering(p, shape, opset):
    b = GraphBuilder(opset=opset)
    indices = b.input("indices", np.int64, ("batch", "length"))
    rows = emit_gather_rows(b, p, "embedding.weight", indices)
    b.output(rows, "rows", np.float32, ("batch", "length", shape[1]))
    return b


@pytest.mark.parametrize("bits", (*BITS, None))
@pytest.mark.parametrize("sparsity", [None, "2:4", "70%"])
@pytest.mark.parametrize("align", [False, True])
def test_rows(bits, sparsity, align):
    if bits is None and sparsity is None:
        pytest.skip("nothing is quantized or pruned")
    for shape, group in [((24, 40), "channel"), ((7, 13), 4), ((9, 32), 16), ((6, 40), "tensor")]:
        q = make_weight(bits, shape, sparsity=sparsity, group=group)
        model = gathering(pack(q, align_rows=align), shape, 13 if align else 21).model()
        for indices in INDICES:
            for (rows,) in run_everywhere(model, {"indices": indices}):
                np.testing.assert_array_equal(rows, q.dequantize().numpy()[indices])


@pytest.mark.parametrize("bits", BITS)
def test_the_table_stays_packed(bits, tmp_path):
    p = pack(make_weight(bits, (50, 48)), align_rows=True)
    model = gathering(p, (50, 48), 18).model()
    operators = folded(model, tmp_path / "optimized.onnx", LEVELS[1])
    assert "Gather" in operators
    biggest = max(p.arrays["packed"].nbytes, p.arrays["scale"].nbytes, 256 * 8 * 4)  # a float table of one bit plane
    for tensor in onnx.load(str(tmp_path / "optimized.onnx")).graph.initializer:
        assert onnx.numpy_helper.to_array(tensor).nbytes <= biggest


def test_pruned_tables_stay_pruned():
    """N:M goes by rows too, so a sparse embedding is as small as any other sparse weight."""
    q = make_weight(4, (50, 48), sparsity="2:4")
    p = pack(q, align_rows=True)
    assert p.format == "2:4+bits4" and p.aligned
    assert p.code_nbytes == 50 * (48 * 4 // 2 // 8 + 4)  # 12 groups a row, three patterns a byte
    model = gathering(p, (50, 48), 18).model()
    assert sum(tensor.name == "embedding.weight.mask" for tensor in model.graph.initializer) == 1


def test_a_tied_table_is_stored_once():
    p = pack(make_weight(3, (50, 45)), align_rows=True)
    b = gathering(p, (50, 45), 18)
    b.output(emit_float(b, p, "embedding.weight"), "table")
    stored = [tensor.name for tensor in b.model().graph.initializer if not tensor.name.startswith("qgraph.")]
    assert sorted(stored) == [f"embedding.weight.{part}" for part in ("packed", "scale", "zero_point")]


def test_other_layouts_are_refused():
    b = GraphBuilder()
    with pytest.raises(ValueError, match="channel axis 0"):
        emit_gather_rows(b, pack(make_weight(3, (8, 20), axis=1)), "e", b.input("i", np.int64, (1,)))
