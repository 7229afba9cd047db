"""How fast a kernel is over a float product, by a table that benchmarks/forms.py measures and writes."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("speeds.json")


class Speed(NamedTuple):
    """Of a layer, over FP32: with the kernel, and with a float product behind the same quantizer; above 1 is faster."""

    kernel: float
    plain: float


def key_of(bits: int, int8: bool, zero_points: bool) -> str:
    """The name of a kernel in the table.

    Parameters
    ----------
    bits : int
        2, 4 or 8, of the field that holds a code.
    int8 : bool
        Whether the kernel quantizes activations to int8 inside.
    zero_points : bool
        Whether a correction for zero points is added.
    """
    inside = "int8 activations" if int8 else "float activations"
    return f"{bits}-bit, {inside}{', zero points' if zero_points else ''}"


def speed(key: str, rows: int, weights: int) -> Speed | None:
    """What was measured nearest to a number of rows and of weights, by their logarithms.

    Of several processors that one counts where the kernel does worst beside the float product. None for an unknown
    kernel, and for fewer weights than any that were measured: what calls a kernel counts the more the less it computes.
    """
    found = [_nearest(table.get(key) or table.get(f"{key}, zero points") or [], rows, weights) for table in _tables()]
    return min((speed for speed in found if speed is not None), key=lambda s: s.kernel / s.plain, default=None)


def _nearest(measured: list[dict[str, float]], rows: int, weights: int) -> Speed | None:
    if weights < min((row["weights"] for row in measured), default=math.inf):
        return None
    near = min(
        measured, key=lambda row: abs(math.log2(row["rows"] / rows)) + abs(math.log2(row["weights"] / weights)) / 2
    )
    return Speed(near["kernel"], near["plain"])


@functools.cache
def _tables() -> list[dict[str, list[dict[str, float]]]]:
    """One a processor."""
    return [found["forms"] for found in json.loads(PATH.read_text())]
