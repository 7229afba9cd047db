"""Two inspections side by side: which weights were treated differently, and what that did to their bytes.

What the two compute is another question; this compares specs, shapes and sizes alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from qgraph.inspection.layers import Layer
from qgraph.inspection.summary import Inspection
from qgraph.terminal import as_text

__all__ = ["Change", "Difference", "difference"]


@dataclass(frozen=True, slots=True)
class Change:
    """One weight in both: what differs in words, None on the side that lacks it."""

    site: str
    spec: tuple[str | None, str | None]
    shape: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    bytes: tuple[int | None, int | None]

    @property
    def kind(self) -> str:
        """``added``, ``removed``, ``shape``, ``spec`` or ``size``."""
        if self.spec[0] is None:
            return "added"
        if self.spec[1] is None:
            return "removed"
        if self.shape[0] != self.shape[1]:
            return "shape"
        return "spec" if self.spec[0] != self.spec[1] else "size"


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
        return data

    def __str__(self) -> str:
        first, second = self.titles
        lines = [f"a: {first}", f"b: {second}"]
        if self.changes:
            table = Table()
            for name in ("weight", "what", "a", "b", "bytes a", "bytes b"):
                table.add_column(name, justify="right" if name.startswith("bytes") else "left", overflow="fold")
            for change in self.changes:
                table.add_row(change.site, change.kind, *_sides(change), *map(_count, change.bytes))
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
    changes = []
    for site in (*mine, *(site for site in theirs if site not in mine)):
        change = _change(site, mine.get(site), theirs.get(site))
        if change is not None:
            changes.append(change)
    same = len(mine.keys() | theirs.keys()) - len(changes)
    return Difference((a.title, b.title), tuple(changes), same, (_bytes(a), _bytes(b)))


def _change(site: str, a: Layer | None, b: Layer | None) -> Change | None:
    spec = (a.spec if a else None, b.spec if b else None)
    shape = (a.shape if a else None, b.shape if b else None)
    size = (a.bytes_after if a else None, b.bytes_after if b else None)
    if spec[0] == spec[1] and shape[0] == shape[1] and size[0] == size[1]:
        return None
    return Change(site, spec, shape, size)


def _bytes(inspection: Inspection) -> int:
    return sum(layer.bytes_after for layer in inspection.layers)


def _sides(change: Change) -> tuple[str, str]:
    shapes = change.shape if change.kind in ("shape", "added", "removed") else (None, None)
    first, second = (
        " ".join(filter(None, (spec or "", "x".join(map(str, shape)) if shape else "")))
        for spec, shape in zip(change.spec, shapes, strict=True)
    )
    return first, second


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
