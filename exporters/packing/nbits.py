"""Packed weights in the form of com.microsoft::MatMulNBits: fields of 2, 4 or 8 bits, in blocks of every row.

Where the fields of a byte follow from the bytes that are stored, bytes go to bytes through a table; else
the levels are unpacked to a byte each and put together again. onnxruntime folds both before its kernel
repacks the weight.
Source: github.com/microsoft/onnxruntime, docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering.builder import GraphBuilder

from .dense import Bits
from .emit import emit_kept, emit_rows, emit_scale, group_runs, spread_groups
from .nm import NMMask
from .packed import PackedWeight
from .streams import Target, add
from .ternary import Ternary

FIELDS = (2, 4, 8)
UINT8 = np.dtype(np.uint8)


def nbits_for(p: PackedWeight) -> int:
    """The narrowest field of MatMulNBits that holds the levels of `p`."""
    low, high = p.levels
    for bits in FIELDS:
        if (low >= 0 and high < 2**bits) or (low < 0 and -low <= 2 ** (bits - 1) > high):
            return bits
    raise ValueError(f"levels {low}..{high} do not fit 8 bits")


def nbits_shift(p: PackedWeight, bits: int) -> int:
    """What is added to a level to make the field that MatMulNBits reads: it puts the middle at 2^(bits-1)."""
    if p.levels[0] < 0 or p.spec is None:
        return 2 ** (bits - 1)
    return 2 ** (bits - 1) - 2 ** (int(p.spec.bits) - 1)


def emit_nbits(b: GraphBuilder, p: PackedWeight, name: str, bits: int, block_size: int) -> tuple[ir.Value, ir.Value]:
    """B and scales of MatMulNBits for the weight seen as (N, K), N its output channels.

    The kernel computes `y = sum of s * (B - 2^(bits-1)) * x` when it is given no zero points. Linear levels
    are stored with 2^(bits-1) added, so that is the weight and nothing has to be corrected. Of affine codes
    q the middle is put there: B - 2^(bits-1) = q - c, c = 2^(b-1), b their own width. The weight is
    `s * (q - z)`, so the caller adds, per block, `s * (c - z)` times the block's sum of x.

    Parameters
    ----------
    bits : 2, 4 or 8
        At least `nbits_for(p)`.
    block_size : int
        A power of two, at least 16. Groups must be whole rows, or runs of a multiple of it.

    Returns
    -------
    B : uint8 (N, blocks, block_size * bits / 8)
        Rows are padded to whole blocks with 0.
    scales : float32 (N, blocks)
    """
    if bits not in FIELDS or block_size < 16 or block_size & (block_size - 1):
        raise ValueError(
            f"{name}: found bits={bits}, block_size={block_size}; expected 2, 4 or 8 and a power of two from 16 on"
        )
    if bits < nbits_for(p):
        raise ValueError(f"{name}: found levels {p.levels} for fields of {bits} bits; use {nbits_for(p)} bits")
    return _emit_fields(b, p, name, bits, block_size), _emit_block_scales(b, p, name, block_size)


def _emit_fields(b: GraphBuilder, p: PackedWeight, name: str, bits: int, block_size: int) -> ir.Value:
    node, (rows, columns) = f"{name}.unpack", p.rows
    blocks = -(-columns // block_size)
    bytes_a_row, shift = blocks * block_size * bits // 8, nbits_shift(p, bits)
    if _bytes_suffice(p, bits):
        data = b.initializer(f"{name}.packed", p.arrays["packed"])
        assert isinstance(p.stream, Bits | Ternary)
        fields = p.stream.emit_fields(b, data, p.numel // p.lead, node, bits, shift)
        have = columns * bits // 8
        if p.lead != rows:
            fields = b.reshape(fields, [rows, have], name=node)
        fields = _pad_columns(b, fields, bytes_a_row - have, node)
    elif isinstance(p.mask, NMMask) and p.mask.has_fields(bits) and columns * bits % 8 == 0:
        kept, mask = emit_kept(b, p, name, Target(UINT8, shift))
        assert kept is not None
        fields = p.mask.emit_fields(b, mask, kept, (rows, columns), node, bits, p.aligned)
        have = columns * bits // 8
        if columns % p.mask.m:
            fields = b.slice(fields, [0], [have], [1], name=node)
        fields = _pad_columns(b, fields, bytes_a_row - have, node)
    else:
        codes = emit_rows(b, p, name, Target(UINT8, shift))
        codes = _pad_columns(b, codes, blocks * block_size - columns, node)
        fields = _join_fields(b, codes, (rows, bytes_a_row), bits, node)
    return b.reshape(fields, [rows, blocks, block_size * bits // 8], name=node)


def _bytes_suffice(p: PackedWeight, bits: int) -> bool:
    """Whether stored bytes translate to bytes of fields, row by row."""
    if p.mask is not None or p.numel == 0 or p.rows[1] * bits % 8:
        return False
    if isinstance(p.stream, Ternary):
        return bits == 2
    return isinstance(p.stream, Bits) and p.stream.bits <= bits


def _join_fields(b: GraphBuilder, codes: ir.Value, shape: tuple[int, int], bits: int, node: str) -> ir.Value:
    """uint8 codes (rows, n) -> bytes (rows, n * bits / 8), first code in the lowest bits."""
    per = 8 // bits
    if per == 1:
        return codes
    parts = b.ops(
        "Split",
        [b.reshape(codes, [*shape, per], name=node), b.ints([1] * per)],
        {"axis": 2},
        outputs=per,
        name=node,
    )
    total = parts[0]
    for i in range(1, per):
        total = add(b, total, _shifted(b, parts[i], i * bits, node), UINT8, node)
    return b.reshape(total, shape, name=node)


def _shifted(b: GraphBuilder, value: ir.Value, bits: int, node: str) -> ir.Value:
    """uint8 to the left. onnxruntime multiplies faster than it shifts; opset 14 allows it."""
    if b.opset < 14:
        amount = b.constant(np.array(bits, np.uint8), "shift")
        return b.op("BitShift", [value, amount], {"direction": "LEFT"}, name=node)
    return b.op("Mul", [value, b.constant(np.array(1 << bits, np.uint8), "shift")], name=node)


def _pad_columns(b: GraphBuilder, value: ir.Value, missing: int, node: str) -> ir.Value:
    return value if not missing else b.op("Pad", [value, b.ints([0, 0, 0, missing])], name=node)


def _emit_block_scales(b: GraphBuilder, p: PackedWeight, name: str, block_size: int) -> ir.Value:
    node, (rows, columns) = f"{name}.unpack", p.rows
    blocks = -(-columns // block_size)
    scale = emit_scale(b, p, name)
    count, size = group_runs(p)
    if count == 1:
        return b.op("Expand", [scale, b.ints([rows, blocks])], name=node)
    if size % block_size:
        raise ValueError(
            f"{name}: found groups of {size}; expected a multiple of block_size={block_size}; take a smaller block_size"
        )
    if size == block_size:
        return scale
    return spread_groups(b, scale, (rows, count, size // block_size), blocks, node)
