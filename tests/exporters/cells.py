"""The table of export cells: every layer, width, granularity, sparsity, activation and target, exported and checked.

    python -m tests.exporters.cells [--layer linear-2d conv2d] [--pairs] [--json cells.json] [--table docs/cells.md]

A cell passes when `qgraph.export` wrote a file with it: onnx.checker took it, and onnxruntime, with and without its
optimizer, agreed with torch on two batch sizes. Results are appended to the JSON lines file as they come; what passed
there is not run again. `--pairs` runs the fewest cells that hold every pair of values.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import qgraph
from tests.exporters.cells_table import markdown
from tests.exporters.layers import KINDS, Cell, Many, settled

# What CI runs: every width, every granularity, every sparsity and every activation, most pairs of them.
CELLS = (
    Cell(1, "channel"),
    Cell(1, "32", activation="1"),
    Cell(1, "tensor", "2:4", "8"),
    Cell(1.58, "channel", activation="8@32"),
    Cell(1.58, "tensor", "70%", "4"),
    Cell(1.58, "32", "2:4"),
    Cell(2, "32", activation="8@32"),
    Cell(2, "channel", "1:4", "2"),
    Cell(3, "channel", "70%"),
    Cell(3, "32", activation="4"),
    Cell(4, "channel", activation="8"),
    Cell(4, "32", activation="8@32"),
    Cell(4, "tensor", activation="4@32"),
    Cell(5, "channel", "4:8", "8@32"),
    Cell(6, "32", "70%"),
    Cell(7, "tensor"),
    Cell(8, "channel", activation="1"),
    Cell(8, "32", activation="8@32"),
    Cell(7, "channel", activation="8s"),
    Cell(1.58, "tensor", "90%", "8s"),
    Cell(4, "64", "3:7", "8s"),
    Cell(2, "128", "1:8"),
)

BITS = (1, 1.58, 2, 3, 4, 5, 6, 7, 8)
GRANULARITIES = ("tensor", "channel", "32", "64", "128", "256", "ragged")  # ragged: 32, and no row is a multiple
SPARSITIES = (None, "2:4", "1:4", "1:8", "4:8", "3:7", "70%", "90%")
ACTIVATIONS = (None, "8", "4", "2", "1", "8s")  # in the weight's blocks where it has some, as in the notation
TARGETS = ("standard", "ort")
TOGETHER = 24  # cells of one model

Key = tuple[str, float, str, str | None, str | None, str]  # layer, bits, granularity, sparsity, activation, target


def cells_of(layer: str, target: str) -> list[Key]:
    """Every cell of a layer; an embedding has no activation."""
    activations = (None,) if layer == "embedding" else ACTIVATIONS
    axes = itertools.product(BITS, GRANULARITIES, SPARSITIES, activations)
    return [(layer, *values, target) for values in axes]


def covering(cells: Sequence[Key], seed: int = 0) -> list[Key]:
    """A few of them that hold every pair of two axes' values."""
    rest = random.Random(seed).sample(list(cells), len(cells))
    pairs = {key: set(itertools.combinations(enumerate(key), 2)) for key in rest}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(rest, key=lambda key: len(pairs[key] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


def batches(cells: Iterable[Key]) -> Iterator[tuple[Key, ...]]:
    """Cells that go into one model: of a layer, an input size and a target."""
    for _, found in itertools.groupby(sorted(cells, key=_model), key=_model):
        yield from _batched(list(found))


def _model(key: Key) -> tuple[str, bool, str]:
    return key[0], key[2] == "ragged", key[5]


def _batched(found: list[Key]) -> Iterator[tuple[Key, ...]]:
    for start in range(0, len(found), TOGETHER):
        yield tuple(found[start : start + TOGETHER])


def cell(key: Key) -> Cell:
    """The layer's quantizers."""
    layer, bits, granularity, sparsity, activation, _ = key
    granularity = "32" if granularity == "ragged" else granularity
    blocks = granularity.isdigit() and not layer.startswith("conv")  # a convolution's rows are samples
    if activation is not None and blocks and activation != "8s":
        activation = f"{activation}@{granularity}"
    return Cell(bits, granularity, sparsity, activation)


def run(keys: Sequence[Key]) -> list[dict[str, Any]]:
    """Export these cells as one model; where that fails, halves of them, down to the cells that fail."""
    started = time.perf_counter()
    try:
        results = _export(keys)
    except Exception as error:
        if len(keys) == 1:
            return [_result(keys[0], failure=f"{type(error).__name__}: {error}", seconds=time.perf_counter() - started)]
        middle = len(keys) // 2
        results = run(keys[:middle]) + run(keys[middle:])
        if any("failure" in result for result in results):
            return results
        return [result | {"failure": f"in one model with others: {error}"} for result in results]
    seconds = (time.perf_counter() - started) / len(keys)
    return [result | {"seconds": round(seconds, 3)} for result in results]


def _export(keys: Sequence[Key]) -> list[dict[str, Any]]:
    layer, target = keys[0][0], keys[0][5]
    kind = KINDS[layer]
    size = kind.ragged if keys[0][2] == "ragged" else kind.whole
    torch.manual_seed(0)
    x = kind.example(size)
    model = settled(Many(kind, tuple(map(cell, keys)), size), x)
    shapes = {"x": {0: "batch"}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cells.onnx")
        options = {"target": target, "optimize_for": "size"}  # all kernels, also where they are slower
        report = qgraph.export(model, file, (x,), dynamic_shapes=shapes, progress=False, **options)
    found = []
    for index, key in enumerate(keys):
        layers = [item for item in report.layers if item.path == f"layers.{index}" and item.shape]
        if not layers:
            raise AssertionError(f"{key}: its layer is not in the report")
        differences = [item.max_difference for item in layers if item.max_difference is not None]
        forms = sorted({f"{item.op} {item.form}" for item in layers})
        found.append(_result(key, form="; ".join(forms), difference=max(differences, default=None)))
    return found


def _result(key: Key, **found: Any) -> dict[str, Any]:
    return {"cell": list(key), **found}


def read(path: Path | None) -> dict[Key, dict[str, Any]]:
    """Results of an earlier run, the last of each cell; a line cut short is left out."""
    known: dict[Key, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path is not None and path.exists() else ():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        known[tuple(found["cell"])] = found
    return known


def _alone() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def run_all(wanted: Sequence[Key], jobs: int, file: Path | None, console: Console) -> dict[Key, dict[str, Any]]:
    """Run what has not passed yet, in processes; every result is written as soon as it is there."""
    known = read(file)
    todo = [key for key in wanted if key not in known or "failure" in known[key]]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
        concurrent.futures.ProcessPoolExecutor(jobs, context, _alone) as pool,
        open(file or os.devnull, "a", encoding="utf-8") as out,
    ):
        if file is not None and file.read_bytes()[-1:] not in (b"", b"\n"):
            out.write("\n")  # after a line cut short
        bar = progress.add_task("cells", total=len(wanted), completed=len(wanted) - len(todo))
        for future in concurrent.futures.as_completed([pool.submit(run, keys) for keys in batches(todo)]):
            for found in future.result():
                key = tuple(found["cell"])
                known[key] = found
                out.write(json.dumps(found) + "\n")
                if "failure" in found:
                    console.print(f"FAILS {key}: {found['failure']}", markup=False, highlight=False)
            out.flush()
            progress.update(bar, completed=sum(key in known and "failure" not in known[key] for key in wanted))
    return known


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=TARGETS)
    parser.add_argument("--pairs", action="store_true", help="the cells that hold every pair of values")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="JSON lines: appended to, and gone on from")
    parser.add_argument("--table", type=Path, help="write what the JSON file holds as Markdown")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    spaces = {place: cells_of(*place) for place in itertools.product(options.layer, options.target)}
    chosen = [covering(cells) if options.pairs else cells for cells in spaces.values()]
    wanted = list(itertools.chain.from_iterable(chosen))
    console = Console(stderr=True)
    known = run_all(wanted, options.jobs, options.json, console)
    failed = [key for key in wanted if "failure" in known[key]]
    console.print(f"{len(wanted) - len(failed)} of {len(wanted)} cells pass")
    if options.table:
        totals = {place: len(cells_of(*place)) for place in itertools.product(KINDS, TARGETS)}
        options.table.write_text(markdown(known.values(), totals), encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
