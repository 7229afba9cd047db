"""Packed embeddings: only rows that are asked for are unpacked, at run time; the table stays packed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering.builder import GraphBuilder

from .emit import FLOAT, emit_scale, emit_zero_point, group_runs, natural, spread_groups
from .packed import PackedWeight, pack, unpack
from .streams import Target, flatten_rows


def emit_gather_rows(b: GraphBuilder, p: PackedWeight, name: str, indices: ir.Value) -> ir.Value:
    """`weight[indices]`, float32, shape of indices + (features,).

    Parameters
    ----------
    p : PackedWeight
        Of a (rows, features) weight, channels along axis 0. If it is `aligned` (`pack` with
        `align_rows=True`) it is stored as it is, shared with other uses of the same `p` and `name`; else it
        is packed anew, by rows, as `<name>.rows.packed`.
    indices : ir.Value, int32 or int64
        Of any rank, dynamic sizes included.
    """
    node = f"{name}.gather"
    rows, features = p.rows
    if len(p.shape) != 2 or p.shape != (rows, features):
        raise ValueError(f"{name}: found shape {p.shape}, groups {p.groups}; expected (rows, features), channel axis 0")
    flat = b.op("Reshape", [indices, b.ints([-1])], name=node)
    value = _levels(b, p, name, flat)
    if p.spec is not None:
        value = _scaled(b, p, name, value, flat)
    shape = b.op("Concat", [b.op("Shape", [indices], name=node), b.ints([features])], {"axis": 0}, name=node)
    return b.op("Reshape", [value, shape], name=node)


def _levels(b: GraphBuilder, p: PackedWeight, name: str, flat: ir.Value) -> ir.Value:
    """The levels of the rows asked for, float32 (n, features)."""
    stored = name
    if not p.aligned:
        p, stored = pack(unpack(p), align_rows=True), f"{name}.rows"
    node, features = f"{name}.gather", p.rows[1]
    # Codes first, then a cast: the lookup table is the one that other weights use, and a quarter of a float one.
    target = Target(np.dtype(np.float32)) if p.spec is None else natural(p)

    def rows_of(part: str) -> ir.Value:
        table = b.initializer(f"{stored}.{part}", p.arrays[part])
        return b.op("Gather", [table, flat], {"axis": 0}, name=node)

    if p.mask is None:
        levels = p.stream.emit(b, rows_of("packed"), features, node, target)
    else:
        kept = p.stream.emit(b, rows_of("packed"), p.mask.count(1, features), node, target)
        levels = p.mask.emit(b, rows_of("mask"), kept, target.scalar(), (-1, features), node, aligned=True)
    return levels if p.spec is None else b.cast(levels, FLOAT, name=node)


def _scaled(b: GraphBuilder, p: PackedWeight, name: str, levels: ir.Value, flat: ir.Value) -> ir.Value:
    """scale * (levels - zero_point) with the groups of the gathered rows."""
    node, features = f"{name}.gather", p.rows[1]
    count, size = group_runs(p)
    blocks = count > 1 and features % size == 0
    if blocks:
        levels = b.op("Reshape", [levels, b.ints([0, count, size])], name=node)

    def of_rows(parameter: ir.Value) -> ir.Value:
        if p.arrays["scale"].shape[0] > 1:
            parameter = b.op("Gather", [parameter, flat], {"axis": 0}, name=node)
        if blocks:
            return b.op("Reshape", [parameter, b.ints([0, count, 1])], name=node)
        return parameter if count == 1 else spread_groups(b, parameter, (0, count, size), features, node)

    if "zero_point" in p.arrays:
        levels = b.op("Sub", [levels, of_rows(emit_zero_point(b, p, name))], name=node)
    levels = b.op("Mul", [levels, of_rows(emit_scale(b, p, name))], name=node)
    return flatten_rows(b, levels, features, node) if blocks else levels
