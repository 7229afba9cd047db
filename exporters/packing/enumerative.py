"""Numbers for the patterns of N kept out of M columns where there are too many for a table, M up to 32.

Columns are taken eight at a time. With r columns to come and n to be kept in all, patterns are ordered
first by how many the next eight keep, then by which (among the bytes of that many bits, by value, so that a
last piece of fewer columns uses the first of them), then by the number of the rest. Decoding needs one
small table look-up, one comparison against eight thresholds and one division for each eight columns.
"""

from __future__ import annotations

from functools import lru_cache
from math import comb

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering.builder import GraphBuilder

from .dense import pack_plane, unpack_plane

BYTE = 8
LARGEST = 2**31 - 1  # numbers are decoded in int32
POPCOUNT = unpack_plane(np.arange(256, dtype=np.uint8)[:, None], 1).sum(axis=1).astype(np.int64)


def encode(bits: np.ndarray, n: int) -> np.ndarray:
    """Bool (groups, m), n of them set in every row -> int64 (groups,) numbers below C(m, n)."""
    data = pack_plane(bits.astype(np.uint8), 1)
    left = bits.shape[1]
    number, kept = np.zeros(len(bits), np.int64), np.full(len(bits), n)
    for byte in data.T:  # later bytes have smaller radixes
        left = max(0, left - BYTE)
        base, radix = (table[kept, POPCOUNT[byte]] for table in _tables(n, left))
        number += base + _place_in_class()[byte] * radix
        kept = kept - POPCOUNT[byte]
    return number


def decode(numbers: np.ndarray, n: int, m: int) -> np.ndarray:
    """The inverse of `encode`: bool (groups, m)."""
    number, kept, data, left = numbers.astype(np.int64), np.full(len(numbers), n), [], m
    for _ in range(-(-m // BYTE)):
        left = max(0, left - BYTE)
        base, radix = _tables(n, left)
        count = (number[:, None] >= _thresholds(n, left)[kept]).sum(axis=1)
        number = number - base[kept, count]
        data.append(_bytes_by_class()[0][_bytes_by_class()[1][count] + number // radix[kept, count]])
        number, kept = number % radix[kept, count], kept - count
    return unpack_plane(np.stack(data, axis=1), 1)[:, :m].astype(bool)


def emit_bytes(b: GraphBuilder, number: ir.Value, n: int, m: int, name: str) -> ir.Value:
    """ONNX: int32 (groups,) numbers -> uint8 (groups, ceil(m / 8)) bit masks, first column lowest."""
    ordered, starts = (b.constant(table, "lut") for table in _bytes_by_class())

    def pick(table: ir.Value, index: ir.Value) -> ir.Value:
        return b.op("Gather", [table, index], {"axis": 0}, name=name)

    def byte_of(count: ir.Value, place: ir.Value) -> ir.Value:
        byte = pick(ordered, b.op("Add", [pick(starts, count), place], name=name))
        return b.reshape(byte, [-1, 1], name=name)

    kept = b.constant(np.array([n], np.int32), "count")
    data, left = [], m
    while left > BYTE:
        left -= BYTE
        limits = pick(b.constant(_thresholds(n, left), "lut"), kept)
        reached = b.op("GreaterOrEqual", [b.reshape(number, [-1, 1], name=name), limits], name=name)
        reached = b.cast(reached, ir.DataType.INT32, name=name)
        count = b.op("ReduceSum", [reached, b.ints([1])], {"keepdims": 0}, name=name)
        row = b.op("Mul", [kept, b.constant(np.array([BYTE + 1], np.int32), "count")], name=name)
        cell = b.op("Add", [row, count], name=name)
        base, radix = (pick(b.constant(table.reshape(-1), "lut"), cell) for table in _tables(n, left))
        number = b.op("Sub", [number, base], name=name)
        digit = b.op("Div", [number, radix], name=name)
        number = b.op("Sub", [number, b.op("Mul", [digit, radix], name=name)], name=name)
        data.append(byte_of(count, digit))
        kept = b.op("Sub", [kept, count], name=name)
    data.append(byte_of(kept, number))  # the last piece keeps what is left to keep
    return data[0] if len(data) == 1 else b.op("Concat", data, {"axis": 1}, name=name)


@lru_cache(maxsize=64)
def _tables(n: int, left: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 (n + 1, 9) each, by how many are kept from here on and by the next eight, `left` columns after.

    The first number of that class, and how many numbers the rest can have (at least 1).
    """
    base, radix = np.zeros((n + 1, BYTE + 1), np.int64), np.ones((n + 1, BYTE + 1), np.int64)
    for kept in range(n + 1):
        total = 0
        for count in range(BYTE + 1):
            base[kept, count] = total
            rest = comb(left, kept - count) if kept >= count else 0
            radix[kept, count] = max(1, rest)
            total += comb(BYTE, count) * rest
    return np.minimum(base, LARGEST).astype(np.int32), np.minimum(radix, LARGEST).astype(np.int32)


@lru_cache(maxsize=64)
def _thresholds(n: int, left: int) -> np.ndarray:
    """int32 (n + 1, 8): where each class but the first begins; those that cannot be never do."""
    base, _ = _tables(n, left)
    limits = base[:, 1:].astype(np.int64)
    for kept in range(n + 1):
        limits[kept, kept:] = LARGEST  # more than are left to keep
    return limits.astype(np.int32)


@lru_cache(maxsize=1)
def _bytes_by_class() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (256,) bytes by their number of bits, then value; int32 (9,) where each number of bits begins."""
    ordered = np.argsort(POPCOUNT, kind="stable").astype(np.uint8)
    return ordered, np.searchsorted(np.sort(POPCOUNT), np.arange(BYTE + 1)).astype(np.int32)


@lru_cache(maxsize=1)
def _place_in_class() -> np.ndarray:
    """int64 (256,): the place of each byte among those with as many bits."""
    ordered, starts = _bytes_by_class()
    place = np.zeros(256, np.int64)
    place[ordered] = np.arange(256) - starts[POPCOUNT[ordered]]
    return place
