"""Two inspections side by side: which weights were treated differently, and what that did to their bytes.

Specs, shapes and sizes; of two files that qgraph wrote also what their weights hold. What they compute is another
question.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from qgraph.inspection.layers import Layer
from qgraph.inspection.sizes import ratio_db
from qgraph.inspection.summary import Inspection
from qgraph.terminal import as_text

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Change", "Difference", "difference"]


@dataclass(frozen=True, slots=True)
class Change:
    """One weight in both: what differs in words, None on the side that lacks it.

    ``snr_db``: the weight of `a` over its difference from that of `b`, where their values alone differ.
    """

    site: str
    spec: tuple[str | None, str | None]
    shape: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    bytes: tuple[int | None, int | None]
    snr_db: float | None = None

    @property
    def kind(self) -> str:
        """``added``, ``removed``, ``shape``, ``spec``, ``size`` or ``values``."""
        if self.spec[0] is None:
            return "added"
        if self.spec[1] is None:
            return "removed"
        if self.shape[0] != self.shape[1]:
            return "shape"
        if self.spec[0] != self.spec[1]:
            return "spec"
        return "size" if self.snr_db is None else "values"


@dataclass(frozen=True, slots=True)
class Difference:
    """All changes from one inspection to another, and the bytes of all weights of each; `print` it."""

    titles: tuple[str, str]
    changes: tuple[Change, ...]
    same: int
    bytes: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        for entry, change in zip(data["changes"], self.changes, strict=True):
            entry["kind"] = change.kind
            if change.snr_db is None or not math.isfinite(change.snr_db):  # JSON has no infinity
                del entry["snr_db"]
        return data

    def __str__(self) -> str:
        first, second = self.titles
        lines = [f"a: {first}", f"b: {second}"]
        if self.changes:
            table = Table()
            for name in ("weight", "what", "a", "b", "bytes a", "bytes b"):
                table.add_column(name, justify="right" if name.startswith("bytes") else "left", overflow="fold")
            for change in self.changes:
                table.add_row(change.site, _what(change), *_sides(change), *map(_count, change.bytes))
            lines.append(as_text(table))
        lines.append(
            f"{len(self.changes)} weights differ, {self.same} are the same; "
            f"weights take {self.bytes[0]:,} bytes in a, {self.bytes[1]:,} in b"
        )
        return "\n".join(lines)


def difference(a: Inspection, b: Inspection) -> Difference:
    """Compare two inspections weight by weight, in the order of `a`, what only `b` has last.

    Parameters
    ----------
    a, b : Inspection
        Of eager models, prepared models or files, in any mix.
    """
    mine, theirs = ({layer.site: layer for layer in inspection.layers} for inspection in (a, b))
    sites = [*mine, *(site for site in theirs if site not in mine)]
    pairs = [(site, mine.get(site), theirs.get(site)) for site in sites]
    # A file has one row for a tied weight, a model one for each layer that uses it.
    pairs = [(site, x, y) for site, x, y in pairs if (x and y) or not any(z and z.tied_to for z in (x, y))]
    values = _values(a), _values(b)
    changes = [change for site, x, y in pairs if (change := _change(site, x, y, values)) is not None]
    return Difference((a.title, b.title), tuple(changes), len(pairs) - len(changes), (_bytes(a), _bytes(b)))


def _values(inspection: Inspection) -> Mapping[str, np.ndarray]:
    """The weights of a file of ours as it computes with them; none of a model, whose float weights are others."""
    if not isinstance(inspection.source, Path) or not any(layer.quantized for layer in inspection.layers):
        return {}
    from qgraph.exporters.unpack import unpack

    return {name: found.weight for name, found in unpack(inspection.source).items()}


def _change(
    site: str, a: Layer | None, b: Layer | None, values: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]
) -> Change | None:
    spec = (a.spec if a else None, b.spec if b else None)
    shape = (a.shape if a else None, b.shape if b else None)
    size = (a.bytes_after if a else None, b.bytes_after if b else None)
    if spec[0] != spec[1] or shape[0] != shape[1] or size[0] != size[1]:
        return Change(site, spec, shape, size)
    if site not in values[0] or site not in values[1]:
        return None
    x, y = (torch.from_numpy(side[site]) for side in values)
    return None if torch.equal(x, y) else Change(site, spec, shape, size, ratio_db(x, y - x))


def _bytes(inspection: Inspection) -> int:
    return sum(layer.bytes_after for layer in inspection.layers)


def _sides(change: Change) -> tuple[str, str]:
    shapes = change.shape if change.kind in ("shape", "added", "removed") else (None, None)
    first, second = (
        " ".join(filter(None, (spec or "", "x".join(map(str, shape)) if shape else "")))
        for spec, shape in zip(change.spec, shapes, strict=True)
    )
    return first, second


def _what(change: Change) -> str:
    return change.kind if change.snr_db is None else f"{change.kind}, {change.snr_db:.1f} dB"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
