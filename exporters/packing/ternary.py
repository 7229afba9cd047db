"""The ternary stream: base 3, five levels -1, 0, +1 a byte (3^5 = 243 of 256 values), 1.6 bits a weight.

A row is dealt out to four sub-streams, level i to sub-stream i % 4, and each is packed on its own. Four
look-ups then give the four 2-bit fields of MatMulNBits' bytes directly, and no code is ever spread out to a
byte of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering.builder import GraphBuilder

from .streams import Target, add, flatten_rows, lookup, padded, trim

LANES = 4
PER_BYTE = 5
POWERS = 3 ** np.arange(PER_BYTE)
LEVELS = np.arange(3**PER_BYTE)[:, None] // POWERS % 3 - 1  # (243, 5): the levels of each byte


@dataclass(frozen=True, slots=True)
class Ternary:
    """Levels -1, 0, +1."""

    name: str = "ternary"
    offset: int = -1
    step: int = 1
    one_lookup: bool = True

    def size(self, count: int) -> int:
        """Bytes a row of `count` levels takes."""
        return LANES * _lane_bytes(count)

    def encode(self, levels: np.ndarray) -> np.ndarray:
        """(lead, count) levels -> (lead, size) uint8."""
        lead, count = levels.shape
        digits = padded((levels + 1).astype(np.uint8), LANES, value=1)
        lanes = digits.reshape(lead, -(-count // LANES), LANES).transpose(0, 2, 1)
        lanes = padded(lanes, PER_BYTE, value=1).reshape(lead, self.size(count), PER_BYTE)
        out = np.zeros(lanes.shape[:2], np.uint8)
        for i in range(PER_BYTE):
            out += lanes[:, :, i] * np.uint8(POWERS[i])
        return out

    def decode(self, data: np.ndarray, count: int) -> np.ndarray:
        """(lead, size) uint8 -> (lead, count) int16 levels."""
        length = _lane_bytes(count) * PER_BYTE
        lanes = LEVELS.astype(np.int16)[data].reshape(data.shape[0], LANES, length)
        return lanes.transpose(0, 2, 1).reshape(data.shape[0], LANES * length)[:, :count]

    def emit(self, b: GraphBuilder, data: ir.Value, count: int, name: str, target: Target) -> ir.Value:
        """One look-up, then the four lanes are interleaved by a transposition."""
        length = _lane_bytes(count) * PER_BYTE
        lanes = b.op("Reshape", [lookup(b, target.table(LEVELS), data, name), b.ints([0, LANES, length])], name=name)
        levels = b.op("Transpose", [lanes], {"perm": [0, 2, 1]}, name=name)
        return trim(b, flatten_rows(b, levels, LANES * length, name), LANES * length, count, name)

    def emit_fields(self, b: GraphBuilder, data: ir.Value, count: int, name: str, bits: int, shift: int) -> ir.Value:
        """(lead, size) -> (lead, count / 4) bytes of 2-bit fields `level + shift`: a look-up a lane."""
        if bits != 2:
            raise ValueError(f"{name}: ternary lanes hold 2-bit fields, found bits={bits}")
        size, total = _lane_bytes(count), None
        for lane in range(LANES):
            part = b.slice(data, [lane * size], [(lane + 1) * size], [1], name=name)
            table = ((LEVELS + shift) << (2 * lane)).astype(np.uint8)
            values = flatten_rows(b, lookup(b, table, part, name), size * PER_BYTE, name)
            total = values if total is None else add(b, total, values, table.dtype, name)
        assert total is not None
        return trim(b, total, size * PER_BYTE, -(-count // LANES), name)


def _lane_bytes(count: int) -> int:
    return ceil(ceil(count / LANES) / PER_BYTE)
