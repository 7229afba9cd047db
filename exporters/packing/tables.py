"""Look-up tables that cost few bytes in a file: one whose index is a number of several digits is computed.

Most tables here say, for each byte, what its bits (or trits, or patterns) stand for one after the other:
`table[i] = small[digit 0 of i], small[digit 1 of i], ..`. Such a table is a Gather from the small one,
folded by onnxruntime when it loads the file; the digits of all numbers are shared by every table of a base.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering.builder import GraphBuilder

WORTH = 320  # bytes; what the nodes of a computed table take, and its digits when nothing shares them


def table(b: GraphBuilder, array: np.ndarray) -> ir.Value:
    """The table (count, width) as a value of the graph, one for each distinct content."""
    places = _places(array)
    small = array[: _base(len(array), places), : array.shape[-1] // places] if places > 1 else array
    if array.nbytes - small.nbytes < WORTH:
        return b.constant(array, "lut")
    return b.once(("table", array.dtype.str, array.shape, array.tobytes()), lambda: _emit(b, small, places))


def _emit(b: GraphBuilder, small: np.ndarray, places: int) -> ir.Value:
    base, width = small.shape
    name = b.unique("qgraph.table")
    digits = b.once(("digits", base, places), lambda: _emit_digits(b, base, places))
    if width == 1:
        return b.op("Gather", [b.constant(small[:, 0], "lut"), digits], {"axis": 0}, name=f"{name}/Gather")
    joint = b.op("Gather", [b.constant(small, "lut"), digits], {"axis": 0}, name=f"{name}/Gather")
    return b.reshape(joint, [-1, places * width], name=f"{name}/Reshape")


def _emit_digits(b: GraphBuilder, base: int, places: int) -> ir.Value:
    """int32 (base^places, places): the digits of every number, the lowest first."""
    name = b.unique("qgraph.digits")

    def scalar(value: int) -> ir.Value:
        return b.constant(np.array(value, np.int32), "int")

    numbers = b.op("Range", [scalar(0), scalar(base**places), scalar(1)], name=f"{name}/Range")
    column = b.reshape(numbers, [-1, 1], name=f"{name}/Reshape")
    powers = b.constant((base ** np.arange(places)).astype(np.int32), "powers")
    quotients = b.op("Div", [column, powers], name=f"{name}/Div")
    return b.op("Mod", [quotients, scalar(base)], name=f"{name}/Mod")


def _places(array: np.ndarray) -> int:
    """How many digits an index has, at most, of which each says a part of the row on its own; 1 if none do."""
    if array.ndim != 2:
        return 1
    count, width = array.shape
    for places in range(width, 1, -1):
        base = _base(count, places)
        if width % places == 0 and base**places == count and base > 1:
            small = array[:base, : width // places]
            digits = np.arange(count)[:, None] // base ** np.arange(places) % base
            if np.array_equal(small[digits].reshape(count, width), array):
                return places
    return 1


def _base(count: int, places: int) -> int:
    return round(count ** (1 / places))
