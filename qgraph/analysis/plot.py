"""A comparison as a picture: the signal-to-noise ratio of each layer, in the order of execution."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from qgraph.errors import InspectError
from qgraph.inspection.beside import written

if TYPE_CHECKING:
    from qgraph.analysis.compare import ModelComparison

FORMATS = ("png", "svg", "pdf")
SCALE = 100.0  # dB, at which a bar ends: float rounding alone, or nothing at all, lies beyond
ROW = 0.22  # inches


def save_plot(found: ModelComparison, path: Path, threshold: float | None = None) -> Path:
    """Draw `found` and write it to `path`, whose suffix says the format; see `ModelComparison.plot`."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise InspectError(f"{path}: found the suffix {path.suffix!r}; expected one of .{', .'.join(FORMATS)}.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InspectError("plot: matplotlib is not installed; pip install 'qgraph[plot]'.") from error
    rows = found.rows
    drop = None if threshold is None else found.first_drop(threshold)
    figure = Figure(figsize=(8, 1.2 + ROW * len(rows)), layout="constrained")  # none of pyplot's global state
    axes = figure.subplots()
    lengths = [0.0 if math.isnan(row.snr_db) else min(max(row.snr_db, 0.0), SCALE) for row in rows]
    colours = ["tab:red" if row is drop or row.problem else "tab:blue" for row in rows]
    axes.barh(range(len(rows)), lengths, color=colours)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        axes.text(length + 1, place, row.problem or f"{row.snr_db:.1f}", va="center", fontsize=6)
    if threshold is not None:
        axes.axvline(threshold, color="tab:red", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, SCALE * 1.1)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    axes.set_xlabel("signal-to-noise ratio, dB")
    axes.set_title(f"a: {found.titles[0]}\nb: {found.titles[1]}", fontsize=8, loc="left")
    return written(path, lambda beside: figure.savefig(beside, format=kind))
