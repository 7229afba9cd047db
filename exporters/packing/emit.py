"""ONNX nodes that decode a `PackedWeight`: integer levels, or the float weight.

Only core operators of opset 13 on, and nothing but constants, so onnxruntime folds it all when it loads the
file. Tables are looked up with int32 indices and levels stay in 8 bits as long as they can: what is folded
at load time is freed only when the optimizer is done, so every byte of an intermediate result counts.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering.builder import GraphBuilder

from .packed import PackedWeight
from .stack import rows_of
from .streams import Target

FLOAT = ir.DataType.FLOAT
FLOAT32 = Target(np.dtype(np.float32))


def emit_codes(b: GraphBuilder, p: PackedWeight, name: str, dtype: ir.DataType = FLOAT, add: int = 0) -> ir.Value:
    """The integer levels plus `add`, in the weight's own shape.

    Parameters
    ----------
    name : str
        The site; initializers are called `<name>.packed` and `<name>.mask`.
    dtype : FLOAT, INT8 or UINT8
    add : int
        Added to each level for free (it is in the tables): -128 makes 8-bit affine codes fit INT8.

    Raises
    ------
    ValueError
        When the levels do not fit `dtype`.
    """
    low, high = p.levels[0] + add, p.levels[1] + add
    narrow = ir.DataType.INT8 if low < 0 else ir.DataType.UINT8
    kind = np.dtype((narrow if dtype == FLOAT else dtype).numpy())
    info = np.iinfo(kind)
    if low < info.min or high > info.max:
        raise ValueError(f"{name}: found levels {low}..{high}; expected them within {kind} ({info.min}..{info.max})")

    def emit(p: PackedWeight, name: str) -> list[ir.Value]:
        levels = to_shape(b, p, emit_rows(b, p, name, Target(kind, add)), name)
        return [b.cast(levels, FLOAT, name=f"{name}.unpack") if dtype == FLOAT else levels]

    return rows_of(b, p, name, ("codes", dtype, add), emit)[0]


def emit_float(b: GraphBuilder, p: PackedWeight, name: str) -> ir.Value:
    """The float32 weight, `scale * (levels - zero_point)`, in its own shape.

    Initializers are called `<name>.packed`, `.mask`, `.scale` and `.zero_point`.
    """
    return rows_of(b, p, name, "float", lambda p, name: [_float(b, p, name)])[0]


def _float(b: GraphBuilder, p: PackedWeight, name: str) -> ir.Value:
    node = f"{name}.unpack"
    if p.spec is None:
        return to_shape(b, p, emit_rows(b, p, name, Target(np.dtype(np.float32))), name)
    target = FLOAT32 if p.stream.one_lookup else natural(p)
    levels = emit_rows(b, p, name, target)
    rows, columns = p.rows
    count, size = group_runs(p)
    blocks = count > 1 and columns % size == 0
    if blocks:
        levels = b.reshape(levels, [rows, count, size], name=node)
    elif count == 1:
        levels = to_shape(b, p, levels, name)
    value = levels if target is FLOAT32 else b.cast(levels, FLOAT, name=node)

    def laid_out(parameter: ir.Value) -> ir.Value:
        if blocks:
            return b.reshape(parameter, [rows, count, 1], name=node)
        if count > 1:
            return spread_groups(b, parameter, (rows, count, size), columns, node)
        return b.reshape(parameter, _broadcast_shape(p), name=node)

    if "zero_point" in p.arrays:
        value = b.op("Sub", [value, laid_out(emit_zero_point(b, p, name))], name=node)
    value = b.op("Mul", [value, laid_out(emit_scale(b, p, name))], name=node)
    if count > 1:
        value = to_shape(b, p, value, name, flat=not blocks)
    return value


def emit_scale(b: GraphBuilder, p: PackedWeight, name: str) -> ir.Value:
    """The scales, float32 (rows, groups); one row and one group with a scale per tensor."""

    def emit(p: PackedWeight, name: str) -> list[ir.Value]:
        scale = b.initializer(f"{name}.scale", p.arrays["scale"])
        return [scale if p.arrays["scale"].dtype == np.float32 else b.cast(scale, FLOAT, name=f"{name}.unpack")]

    return rows_of(b, p, name, "scale", emit)[0]


def emit_zero_point(b: GraphBuilder, p: PackedWeight, name: str) -> ir.Value:
    """The zero points, float32 (rows, groups), in units of the affine codes."""

    def emit(p: PackedWeight, name: str) -> list[ir.Value]:
        return [b.initializer(f"{name}.zero_point", p.arrays["zero_point"])]

    return rows_of(b, p, name, "zero_point", emit)[0]


def emit_rows(b: GraphBuilder, p: PackedWeight, name: str, target: Target) -> ir.Value:
    """Levels in the form `target`, laid out as (rows, row length): one row an output channel."""
    node = f"{name}.unpack"
    rows, columns = p.rows
    if p.numel == 0:
        return b.constant(np.zeros((rows, columns), target.dtype), "empty")
    if p.mask is None:
        data = b.initializer(f"{name}.packed", p.arrays["packed"])
        levels = p.stream.emit(b, data, p.numel // p.lead, node, target)
        return levels if p.lead == rows else b.reshape(levels, [rows, columns], name=node)
    kept, mask = emit_kept(b, p, name, target)
    return p.mask.emit(b, mask, kept, target.scalar(), (rows, columns), node, p.aligned)


def emit_kept(b: GraphBuilder, p: PackedWeight, name: str, target: Target) -> tuple[ir.Value | None, ir.Value]:
    """The kept levels in the form `target`, (lead, count) or None, and the bytes of the mask."""
    assert p.mask is not None
    kept: ir.Value | None = None
    if "packed" in p.arrays:
        count = p.mask.count(*p.rows) // p.lead
        data = b.initializer(f"{name}.packed", p.arrays["packed"])
        kept = p.stream.emit(b, data, count, f"{name}.unpack", target)
    return kept, b.initializer(f"{name}.mask", p.arrays["mask"])


def to_shape(b: GraphBuilder, p: PackedWeight, value: ir.Value, name: str, flat: bool = True) -> ir.Value:
    """From the layout (rows, row length), or (rows, ..) if not `flat`, to the weight's own shape."""
    node, rank = f"{name}.unpack", len(p.shape)
    if p.groups.kind == "token" or rank < 2 or p.groups.axis % rank == 0:
        return value if flat and p.shape == p.rows else b.reshape(value, p.shape, name=node)
    axis = p.groups.axis % rank
    rest = [i for i in range(rank) if i != axis]
    moved = b.reshape(value, [p.shape[axis], *(p.shape[i] for i in rest)], name=node)
    order = [axis, *rest]
    return b.op("Transpose", [moved], {"perm": [order.index(i) for i in range(rank)]}, name=node)


