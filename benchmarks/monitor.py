"""What `qgraph.monitor` costs: a step of training with it over one without, at its default interval.

Run: python benchmarks/monitor.py --json benchmarks/results/monitor.json      (some two minutes)

Processor time. "over 100 steps" is that of one measurement (its three steps, and 97 that measure nothing) over that of
a hundred steps of training. "side by side" is the median of ratios of a hundred steps with it to a hundred without, in
turns, of one model; where others use the machine it says what the machine does, see its extremes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import qgraph
from qgraph.demo import DigitsCNN, DigitsTransformer

EVERY = 100  # the default of qgraph.monitor
BATCH = 64


def main() -> None:
    """Measure, print, and write JSON where asked."""
    options = arguments()
    torch.set_num_threads(1)
    rows = [
        measure(name, make, config, options.rounds)
        for name, make in (("cnn", DigitsCNN), ("transformer", DigitsTransformer))
        for config in options.configs
    ]
    table = Table(
        "model", "config", "step, ms", "a measurement, ms", "over 100 steps", "side by side", "smallest", "largest"
    )
    for row in rows:
        table.add_row(
            row["model"], row["config"], f"{row['step_ms']:.2f}", f"{row['measurement_ms']:.2f}",
            f"{row['by_parts']:+.2%}", *(f"{row[name] - 1:+.2%}" for name in ("ratio", "smallest", "largest")),
        )  # fmt: skip
    Console(width=130).print(table)
    if options.json:
        conditions = {
            "command": " ".join(["python", *sys.argv]),
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": 1,
            "clock": "processor time",
            "batch": BATCH,
            "every": EVERY,
            "rounds": options.rounds,
        }
        options.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


def measure(name: str, make: Any, config: str, rounds: int) -> dict[str, Any]:
    """One model at one config."""
    torch.manual_seed(0)
    x, y = torch.rand(BATCH, 1, 8, 8), torch.randint(0, 10, (BATCH,))
    model = qgraph.prepare(make(), config, (x[:2],))
    optimizer, watch = torch.optim.AdamW(model.parameters(), 1e-4), qgraph.monitor(model)
    assert watch.every == EVERY
    ways = [(model, optimizer, None), (model, optimizer, watch)]
    for way in ways:  # memory, compiled passes
        steps(*way, x, y)
    ratios, times, measured = [], [], []
    for i in range(rounds):
        found: dict[int, float] = {}
        for place in (0, 1) if i % 2 else (1, 0):
            found[place] = steps(*ways[place], x, y)
        ratios.append(found[1] / found[0])
        times.append(found[0] / EVERY)
        measured.append(alone(watch))
    return {
        "model": name,
        "config": config,
        "step_ms": 1e3 * statistics.median(times),
        "measurement_ms": 1e3 * statistics.median(measured),
        "by_parts": statistics.median(measured) / EVERY / statistics.median(times),
        "ratio": statistics.median(ratios),
        "smallest": min(ratios),
        "largest": max(ratios),
    }


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, watch: Any, x: Tensor, y: Tensor) -> float:
    """Seconds of processor time of one interval."""
    start = time.process_time()
    for _ in range(EVERY):
        F.cross_entropy(model(x), y).backward()
        if watch is not None:
            watch.step()
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - start


def alone(watch: Any) -> float:
    """Seconds of one measurement, its three steps, and of the steps that measure nothing."""
    start = time.process_time()
    for _ in range(EVERY):
        watch.step()
    return time.process_time() - start


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["W4", "A4W1", "A4W1-2:4"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
