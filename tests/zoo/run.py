"""`make zoo`: every architecture in a process of its own, a table of what was found, and the same as JSON.

    python -m tests.zoo.run [names...] [--json zoo.json] [--jobs 2] [--limit 120]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.checks import Found, check

_MARK = "zoo-result:"


def check_one(name: str) -> Found:
    """Build one architecture and run its checks, in this process."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = architecture.make().eval()
    first = architecture.inputs(0)
    calls = [first, architecture.inputs(1)]
    if architecture.changed:
        calls.append({**first, **architecture.changed})
    return check(name, model, calls)


def check_apart(name: str, limit: float) -> dict[str, Any]:
    """The same in a process of its own, with a time limit."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.zoo.run", "--one", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return asdict(Found(name, [f"longer than {limit:.0f} s"]))
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return asdict(Found(name, [f"died: {last}"]))


def table(results: list[dict[str, Any]]) -> Table:
    """One line a model."""
    shown = Table("model", "family", "result", "sites", "modules", "graphs", "misses", "seconds", "opaque")
    for r in results:
        verdict = "[green]pass" if not r["failures"] else "[red]" + "\n".join(r["failures"][:3])
        shown.add_row(
            r["name"],
            ARCHITECTURES[r["name"]].family,
            verdict,
            f"{r['quantized']}/{r['sites']}",
            f"{r['captured']}/{r['modules']}",
            str(r["graphs"]),
            str(r["misses"]),
            f"{r['seconds']:.1f}",
            "\n".join(r["opaque"]),
        )
    passed = sum(not r["failures"] for r in results)
    shown.caption = f"{passed} of {len(results)} pass, {sum(not r['opaque'] for r in results)} without opaque modules"
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures or families; all where none is given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120, help="seconds a model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")
        try:
            found = check_one(options.one)
        except Exception as error:
            traceback.print_exc()
            found = Found(options.one, [f"{type(error).__name__}: {error}"])
        print(_MARK + json.dumps(asdict(found)))
        return 0
    names = [n for n, a in ARCHITECTURES.items() if not options.names or {n, a.family} & set(options.names)]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = []
        for found in pool.map(lambda name: check_apart(name, options.limit), names):
            results.append(found)
            print(found["name"], "; ".join(found["failures"]) or "pass", file=sys.stderr, flush=True)
    Console(width=None if sys.stdout.isatty() else 200).print(table(results))
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "models": results}, indent=1))
    return int(any(r["failures"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
