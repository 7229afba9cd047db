"""`make zoo`: every architecture in a process of its own, a table of what was found, and the same as JSON.

    python -m tests.zoo.run [names or families...] [--json zoo.json] [--jobs 2] [--limit 120]

The processes are forked from one that has imported the library already and has run nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import traceback
import warnings
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.zoo.architectures import ARCHITECTURES


def check_one(name: str) -> Any:
    """Build one architecture and run its checks, in this process."""
    import torch

    from tests.zoo.checks import Call, check

    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = architecture.make().eval()
    first = architecture.inputs(0)
    calls = [first, architecture.inputs(1)]
    if architecture.changed:
        calls.append({**first, **architecture.changed})
    return check(name, model, [Call(kwargs=kwargs) for kwargs in calls])


def check_apart(name: str, limit: float) -> dict[str, Any]:
    """The same in a process of its own, with a time limit."""
    from tests.zoo.checks import Found

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, sender), daemon=True)
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


def _child(name: str, sender: Connection) -> None:
    from tests.zoo.checks import Found

    warnings.simplefilter("ignore")
    try:
        found = check_one(name)
    except Exception as error:
        traceback.print_exc()
        found = Found(name, [f"{type(error).__name__}: {error}"])
    sender.send(found)


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
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import torch
    import transformers.modeling_utils  # noqa: F401  the costly import, once for all processes

    torch.set_num_threads(1)
    names = [n for n, a in ARCHITECTURES.items() if not options.names or {n, a.family} & set(options.names)]
    results = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(lambda name: check_apart(name, options.limit), names):
            results.append(found)
            state = "; ".join(found["failures"]) or "pass"
            print(f"{found['name']}: {state} {found['opaque'] or ''}", file=sys.stderr, flush=True)
    Console(width=None if sys.stdout.isatty() else 200).print(table(results))
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "models": results}, indent=1))
    return int(any(r["failures"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
