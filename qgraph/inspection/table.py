"""An inspection as text: one table, and below it what no table holds."""

from __future__ import annotations

import math
import re
import shutil
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from qgraph.inspection.code import short_where
from qgraph.inspection.layers import FloatTensor, Layer
from qgraph.terminal import as_text

if TYPE_CHECKING:
    from qgraph.graph import OpaqueModule
    from qgraph.inspection.summary import Inspection

NARROWEST, USUAL, WIDEST = 80, 120, 200
ROOMY = 100  # below, the groups (the spec says them too) and a file's forms have no column
MANY = 20  # how many notes are shown
NAMED = 6  # how many names a line lists before it says how many more there are


def render(inspection: Inspection, width: int | None = None) -> str:
    """The text of an inspection in `width` columns, by default those of the terminal."""
    if width is None:
        width = min(max(shutil.get_terminal_size((USUAL, 24)).columns, NARROWEST), WIDEST)
    table = as_text(_table(inspection, width), width).splitlines() if inspection.layers else []
    below = [wrapped for line in _lines(inspection) for wrapped in _wrapped(line, width)]
    return "\n".join([*_wrapped(inspection.title, width), *table, "", *below])


def _wrapped(line: str, width: int) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""]


def _table(inspection: Inspection, width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    onnx = inspection.kind == "onnx"
    rows = [_cells(layer) for layer in inspection.layers]
    longest = max(len(row[0]) for row in rows)
    share = width * 3 // 8 if width >= ROOMY else width // 5
    table.add_column("weight", overflow="fold", min_width=min(longest, share))
    table.add_column("op", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column("spec", overflow="fold")
    if width >= ROOMY:
        table.add_column("groups", overflow="fold")
    table.add_column("bits/w", justify="right", no_wrap=True)
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    if not onnx:
        table.add_column("dB", justify="right", no_wrap=True)
    elif width >= ROOMY:
        table.add_column("form", overflow="fold")
    for layer, row in zip(inspection.layers, rows, strict=True):
        last = layer.form if onnx else decibels(layer.error_db)
        cells = [*row, last] if width >= ROOMY else [*row[:4], *row[5:], *([] if onnx else [last])]
        table.add_row(*cells)
    return table


def _cells(layer: Layer) -> list[str]:
    shape = "x".join(map(str, layer.shape))
    tied = layer.tied_to is not None
    name = layer.site if layer.captured or layer.reason else f"{layer.site} *"
    if tied:
        name = f"{layer.site} again" if layer.tied_to == layer.site else f"{layer.site} = {layer.tied_to}"
    sizes = ["", ""] if tied else [f"{layer.bytes_before:,}", f"{layer.bytes_after:,}"]
    return [name, layer.op, shape, layer.spec, layer.groups, f"{layer.bits_per_weight:.2f}", *sizes]


def decibels(value: float | None) -> str:
    """A signal-to-noise ratio with one decimal; "exact" where nothing is lost."""
    if value is None:
        return ""
    if math.isinf(value):
        return "exact" if value > 0 else "-inf"
    return f"{value:.1f}"


def _lines(inspection: Inspection) -> list[str]:
    lines = [*_total_lines(inspection), *_end_lines(inspection), *_reason_lines(inspection)]
    if inspection.kind == "prepared":
        lines += _coverage_lines(inspection)
    lines += inspection.remarks
    if inspection.kind == "eager":
        lines.append("sites are those of torch's own layers and parameters; a call with an example shows all of them")
    return lines


def _total_lines(inspection: Inspection) -> list[str]:
    totals = inspection.totals
    lines = []
    if totals.weights_quantized:
        ratio = totals.bytes_before / max(1, totals.bytes_after)
        lines.append(
            f"{totals.layers_quantized} of {totals.layers} sites quantized: {totals.weights_quantized:,} "
            f"weights, {totals.bytes_before:,} -> {totals.bytes_after:,} bytes ({ratio:.1f}x), "
            f"{totals.bits_per_weight:.3f} bits a weight"
        )
    else:
        lines.append(
            f"{totals.layers} {'site' if totals.layers == 1 else 'sites'}, {totals.weights:,} weights, none quantized"
        )
    if totals.weights_quantized:
        lines.append(
            f"left float {totals.float_bytes:,} bytes; whole model {totals.model_bytes_before:,} -> "
            f"{totals.model_bytes_after:,} bytes"
        )
    else:
        lines.append(f"whole model {totals.model_bytes_before:,} bytes")
    if inspection.file_bytes is not None:
        lines.append(f"file: {inspection.file_bytes:,} bytes")
    return lines


def _end_lines(inspection: Inspection) -> list[str]:
    if inspection.first is None or inspection.last is None:
        return []
    ends = [f"{which} {layer.site} ({layer.spec})" for which, layer in
            (("first layer", inspection.first), ("last layer", inspection.last))]  # fmt: skip
    unknown = inspection.kind != "onnx" and not inspection.coverage.graphs
    return ["; ".join(ends) + (", by their places in the model" if unknown else "")]


def _reason_lines(inspection: Inspection) -> list[str]:
    by_reason: dict[str, list[tuple[str, int]]] = {}
    for layer in inspection.layers:
        if layer.reason is not None and layer.tied_to is None and inspection.kind == "prepared":
            by_reason.setdefault(layer.reason, []).append((layer.site, layer.bytes_after))
    for item in inspection.floats:
        by_reason.setdefault(item.reason, []).append((item.name, item.bytes))
    lines = ["left float:"] if by_reason else []
    for reason, items in by_reason.items():
        size = sum(bytes_ for _, bytes_ in items)
        lines.append(f"  {reason}: {len(items)} ({size:,} bytes): {_some(name for name, _ in items)}")
    return lines


def _coverage_lines(inspection: Inspection) -> list[str]:
    found = inspection.coverage
    lines = [
        f"captured: {found.captured} of {found.modules} modules, {found.graphs} graphs; "
        f"calls that no graph held for: {found.guard_misses}"
    ]
    if not found.graphs and not found.opaque:
        lines.append("* nothing is captured yet: run the model once, or prepare it with example_inputs")
    outside = [layer for layer in inspection.layers if not layer.captured and layer.reason is None]
    waiting = [layer.site for layer in outside if not layer.where]
    python = [layer.site for layer in outside if layer.where]
    if waiting and found.graphs:
        lines.append(f"* not run in the captured calls: {len(waiting)}: {_some(waiting)}")
    if python:
        lines.append(f"* in no graph, quantized while Python runs: {len(python)}: {_some(python)}")
    lines += _opaque_lines(found.opaque)
    notes = [note for note in inspection.notes if note.pass_name not in _STANDARD]
    lines += [f"note: {note.pass_name}: {note.site or 'the model'}: {note.text}" for note in notes[:MANY]]
    if len(notes) > MANY:
        lines.append(f"and {len(notes) - MANY} more notes, in .notes")
    return lines


def _opaque_lines(opaque: Iterable[OpaqueModule]) -> list[str]:
    """One line for modules of one class that stay Python at one place for one reason, numbers in it aside."""
    alike: dict[tuple[str, ...], list[OpaqueModule]] = {}
    for module in opaque:
        key = (module.kind, module.where, re.sub(r"\d+", "#", module.reason))
        alike.setdefault(key, []).append(module)
    lines = []
    for found in alike.values():
        modes = " and ".join(dict.fromkeys("train" if module.training else "eval" for module in found))
        paths = list(dict.fromkeys(module.path or "the model" for module in found))
        place = short_where(found[0].where)
        reason = found[0].reason + (f" at {place}" if place else "")
        count = f"{len(paths)} times: " if len(paths) > 1 else ""
        lines.append(f"stays Python ({modes}): {count}{_some(paths)} ({found[0].kind}): {reason}")
    return lines


_STANDARD = ("sparsify-weights", "quantize-weights", "quantize-activations", "share-quantizers")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - NAMED
    return ", ".join(listed[:NAMED]) + (f" and {more} more" if more > 0 else "")


__all__ = ["FloatTensor", "decibels", "render"]
