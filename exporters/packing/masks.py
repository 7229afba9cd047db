"""Which weights are kept: bit masks, of single weights or of whole tiles, and what puts the kept values back.

Decoding never asks for data-dependent shapes: the running count of the mask's bits (CumSum), zero where a
bit is 0, is the index of each weight in [0, kept values..]. onnxruntime folds that, as it would not fold
Compress.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering.builder import GraphBuilder

from .dense import Bits, pack_plane, unpack_plane
from .streams import Target, lookup, padded

FREE = 1  # what stands at a kept position whose value is never read: a level of every symmetric alphabet
PIECES = (8, 4)
BITS_OF_BYTE = unpack_plane(np.arange(256, dtype=np.uint8)[:, None], 1)  # (256, 8), low bit first


@dataclass(frozen=True, slots=True)
class TileMask:
    """One bit for each tile of `height` rows by `width` columns; 1 x 1 is the bit mask of single weights.

    Parameters
    ----------
    height, width : int
        The tile. Rows and columns are padded to whole tiles.
    kept : int
        Number of tiles kept.
    piece : int
        0, or 4 or 8: the mask is cut in pieces of so many bits, and what is stored is one bit a piece, then
        the pieces that are not zero.
    used : int
        The number of those.
    """

    height: int
    width: int
    kept: int
    piece: int = 0
    used: int = 0

    @property
    def name(self) -> str:
        """`mask`, or `mask4x4` for tiles; `mask/8` where it is cut in pieces of 8 bits."""
        tile = "" if self.height == self.width == 1 else f"{self.height}x{self.width}"
        return f"mask{tile}/{self.piece}" if self.piece else f"mask{tile}"

    @staticmethod
    def restore(name: str, data: np.ndarray, rows: int, columns: int) -> TileMask:
        """The mask called `name` whose bytes are `data`.

        Raises
        ------
        ValueError
            When it is not one, or the bytes are too few for it.
        """
        found = re.fullmatch(r"mask(?:(\d+)x(\d+))?(?:/([48]))?", name)
        if found is None:
            raise ValueError(f"{name!r} is no mask")
        height, width, piece = (int(text or default) for text, default in zip(found.groups(), "110", strict=True))
        mask = TileMask(max(1, height), max(1, width), 0, piece)
        tall, wide = mask._tiles(rows, columns)
        cells, top = mask._cells(tall * wide) if piece else (0, ceil(tall * wide / 8))
        used = int(unpack_plane(data[None, :top], 1)[:, :cells].sum()) if piece else 0
        if data.ndim != 1 or len(data) < top + ceil(used * piece / 8):
            raise ValueError(f"{name}: {data.size} bytes are too few for {tall * wide} bits")
        mask = replace(mask, used=used)
        ones = mask._bits(data, tall * wide)
        return replace(mask, kept=int(ones.sum()))

    @property
    def table_bytes(self) -> int:
        """Size of the look-up tables that this mask brings along beyond the small ones everyone shares."""
        return 0

    @staticmethod
    def encode(rows: np.ndarray, height: int, width: int) -> tuple[TileMask, np.ndarray, np.ndarray]:
        """(R, K) levels -> the mask, its bytes (1-D), and the kept levels (1, count), tile by tile."""
        whole = padded(padded(rows, height, 0), width, 1)
        tall, wide = whole.shape[0] // height, whole.shape[1] // width
        tiles = whole.reshape(tall, height, wide, width).transpose(0, 2, 1, 3).reshape(tall * wide, height * width)
        bits = (tiles != 0).any(axis=1)
        kept = tiles[bits].copy()
        if whole.shape != rows.shape:  # values in the padding are free
            inside = np.zeros(whole.shape, bool)
            inside[: rows.shape[0], : rows.shape[1]] = True
            inside = inside.reshape(tall, height, wide, width).transpose(0, 2, 1, 3).reshape(tiles.shape)
            kept[~inside[bits]] = FREE
        data = pack_plane(bits[None].astype(np.uint8), 1)
        best, piece, used = data[0], 0, 0
        for size in PIECES:
            cells = unpack_plane(data, size)
            parts = pack_plane((cells != 0).astype(np.uint8), 1), pack_plane(cells[cells != 0][None], size)
            if parts[0].size + parts[1].size < best.size:
                best, piece, used = np.concatenate(parts, axis=1)[0], size, int((cells != 0).sum())
        return TileMask(height, width, len(kept), piece, used), best, kept.reshape(1, -1)

    def count(self, rows: int, columns: int) -> int:
        """How many kept values there are."""
        return self.kept * self.height * self.width

    def decode(self, data: np.ndarray, kept: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """The inverse of `encode`: (rows, columns) levels."""
        tall, wide = self._tiles(rows, columns)
        bits = self._bits(data, tall * wide)
        tiles = np.zeros((tall * wide, self.height * self.width), kept.dtype)
        tiles[bits] = kept.reshape(self.kept, self.height * self.width)
        whole = tiles.reshape(tall, wide, self.height, self.width).transpose(0, 2, 1, 3)
        return whole.reshape(tall * self.height, wide * self.width)[:rows, :columns]

    def _bits(self, data: np.ndarray, count: int) -> np.ndarray:
        """bool (count,): the mask, its pieces put back."""
        if self.piece:
            cells, top = self._cells(count)
            used = unpack_plane(data[None, :top], 1)[:, :cells].astype(bool)
            full = np.zeros((1, cells), np.uint8)
            full[used] = unpack_plane(data[None, top:], self.piece)[0, : self.used]
            data = pack_plane(full, self.piece)[0]
        return unpack_plane(data[None], 1)[0][:count].astype(bool)

    def emit(
        self,
        b: GraphBuilder,
        data: ir.Value,
        kept: ir.Value | None,
        zero: np.ndarray,
        shape: tuple[int, int],
        name: str,
        aligned: bool = False,
    ) -> ir.Value:
        """ONNX: mask bytes (1-D) and kept values ((1, count), or None) -> (rows, columns)."""
        rows, columns = shape
        tall, wide = self._tiles(rows, columns)
        area = self.height * self.width
        table = b.constant(np.broadcast_to(zero, (1, area) if area > 1 else (1,)), "zero")
        if kept is not None:
            values = b.reshape(kept, [self.kept, area] if area > 1 else [self.kept], name=name)
            table = b.op("Concat", [table, values], {"axis": 0}, name=name)
        cells = self._emit_cells(b, data, tall * wide, name) if self.piece else data
        index = running_index(b, _spread_bits(b, cells, tall * wide, name, self.piece or 8), name)
        tiles = b.op("Gather", [table, index], {"axis": 0}, name=name)
        if area > 1:
            tiles = b.reshape(tiles, [tall, wide, self.height, self.width], name=name)
            tiles = b.op("Transpose", [tiles], {"perm": [0, 2, 1, 3]}, name=name)
        whole = b.reshape(tiles, [tall * self.height, wide * self.width], name=name)
        if (tall * self.height, wide * self.width) == shape:
            return whole
        return b.slice(whole, [0, 0], [rows, columns], [0, 1], name=name)

    def _tiles(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // self.height), -(-columns // self.width)

    def _cells(self, bits: int) -> tuple[int, int]:
        """(pieces of a mask of so many bits, bytes of the one bit for each)."""
        cells = ceil(bits / 8) * 8 // self.piece
        return cells, ceil(cells / 8)

    def _emit_cells(self, b: GraphBuilder, data: ir.Value, bits: int, name: str) -> ir.Value:
        """All pieces of the mask, uint8 (pieces,)."""
        cells, top = self._cells(bits)
        table = b.constant(np.zeros(1, np.uint8), "zero")
        if self.used:
            rest = b.slice(data, [top], [top + ceil(self.used * self.piece / 8)], [0], name=name)
            rest = b.reshape(rest, [1, -1], name=name)
            rest = Bits(self.piece).emit(b, rest, self.used, name, Target(np.dtype(np.uint8)))
            table = b.op("Concat", [table, b.reshape(rest, [-1], name=name)], {"axis": 0}, name=name)
        which = _spread_bits(b, b.slice(data, [0], [top], [0], name=name), cells, name)
        return b.op("Gather", [table, running_index(b, which, name)], {"axis": 0}, name=name)


def running_index(b: GraphBuilder, bits: ir.Value, name: str) -> ir.Value:
    """uint8 bits (count,) -> int32: 0 where the bit is 0, else how many are set up to and with it."""
    bits = b.cast(bits, ir.DataType.INT32, name=name)
    count = b.op("CumSum", [bits, b.constant(np.array(0, np.int32), "axis")], name=name)
    return b.op("Mul", [count, bits], name=name)


def _spread_bits(b: GraphBuilder, data: ir.Value, count: int, name: str, width: int = 8) -> ir.Value:
    """Pieces of a mask, `width` bits in each byte -> uint8 bits (count,)."""
    table = BITS_OF_BYTE[: 2**width, :width]
    bits = b.reshape(lookup(b, table, data, name), [-1], name=name)
    return b.slice(bits, [0], [count], [0], name=name) if count % 8 else bits
