"""N:M masks: exactly N of every M weights are kept, and a group stores which of the C(M, N) patterns it has.

The smallest of three codings is taken: k patterns in one byte (2:4: 6^3 <= 256, 8/12 bit a weight), pattern
numbers of a fixed width in bit planes (1:8: 3 bits, 3/8 bit a weight), or, where there are too many patterns
for a table, numbers of a fixed width that are decoded by counting (enumerative.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import ceil, comb

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering.builder import GraphBuilder

from . import enumerative
from .dense import Bits, pack_plane
from .masks import BITS_OF_BYTE, FREE, running_index
from .streams import Target, add, flatten_rows, lookup, padded, trim

LARGEST_GROUP = 32
SMALL_TABLE = 4096  # bytes; beyond it a table counts against the format and is stored as bit masks
LARGEST_TABLE = 8192  # bytes of such bit masks; beyond it numbers are decoded by counting
NODE_BYTES = 100  # what a node takes in a file, about
UINT8 = Target(np.dtype(np.uint8))


@dataclass(frozen=True, slots=True)
class NMMask:
    """N of every M columns kept; the last group of a row is padded.

    Parameters
    ----------
    n, m : int
        The pattern.
    per_byte : int
        Patterns in one byte, or 0 for numbers of a fixed width.
    """

    n: int
    m: int
    per_byte: int

    @property
    def name(self) -> str:
        """`2:4`."""
        return f"{self.n}:{self.m}"

    @property
    def table_bytes(self) -> int:
        """What the file needs beyond small tables: a large one, or the many nodes that decode by counting."""
        if self._counted:
            return 22 * (ceil(self.m / 8) - 1) * NODE_BYTES
        return comb(self.m, self.n) * ceil(self.m / 8) if self._compact else 0

    @staticmethod
    def encode(rows: np.ndarray, n: int, m: int, aligned: bool = False) -> tuple[NMMask, np.ndarray, np.ndarray] | None:
        """(R, K) levels -> the mask, its bytes (lead, size) and the kept levels (lead, count).

        Lead is R when rows are to begin on bytes (`aligned`), else 1. None if a group has more than N
        nonzeros.
        """
        patterns = comb(m, n)
        if not 0 < n < m or patterns > enumerative.LARGEST:
            return None
        groups = padded(rows, m, 1).reshape(-1, m)
        if int((groups != 0).sum(axis=1).max(initial=0)) > n:
            return None
        # Nonzeros first, then padding (its value is free), then zeros of the row, which the code must hold.
        per_row = -(-rows.shape[1] // m)
        padding = np.tile((np.arange(per_row * m) >= rows.shape[1]).reshape(per_row, m), (rows.shape[0], 1))
        cost = np.where(groups != 0, 0, np.where(padding, 1, 2)).astype(np.uint8)
        places = np.sort(np.argsort(cost, axis=1, kind="stable")[:, :n], axis=1)
        kept = np.take_along_axis(groups, places, axis=1)
        kept[np.take_along_axis(padding, places, axis=1)] = FREE
        lead = rows.shape[0] if aligned else 1
        mask = NMMask(n, m, _best_per_byte(len(places) // max(1, lead), patterns, m))
        numbers = mask._number(places).reshape(lead, -1)
        return mask, mask._store(numbers), kept.reshape(lead, -1)

    @staticmethod
    def restore(name: str, data: np.ndarray, rows: int, columns: int) -> NMMask:
        """The mask called `name` whose bytes are `data`.

        Raises
        ------
        ValueError
            When it is not one, or the bytes are too few for it.
        """
        n, m = map(int, name.split(":"))
        if not 0 < n < m <= LARGEST_GROUP or data.ndim != 2 or data.shape[0] not in (1, rows):
            raise ValueError(f"{name}: no mask with bytes of shape {data.shape}")
        groups = rows * -(-columns // m) // len(data)
        mask = NMMask(n, m, _best_per_byte(groups, comb(m, n), m))
        size = ceil(groups / mask.per_byte) if mask.per_byte else sum(Bits(b).size(groups) for b, _ in mask._widths)
        if data.shape[1] != size:
            raise ValueError(f"{name}: found {data.shape[1]} bytes for {groups} groups; expected {size}")
        return mask

    def count(self, rows: int, columns: int) -> int:
        """How many kept values there are."""
        return self._groups(rows, columns) * self.n

    def decode(self, data: np.ndarray, kept: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """The inverse of `encode`: (rows, columns) levels."""
        lead, groups = len(data), self._groups(rows, columns) // len(data)
        if self.per_byte:
            numbers = _digits(data.astype(np.int64), comb(self.m, self.n), self.per_byte)
            numbers = numbers.reshape(lead, -1)[:, :groups]
        else:
            numbers = np.zeros((lead, groups), np.int64)
            start = 0
            for bits, shift in self._widths:
                end = start + Bits(bits).size(groups)
                numbers |= Bits(bits).decode(data[:, start:end], groups).astype(np.int64) << shift
                start = end
        out = np.zeros((lead * groups, self.m), kept.dtype)
        places = self._places(numbers.reshape(-1))
        np.put_along_axis(out, places, kept.reshape(lead * groups, self.n), axis=1)
        return out.reshape(rows, -1)[:, :columns]

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
        """ONNX: mask bytes (lead, size) and kept values (lead, count) -> (rows, columns).

        With `aligned`, each row begins on a byte, and rows may be -1: any number of them.
        """
        rows, columns = shape
        groups = self._groups(1 if aligned else rows, columns)
        assert kept is not None
        if self._compact:
            index = running_index(b, self._emit_bits(b, data, groups, name), name)
            table = [b.constant(zero, "zero"), b.reshape(kept, [-1], name=name)]
            table = b.op("Concat", table, {"axis": 0}, name=name)
            spread = b.op("Gather", [table, index], {"axis": 0}, name=name)
        else:
            (ranks,) = self._emit_patterns(b, data, groups, [_rank_table(self.n, self.m).astype(np.int32)], name)
            values = b.reshape(kept, [-1, self.n], name=name)
            fill = b.constant(zero.reshape(()), "zero")  # becomes column 0, which a rank of 0 reads
            values = b.op("Pad", [values, b.ints([0, 1, 0, 0]), fill], name=name)
            spread = b.op("GatherElements", [values, ranks], {"axis": 1}, name=name)
        width = -(-columns // self.m) * self.m
        whole = b.reshape(spread, [rows, width], name=name)
        return whole if width == columns else b.slice(whole, [0], [columns], [1], name=name)

    def has_fields(self, bits: int) -> bool:
        """Whether `emit_fields` can do it: a group fills whole bytes, and its patterns have a plain table."""
        return bits < 8 and self.m * bits % 8 == 0 and not self._compact

    def emit_fields(
        self,
        b: GraphBuilder,
        data: ir.Value,
        kept: ir.Value,
        shape: tuple[int, int],
        name: str,
        bits: int,
        aligned: bool = False,
    ) -> ir.Value:
        """MatMulNBits' bytes (rows, whole groups * m * bits / 8), of fields that hold `level + 2^(bits-1)`.

        Per pattern, one table has the pruned fields, and one for each kept value has a 1 in its field;
        times the value, added up. Nothing is ever as large as a byte a weight.
        """
        rows, columns = shape
        groups = self._groups(1 if aligned else rows, columns)
        ranks = _rank_table(self.n, self.m)
        tables = [pack_plane((ranks == 0).astype(np.uint8) << (bits - 1), bits)]
        tables += [pack_plane((ranks == j + 1).astype(np.uint8), bits) for j in range(self.n)]
        total, *ones = self._emit_patterns(b, data, groups, tables, name)
        values = b.reshape(kept, [-1, self.n], name=name)
        for j, one in enumerate(ones):
            value = values if self.n == 1 else b.slice(values, [j], [j + 1], [1], name=name)
            total = add(b, total, b.op("Mul", [one, value], name=name), UINT8.dtype, name)
        return b.reshape(total, [rows, self._groups(1, columns) * self.m * bits // 8], name=name)

    @property
    def _compact(self) -> bool:
        return comb(self.m, self.n) * self.m > SMALL_TABLE

    @property
    def _counted(self) -> bool:
        return comb(self.m, self.n) * ceil(self.m / 8) > LARGEST_TABLE

    @property
    def _widths(self) -> list[tuple[int, int]]:
        """(bits, shift) of the parts of a fixed-width number: whole bytes and the rest, low bits first."""
        bits = (comb(self.m, self.n) - 1).bit_length()
        return [(min(8, bits - shift), shift) for shift in range(0, bits, 8)]

    def _groups(self, rows: int, columns: int) -> int:
        return rows * -(-columns // self.m)

    def _number(self, places: np.ndarray) -> np.ndarray:
        if not self._counted:
            return _numbers(places)
        bits = np.zeros((len(places), self.m), bool)
        np.put_along_axis(bits, places, True, axis=1)
        return enumerative.encode(bits, self.n)

    def _places(self, numbers: np.ndarray) -> np.ndarray:
        if not self._counted:
            return _places(self.n, self.m)[numbers]
        return np.nonzero(enumerative.decode(numbers, self.n, self.m))[1].reshape(len(numbers), self.n)

    def _store(self, numbers: np.ndarray) -> np.ndarray:
        if self.per_byte:
            weights = comb(self.m, self.n) ** np.arange(self.per_byte)
            whole = padded(numbers, self.per_byte)
            return (whole.reshape(len(numbers), -1, self.per_byte) @ weights).astype(np.uint8)
        parts = [Bits(bits).encode((numbers >> shift) & (2**bits - 1)) for bits, shift in self._widths]
        return np.concatenate(parts, axis=1)

    def _emit_bits(self, b: GraphBuilder, data: ir.Value, groups: int, name: str) -> ir.Value:
        """uint8 (lead * groups * m,): 1 where kept."""
        if self._counted:
            found = enumerative.emit_bytes(b, self._emit_numbers(b, data, groups, name), self.n, self.m, name)
        else:
            masks = pack_plane((_rank_table(self.n, self.m) > 0).astype(np.uint8), 1)
            (found,) = self._emit_patterns(b, data, groups, [masks], name)
        bits = lookup(b, BITS_OF_BYTE, found, name)
        if self.m % 8:
            bits = b.reshape(bits, [-1, ceil(self.m / 8) * 8], name=name)
            bits = b.slice(bits, [0], [self.m], [1], name=name)
        return b.reshape(bits, [-1], name=name)

    def _emit_patterns(
        self, b: GraphBuilder, data: ir.Value, groups: int, tables: list[np.ndarray], name: str
    ) -> list[ir.Value]:
        """For each table (patterns, width): its row for each group's pattern, (lead * groups, width)."""
        if not self.per_byte:
            index = self._emit_numbers(b, data, groups, name)
            return [lookup(b, table, index, name, cast=False) for table in tables]
        index = b.cast(data, ir.DataType.INT32, name=name)
        patterns = comb(self.m, self.n)
        digits = _digits(np.arange(patterns**self.per_byte), patterns, self.per_byte)
        results = []
        for table in tables:
            joint = table[digits].reshape(len(digits), -1)
            values = lookup(b, joint, index, name, cast=False)
            if groups % self.per_byte:
                have = -(-groups // self.per_byte) * self.per_byte * table.shape[1]
                values = flatten_rows(b, values, have, name)
                values = trim(b, values, have, groups * table.shape[1], name)
            results.append(b.reshape(values, [-1, table.shape[1]], name=name))
        return results

    def _emit_numbers(self, b: GraphBuilder, data: ir.Value, groups: int, name: str) -> ir.Value:
        total: ir.Value | None = None
        start = 0
        for bits, shift in self._widths:
            end = start + Bits(bits).size(groups)
            part = data if len(self._widths) == 1 else b.slice(data, [start], [end], [1], name=name)
            part = b.cast(Bits(bits).emit(b, part, groups, name, UINT8), ir.DataType.INT32, name=name)
            if shift:
                part = b.op("Mul", [part, b.constant(np.array(1 << shift, np.int32), "scale")], name=name)
            total = part if total is None else b.op("Add", [total, part], name=name)
            start = end
        assert total is not None
        return b.reshape(total, [-1], name=name)


def _best_per_byte(groups: int, patterns: int, m: int) -> int:
    """Patterns in one byte, if no larger than a fixed width (smaller, if the table is large); else 0."""
    per_byte = 0
    while patterns ** (per_byte + 1) <= 256 and per_byte < 8:
        per_byte += 1
    if not per_byte:
        return 0
    fixed = Bits((patterns - 1).bit_length()).size(groups)
    large = patterns**per_byte * per_byte * m > SMALL_TABLE
    return per_byte if ceil(groups / per_byte) + large <= fixed else 0


def _digits(numbers: np.ndarray, base: int, count: int) -> np.ndarray:
    return numbers[..., None] // base ** np.arange(count) % base


def _numbers(places: np.ndarray) -> np.ndarray:
    """Number of each sorted set of places in colexicographic order: sum of C(place_i, i + 1)."""
    n = places.shape[1]
    binomial = np.array([[comb(place, i + 1) for i in range(n)] for place in range(64)], np.int64)
    total = np.zeros(len(places), np.int64)
    for i in range(n):
        total += binomial[places[:, i], i]
    return total


@lru_cache(maxsize=64)
def _places(n: int, m: int) -> np.ndarray:
    """(C(m, n), n): the places of each pattern, by number."""
    every = np.array(list(combinations(range(m), n)), np.int64)
    return every[np.argsort(_numbers(every))]


@lru_cache(maxsize=64)
def _rank_table(n: int, m: int) -> np.ndarray:
    """(C(m, n), m) uint8: for each pattern and column, 0 or the rank of the kept value, from 1."""
    table = np.zeros((comb(m, n), m), np.uint8)
    np.put_along_axis(table, _places(n, m), np.arange(1, n + 1, dtype=np.uint8)[None], axis=1)
    return table
