"""What every stream of codes has in common: the interface, and the table look-up that decodes it in ONNX.

A stream turns a matrix of integer levels (lead, count) into bytes (lead, size): `lead` rows that each start
on a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering.builder import GraphBuilder

from .tables import table


@dataclass(frozen=True, slots=True)
class Target:
    """The form in which levels leave a decoder: `level + add`, in `dtype` (wrapping, as integers do)."""

    dtype: np.dtype
    add: int = 0

    def table(self, levels: np.ndarray) -> np.ndarray:
        """A look-up table that holds this form of `levels`."""
        shifted = np.asarray(levels, np.int64) + self.add
        return shifted.astype(self.dtype)  # integer casts wrap, so partial sums of planes may go round

    def scalar(self, level: int = 0) -> np.ndarray:
        """One value in this form, shape (1,)."""
        return self.table(np.array([level]))


class Stream(Protocol):
    """Levels <-> bytes, in numpy and in ONNX."""

    @property
    def name(self) -> str:
        """What `PackedWeight.format` calls it."""

    @property
    def offset(self) -> int:
        """level = step * stored code + offset."""

    @property
    def step(self) -> int:
        """level = step * stored code + offset."""

    @property
    def one_lookup(self) -> bool:
        """Whether levels come out of one table, which may then as well hold floats."""

    def size(self, count: int) -> int:
        """Bytes a row of `count` levels takes."""

    def encode(self, levels: np.ndarray) -> np.ndarray:
        """(lead, count) levels -> (lead, size) stored values."""

    def decode(self, data: np.ndarray, count: int) -> np.ndarray:
        """The inverse of `encode`."""

    def emit(self, b: GraphBuilder, data: ir.Value, count: int, name: str, target: Target) -> ir.Value:
        """ONNX nodes from (lead, size) stored values to (lead, count) levels; lead may be dynamic."""


def padded(array: np.ndarray, multiple: int, axis: int = -1, value: int = 0) -> np.ndarray:
    """`array` with `axis` padded at its end to a multiple."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return np.pad(array, widths, constant_values=value)


def lookup(b: GraphBuilder, rows: np.ndarray, index: ir.Value, name: str, *, cast: bool = True) -> ir.Value:
    """`rows[index]` along axis 0; the table is shared between layers, the index made int32."""
    if cast:
        index = b.cast(index, ir.DataType.INT32, name=name)
    return b.op("Gather", [table(b, rows), index], {"axis": 0}, name=name)


def flatten_rows(b: GraphBuilder, value: ir.Value, length: int, name: str) -> ir.Value:
    """(lead, ..) -> (lead, length), with lead unknown or empty: a 0 in a Reshape copies the dimension."""
    return b.op("Reshape", [value, b.ints([0, length])], name=name)


def trim(b: GraphBuilder, value: ir.Value, have: int, count: int, name: str) -> ir.Value:
    """The first `count` columns of (lead, have)."""
    return value if have == count else b.slice(value, [0], [count], [1], name=name)


def add(b: GraphBuilder, x: ir.Value, y: ir.Value, dtype: np.dtype, name: str) -> ir.Value:
    """x + y. Add takes 8-bit integers from opset 14 on; below, it is done in int32."""
    if b.opset >= 14 or dtype.itemsize > 1:
        return b.op("Add", [x, y], name=name)
    wide = b.op("Add", [b.cast(v, ir.DataType.INT32, name=name) for v in (x, y)], name=name)
    return b.cast(wide, ir.DataType.from_numpy(dtype), name=name)