def natural(p: PackedWeight) -> Target:
    """Levels as they are, in the 8-bit type that holds them."""
    return Target(np.dtype(np.int8 if p.levels[0] < 0 else np.uint8))


def group_runs(p: PackedWeight) -> tuple[int, int]:
    """(groups a row, their length); the last may be shorter."""
    columns = p.rows[1]
    size = p.groups.block
    if size is None or size >= columns or p.groups.kind == "tensor":
        return 1, max(1, columns)
    return -(-columns // size), size


def spread_groups(
    b: GraphBuilder, parameter: ir.Value, runs: tuple[int, int, int], columns: int, node: str
) -> ir.Value:
    """(rows, groups) -> (rows, columns), each value repeated over its group; rows 0 stand for any number."""
    rows, count, size = runs
    column = b.op("Reshape", [parameter, b.ints([rows, count, 1])], name=node)
    wide = b.op("Expand", [column, b.ints([1, 1, size])], name=node)
    flat = b.op("Reshape", [wide, b.ints([rows, count * size])], name=node)
    return flat if columns == count * size else b.slice(flat, [0], [columns], [1], name=node)


def _broadcast_shape(p: PackedWeight) -> list[int]:
    """The shape in which one scale a channel (or one in all) meets the weight."""
    if p.arrays["scale"].size == 1 or not p.shape:
        return [1] * len(p.shape)
    axis = p.groups.axis % len(p.shape)
    if p.groups.kind == "token":
        return [*p.shape[:-1], 1]
    return [size if i == axis else 1 for i, size in enumerate(p.shape)]
