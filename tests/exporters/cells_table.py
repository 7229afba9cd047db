"""The results of `tests.exporters.cells` as a page: how much was run, the form of the cells, and what is refused."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import qgraph
from qgraph.errors import ConfigError

Results = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]  # of each layer and target

INTRODUCTION = """\
# Cells of the export

A cell is a layer, the width of its weights, their granularity, their sparsity, its activations, and a target. It
passes when `qgraph.export` writes the file: onnx.checker takes it, and onnxruntime, with and without its optimizer,
agrees with torch on two batch sizes. What is run by

```sh
make cells ARGS="--pairs"                        # the fewest cells that hold every pair of values
make cells ARGS="--layer embedding"              # every cell of a layer
make cells                                       # every cell
make cells ARGS="--layer --table docs/cells.md"  # nothing more: the page, of what has been run
```

is kept in `cells.jsonl`, and a stopped run goes on from there.

| axis | values |
| --- | --- |
| weights | 1, 1.58, 2, 3, 4, 5, 6, 7, 8 bits |
| granularity | tensor, channel, blocks of 32, 64, 128, 256; ragged: blocks of 32 in rows that are no multiple of it |
| sparsity | dense, 2:4, 1:4, 1:8, 4:8, 3:7, 70 %, 90 % |
| activations | float; 8, 4, 2, 1 bits (in the weight's blocks; at convolutions one scale a sample); 8s: 8, static |
| target | standard; ort, with `optimize_for="size"`: all its kernels, also where they are slower |

Layers are tiny, so the forms for large ones (an integer convolution, a chain of them) show in `docs/static.md` instead.
Pruned weights, and weights from 3 bits up beside 8s, are symmetric, as the notation has it.
The cell of 4 bits, blocks of 64, 2:4 and 8-bit activations is

```python
import qgraph

config = qgraph.QConfig.parse("A8W4-2:4@64")
print(config.weight, config.activation, config.sparsity, sep="\\n")
```

```text
4-bit linear ddt per block 64
8-bit linear ste per block 64
2:4
```
"""

REFUSED: dict[str, Callable[[], object]] = {
    "affine weights, pruned": lambda: qgraph.QConfig(qgraph.QuantSpec(4, "affine"), sparsity=_sparsity("2:4")),
    "affine ternary weights": lambda: qgraph.QuantSpec(1.58, "affine"),
    "9 bits": lambda: qgraph.QuantSpec(9),
    "static ranges in blocks": lambda: qgraph.QuantSpec(8, granularity="block", group_size=32, range="static"),
    "static weights": lambda: qgraph.QConfig(qgraph.QuantSpec(8, "affine", "tensor", method="ste", range="static")),
    "symmetric static activations of 1 bit": lambda: qgraph.QuantSpec(1, "linear", "tensor", range="static"),
    "2:64": lambda: _sparsity("2:64"),
}


def _sparsity(text: str) -> qgraph.SparsitySpec:
    return qgraph.SparsitySpec.parse(text)


def markdown(results: Iterable[Mapping[str, Any]], totals: Mapping[tuple[str, str], int]) -> str:
    """The page.

    Parameters
    ----------
    results : records of `tests.exporters.cells`
    totals : number of cells of each layer and target
    """
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {place: [] for place in totals}
    for result in results:
        found[result["cell"][0], result["cell"][5]].append(result)
    run = {place: items for place, items in found.items() if items}
    parts = [INTRODUCTION, _conditions(), _counts(run, totals), _forms(run), _failures(run), _refused()]
    return "\n".join(part for part in parts if part)


def _conditions() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "onnx"))
    return f"Run with {packages}, Python {platform.python_version()}, {platform.machine()}, one thread a process.\n"


def _counts(run: Results, totals: Mapping[tuple[str, str], int]) -> str:
    lines = [
        "## What was run\n",
        "The largest difference is that of a layer's output, relative to its largest value.\n",
        "| layer | target | cells run | of | pass | largest difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (layer, target), items in run.items():
        passed = [item for item in items if "failure" not in item]
        differences = [item["difference"] for item in passed if item["difference"] is not None]
        worst = f"{max(differences):.0e}" if differences else ""
        of = totals[layer, target]
        lines.append(f"| {layer} | {target} | {len(items)} | {of} | {len(passed)} | {worst} |")
    ran = sum(len(items) for items in run.values())
    rest = ", ".join(f"{layer} ({target})" for layer, target in totals if (layer, target) not in run)
    none = f" Not run for this page: {rest}; the tests export 22 cells of each, 11 of lstm and gru." if rest else ""
    lines.append(f"\n{ran:,} of {sum(totals.values()):,} cells.{none}\n")
    return "\n".join(lines)


def _forms(run: Results) -> str:
    """Of each form the values that it was seen with; which cells were run, says the table before."""
    lines = [
        "## Forms\n",
        "The values that each form was seen with, axis by axis. `unpacked`: packed bytes, unpacked when the file is",
        "loaded; `packed rows`: only the rows asked for are unpacked.\n",
        "| layer | target | form | weights | granularity | sparsity | activations | cells |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (layer, target), items in run.items():
        everything = [item["cell"] for item in items]
        forms: dict[str, list[Sequence[Any]]] = {}
        for item in items:
            if "failure" not in item:
                forms.setdefault(_form(item["form"]), []).append(item["cell"])
        for form, cells in sorted(forms.items()):
            values = " | ".join(_values(cells, everything, axis) for axis in (1, 2, 3, 4))
            lines.append(f"| {layer} | {target} | {form} | {values} | {len(cells)} |")
    return "\n".join(lines) + "\n"


def _form(text: str) -> str:
    """Without what the packing of codes is called: it follows from width and sparsity."""
    forms = {
        re.sub(r" unpacked .*", " unpacked", re.sub(r" packed rows, .*", " packed rows", f)) for f in text.split("; ")
    }
    return "; ".join(sorted(forms))


ORDER = ("tensor", "channel", "32", "64", "128", "256", "ragged", "2:4", "1:4", "1:8", "4:8", "3:7", "70%", "90%")


def _values(cells: Sequence[Sequence[Any]], everything: Sequence[Sequence[Any]], axis: int) -> str:
    seen = {cell[axis] for cell in cells}
    if seen == {cell[axis] for cell in everything} and len(seen) > 1:
        return "all"
    none = {3: "dense", 4: "float"}.get(axis, "")
    ordered = sorted(
        seen, key=lambda value: (value is not None, ORDER.index(value) if value in ORDER else 0, str(value))
    )
    return ", ".join(none if value is None else f"{value}" for value in ordered)


def _failures(run: Results) -> str:
    failed = [item for items in run.values() for item in items if "failure" in item]
    if not failed:
        return ""
    lines = ["## What fails\n", "| cell | error |", "| --- | --- |"]
    for item in failed:
        names = ", ".join("none" if value is None else str(value) for value in item["cell"])
        lines.append(f"| {names} | {_cell(item['failure'])} |")
    return "\n".join(lines) + "\n"


def _refused() -> str:
    lines = [
        "## What is refused\n",
        "These are errors of the config, before anything is trained. An embedding's input are integers: it has no",
        "activation quantizer.\n",
        "| asked for | answer |",
        "| --- | --- |",
    ]
    for asked, attempt in REFUSED.items():
        try:
            attempt()
        except ConfigError as error:
            lines.append(f"| {asked} | {_cell(str(error))} |")
        else:
            raise AssertionError(f"{asked}: not refused")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]
