"""Dense streams: b bits a level as one, two or three bit planes (1..8 bits), and raw float32 values.

A plane of w bits holds 8/w codes a byte, the first code in the lowest bits (as MatMulNBits has it). Widths
that do not divide 8 are sums of planes (3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1), one plane after the other,
low bits first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering.builder import GraphBuilder

from .streams import Target, add, flatten_rows, lookup, padded, trim

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
BYTES = np.arange(256)


@dataclass(frozen=True, slots=True)
class Bits:
    """`bits` a level; level = step * code + offset."""

    bits: int
    offset: int = 0
    step: int = 1

    @staticmethod
    def affine(bits: int) -> Bits:
        """Levels 0 .. 2^bits - 1, stored as they are."""
        return Bits(bits)

    @staticmethod
    def linear(bits: int) -> Bits:
        """Symmetric levels: -1, +1 for one bit, else with 2^(bits-1) added, as MatMulNBits has them."""
        return Bits(1, offset=-1, step=2) if bits == 1 else Bits(bits, offset=-(2 ** (bits - 1)))

    @property
    def name(self) -> str:
        """`bits1` .. `bits8`."""
        return f"bits{self.bits}"

    @property
    def one_lookup(self) -> bool:
        """Whether there is one plane."""
        return len(PLANES[self.bits]) == 1

    def size(self, count: int) -> int:
        """Bytes a row of `count` levels takes."""
        return sum(_plane_size(width, count) for width in PLANES[self.bits])

    def encode(self, levels: np.ndarray) -> np.ndarray:
        """(lead, count) levels -> (lead, size) uint8."""
        codes = ((levels.astype(np.int16) - self.offset) // self.step).astype(np.uint8)
        planes, shift = [], 0
        for width in PLANES[self.bits]:
            planes.append(pack_plane((codes >> shift) & (2**width - 1), width))
            shift += width
        return np.concatenate(planes, axis=1)

    def decode(self, data: np.ndarray, count: int) -> np.ndarray:
        """(lead, size) uint8 -> (lead, count) int16 levels."""
        codes = np.zeros((data.shape[0], count), np.int16)
        start = shift = 0
        for width in PLANES[self.bits]:
            end = start + _plane_size(width, count)
            codes |= unpack_plane(data[:, start:end], width)[:, :count].astype(np.int16) << shift
            start, shift = end, shift + width
        return codes * self.step + self.offset

    def emit(self, b: GraphBuilder, data: ir.Value, count: int, name: str, target: Target) -> ir.Value:
        """One look-up a plane, added up; 8-bit codes asked for as they are stored need no node at all."""
        if self.bits == 8 and target.dtype == np.uint8 and self.offset + target.add == 0:
            return data
        tables = [levels.astype(target.dtype) for levels in self._plane_levels(target.add)]  # wraps, as sums do
        return self._sum_planes(b, data, count, count, name, tables)

    def emit_fields(self, b: GraphBuilder, data: ir.Value, count: int, name: str, bits: int, shift: int) -> ir.Value:
        """(lead, size) -> (lead, count * bits / 8) bytes of fields of `bits` that hold `level + shift`.

        Bytes go to bytes through one table a plane and codes are never spread out: the cheapest form at load
        time. Needs whole bytes (count * bits % 8 == 0), and levels that fit their field.
        """
        if self.bits == bits and self.offset + shift == 0 and self.size(count) * 8 == count * bits:
            return data
        # The first plane brings the offset, and a sum fits its field, so no field carries into the next.
        tables = [pack_plane(levels, bits) for levels in self._plane_levels(shift)]
        return self._sum_planes(b, data, count, count * bits // 8, name, tables)

    def _plane_levels(self, shift: int) -> list[np.ndarray]:
        """(256, codes a byte) for each plane: what each byte adds to its levels; `shift` is in the first."""
        tables, low = [], 0
        for width in PLANES[self.bits]:
            fields = unpack_plane(BYTES[:, None].astype(np.uint8), width).astype(np.int64)
            tables.append(self.step * (fields << low) + (self.offset + shift if low == 0 else 0))
            low += width
        return tables

    def _sum_planes(
        self, b: GraphBuilder, data: ir.Value, count: int, columns: int, name: str, tables: list[np.ndarray]
    ) -> ir.Value:
        """The sum over planes of `table[plane bytes]`, each laid out as (lead, columns)."""
        total: ir.Value | None = None
        start = 0
        for width, table in zip(PLANES[self.bits], tables, strict=True):
            size = _plane_size(width, count)
            whole = len(tables) == 1
            part = data if whole else b.slice(data, [start], [start + size], [1], name=name)
            values = flatten_rows(b, lookup(b, table, part, name), size * table.shape[1], name)
            values = trim(b, values, size * table.shape[1], columns, name)
            total = values if total is None else add(b, total, values, table.dtype, name)
            start += size
        assert total is not None
        return total


def _plane_size(width: int, count: int) -> int:
    return -(-count * width // 8)


def pack_plane(codes: np.ndarray, width: int) -> np.ndarray:
    """(lead, count) codes below 2^width -> (lead, bytes), low bits first."""
    per = 8 // width
    codes = padded(codes.astype(np.uint8), per)
    groups = codes.reshape(codes.shape[0], codes.shape[1] // per, per)
    out = np.zeros(groups.shape[:2], np.uint8)
    for i in range(per):
        out |= groups[:, :, i] << (width * i)
    return out


def unpack_plane(data: np.ndarray, width: int) -> np.ndarray:
    """The inverse of `pack_plane`, padding included."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    fields = (data[:, :, None] >> shifts) & (2**width - 1)
    return fields.reshape(data.shape[0], data.shape[1] * len(shifts))


@dataclass(frozen=True, slots=True)
class Floats:
    """Raw float32 values, for weights that are sparse but not quantized."""

    name: str = "float"
    offset: int = 0
    step: int = 1
    one_lookup: bool = True

    def size(self, count: int) -> int:
        """Bytes a row of `count` values takes."""
        return 4 * count

    def encode(self, levels: np.ndarray) -> np.ndarray:
        """The values themselves."""
        return levels.astype(np.float32)

    def decode(self, data: np.ndarray, count: int) -> np.ndarray:
        """The values themselves."""
        return data[:, :count]

    def emit(self, b: GraphBuilder, data: ir.Value, count: int, name: str, target: Target) -> ir.Value:
        """No node."""
        return data
