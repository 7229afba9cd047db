"""`make zoo`: every architecture in a process of its own, a table of what was found, and the same as JSON.

    python -m tests.zoo.run [names or families...] [--check capture,compile,export] [--json zoo.json] [--jobs 2]

The processes are forked from one that has imported the library already and has run nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from tests.zoo import checks as capture
from tests.zoo import compiled, exports
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.checks import Call, Found
from tests.zoo.traps import TRAPS

CHECKS = ("capture", "compile", "export")
MODELS = {**dict.fromkeys(TRAPS, "trap"), **{name: a.family for name, a in ARCHITECTURES.items()}}


def build(name: str) -> tuple[nn.Module, list[Call]]:
    """A model of the zoo and its calls: the example, the second shape, one with other keywords."""
    torch.manual_seed(0)
    if name in TRAPS:
        case = TRAPS[name]
        model, calls = case.make(), [Call(case.inputs(i)) for i in (0, 1)]
        model(*copy.deepcopy(calls[0].args))  # lazy layers take their sizes
        return model.eval(), calls
    architecture = ARCHITECTURES[name]
    inputs = [architecture.inputs(0), architecture.inputs(1)]
    if architecture.changed:
        inputs.append({**inputs[0], **architecture.changed})
    return architecture.make().eval(), [Call(kwargs=kwargs) for kwargs in inputs]


def check_one(name: str, checks: Sequence[str] = CHECKS) -> Found:
    """Build one model and run the checks asked for, in this process."""
    started = time.perf_counter()
    model, calls = build(name)
    found = capture.check(name, model, calls) if "capture" in checks else Found(name)
    if "compile" in checks:
        compiled.check(found, model, calls)
    if "export" in checks:
        exports.check(found, model, calls)
    found.seconds = time.perf_counter() - started
    return found


def check_apart(name: str, limit: float, checks: Sequence[str] = ("capture",)) -> dict[str, Any]:
    """The same in a process of its own, with a time limit."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, checks, sender), daemon=True)
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(limit) else Found(name, [f"longer than {limit:.0f} s"])
    except EOFError:
        process.join()
        found = Found(name, [f"the process died with code {process.exitcode}"])
    process.kill()
    process.join()
    return asdict(found)


def _child(name: str, checks: Sequence[str], sender: Connection) -> None:
    warnings.simplefilter("ignore")
    try:
        found = check_one(name, checks)
    except Exception as error:
        traceback.print_exc()
        found = Found(name, [f"{type(error).__name__}: {error}"])
    sender.send(found)


def table(results: list[dict[str, Any]], checks: Sequence[str] = CHECKS) -> Table:
    """One line a model, a few columns a check."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "model": lambda r: r["name"],
        "family": lambda r: MODELS[r["name"]],
        "result": lambda r: "[green]pass" if not r["failures"] else "[red]" + escape("\n".join(r["failures"][:3])),
    }
    if "capture" in checks:
        columns["sites"] = lambda r: f"{r['quantized']}/{r['sites']}"
        columns["modules"] = lambda r: f"{r['captured']}/{r['modules']}"
        columns["graphs"] = lambda r: str(r["graphs"])
        columns["misses"] = lambda r: str(r["misses"])
        columns["opaque"] = lambda r: escape("\n".join(r["opaque"]))
    if "compile" in checks:
        columns["breaks (eager)"] = lambda r: f"{r['breaks']} ({r['eager_breaks']})"
    if "export" in checks:
        columns["file"] = lambda r: escape(r["export"][:300])
        columns["shapes"] = lambda r: str(r["export_calls"])
    columns["seconds"] = lambda r: f"{r['seconds']:.1f}"
    shown = Table(*columns)
    for r in results:
        shown.add_row(*(text(r) for text in columns.values()))
    found = [f"{sum(not r['failures'] for r in results)} of {len(results)} pass"]
    if "capture" in checks:
        found.append(f"{sum(not r['opaque'] for r in results)} without opaque modules")
    if "export" in checks:
        refused = sum(r["export"].startswith("refused") for r in results)
        found.append(f"{sum(bool(r['export']) for r in results) - refused} exported, {refused} refused")
    shown.caption = ", ".join(found)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="models or families; all where none is given")
    parser.add_argument("--check", default="capture", help=f"which checks: {','.join(CHECKS)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120, help="seconds a model")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import transformers.modeling_utils  # noqa: F401  the costly import, once for all processes

    torch.set_num_threads(1)
    checks = options.check.split(",")
    if unknown := set(checks) - set(CHECKS):
        parser.error(f"--check: found {', '.join(unknown)}; expected {', '.join(CHECKS)}")
    names = [n for n, family in MODELS.items() if not options.names or {n, family} & set(options.names)]
    results = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(lambda name: check_apart(name, options.limit, checks), names):
            results.append(found)
            state = "; ".join(found["failures"]) or "pass"
            print(f"{found['name']}: {state} {found['opaque'] or ''} {found['export']}", file=sys.stderr, flush=True)
    Console(width=None if sys.stdout.isatty() else 200).print(table(results, checks))
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "models": results}, indent=1))
    return int(any(r["failures"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
