"""What `qgraph.sensitivity` costs with activations kept, over evaluations in full, and how well the gradient ranks.

Run: python -m benchmarks.sensitivity --json benchmarks/results/sensitivity.json      (six minutes)

Cost: GPT and ResNet-18, in turns, over the same batches of random data, under torch.no_grad; both must find the same
scores. Ranks: Spearman's correlation of how="gradient", and of calls=2, with evaluations of each layer, on the trained
models of `qgraph demo` and 300 images held out in six batches.
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
from scipy.stats import spearmanr
from torch import Tensor, nn

import qgraph
from benchmarks.allocate_models import DEMO, demo
from benchmarks.training_models import MODELS

FIRST, CALLS = 5, 2
RANKED = ("W4", "W2", "A4W2", "A2W2")
CONFIGS = {"gpt": "A8W4@128", "resnet18": "A4W2"}


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(name, how, options.batches, options.rows, options.rounds)
        for name in MODELS
        for how in ("quantized", "float")
    ]
    table = Table(
        "model",
        "config",
        "how",
        "layers",
        "one evaluation s",
        "full s",
        "kept s",
        "kept / full",
        f"first {FIRST} / full",
        f"{CALLS} calls / full",
        "kept",
    )
    for row in rows:
        table.add_row(
            row["model"], row["config"], row["how"], str(row["layers"]), f"{row['evaluation']:.2f}",
            f"{row['full']:.2f}", f"{row['kept']:.2f}", f"{row['kept'] / row['full']:.2f}",
            f"{row['first'] / row['full']:.2f}", f"{row['sampled'] / row['full']:.2f}", row["cached"],
        )  # fmt: skip
    Console(width=160).print(table)
    ranks = [rank(name, seed) for name in DEMO for seed in options.seeds]
    table = Table("model", "seed", "layers", "by", *RANKED)
    for row in ranks:
        for how in ("gradient", "calls"):
            found = (f"{row[how][config]:.2f}" for config in RANKED)
            table.add_row(row["model"], str(row["seed"]), str(row["layers"]), how, *found)
    Console(width=160).print(table)
    if options.json:
        conditions = {
            "command": " ".join(["python", *sys.argv]),
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": 1,
            "clock": "time of this process",
        }
        options.json.write_text(json.dumps({"conditions": conditions, "rows": rows, "ranks": ranks}, indent=1) + "\n")


def measure(name: str, how: Any, count: int, rows: int, rounds: int) -> dict[str, Any]:
    """Medians of rankings in turns, in seconds of this process."""
    model, x, y = MODELS[name]()
    batches = [(x[i : i + rows], y[i : i + rows]) for i in torch.randint(0, len(x) - rows, (count,)).tolist()]
    prepared = qgraph.prepare(model, CONFIGS[name], batches[0][0])

    @torch.no_grad()
    def evaluate(candidate: nn.Module) -> float:
        candidate.eval()
        return sum(float(loss(candidate(inputs), targets)) for inputs, targets in batches) / count

    evaluate(prepared)
    seconds: dict[int, list[float]] = {0: [], 1 << 30: []}
    single, scores, found, some, sampled = [], set(), None, [], []
    for _ in range(rounds):
        started = time.process_time()
        evaluate(prepared)
        single.append(time.process_time() - started)
        for cache, times in seconds.items():
            started = time.process_time()
            found = qgraph.sensitivity(
                prepared, evaluate, how=how, lower_is_better=True, cache_bytes=cache, progress=False
            )
            times.append(time.process_time() - started)
            scores.add(tuple((row.name, row.score) for row in found.layers))
        started = time.process_time()
        qgraph.sensitivity(
            prepared, evaluate, how=how, lower_is_better=True, progress=False, first=FIRST, batches=batches,
            loss=lambda m, batch: loss(m(batch[0]), batch[1]),
        )  # fmt: skip
        some.append(time.process_time() - started)
        started = time.process_time()
        qgraph.sensitivity(prepared, evaluate, how=how, lower_is_better=True, progress=False, calls=CALLS)
        sampled.append(time.process_time() - started)
    assert found is not None and len(scores) == 1, "kept activations gave other scores"
    full, kept = (statistics.median(times) for times in seconds.values())
    return {
        "model": name, "config": CONFIGS[name], "how": how, "layers": len(found.layers), "full": full, "kept": kept,
        "first": statistics.median(some),
        "sampled": statistics.median(sampled), "evaluation": statistics.median(single), "cached": found.cached,
    }  # fmt: skip


def rank(name: str, seed: int) -> dict[str, Any]:
    """How the gradient, and a sample of the calls, rank the layers of one trained model, at several configs."""
    trained = demo(name, seed, epochs=6)
    batches = [*zip(*(part.split(50) for part in trained.held_out), strict=True)]
    row: dict[str, Any] = {"model": name, "seed": seed}
    for config in RANKED:
        prepared = qgraph.prepare(trained.model, config, trained.example)

        @torch.no_grad()
        def evaluate(candidate: nn.Module) -> float:
            candidate.eval()
            return sum(float(F.cross_entropy(candidate(x), y)) for x, y in batches) / len(batches)

        real = qgraph.sensitivity(prepared, evaluate, lower_is_better=True, progress=False)
        sampled = qgraph.sensitivity(prepared, evaluate, lower_is_better=True, progress=False, calls=CALLS)
        gradient = qgraph.sensitivity(
            prepared, how="gradient", loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]), batches=batches, progress=False
        )
        row["layers"] = len(real.layers)
        for how, found in (("gradient", gradient), ("calls", sampled)):
            costs = {layer.name: layer.cost for layer in found.layers}
            pairs = [(layer.cost, costs[layer.name]) for layer in real.layers]
            row.setdefault(how, {})[config] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
            places = row.setdefault(f"place of the worst by {how}", {})
            places[config] = 1 + [layer.name for layer in found.layers].index(real.worst.name)
    return row


def loss(output: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over the last dimension."""
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


if __name__ == "__main__":
    main()
