"""Mixed bits against uniform bits at the same size: the digits CNN and transformer of `qgraph demo`.

Run: python benchmarks/allocate.py --json benchmarks/results/allocate.json      (some three minutes a seed)

Each model is trained in float, prepared, and its bits are allocated within the bytes of a uniform config, once by
evaluations on images held out of training, once by each proxy. All are scored on the test images as they are then, and
after the same short training with quantization. The proxies' Spearman correlation with the evaluated costs is over all
layers and candidates.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import scipy
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn

import qgraph
from qgraph.analysis.allocate import Allocation, allocation
from qgraph.demo import MODELS, _digits

HELD_OUT = 300
BATCH = 64
BASE = "W8"


def main() -> None:
    """Measure, print, and write JSON where asked."""
    options = arguments()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    correlations: list[dict[str, Any]] = []
    start = time.perf_counter()
    for name in options.models:
        for seed in options.seeds:
            found, correlated = measure(name, seed, options)
            rows += found
            correlations += correlated
    table = Table("model", "seed", "bits", "bytes", "bits/weight", "loss", "accuracy", "loss, trained", "acc., trained")
    for row in rows:
        table.add_row(
            row["model"], str(row["seed"]), row["bits"], f"{row['bytes']:,}", f"{row['bits_per_weight']:.2f}",
            f"{row['loss']:.3f}", f"{row['accuracy']:.1%}",
            f"{row['trained_loss']:.3f}", f"{row['trained_accuracy']:.1%}",
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    for row in correlations:
        console.print(f"{row['model']}, seed {row['seed']}: {row['proxy']} against evaluations: {row['spearman']:.3f}")
    if options.json:
        conditions = {
            "command": " ".join(["python", *sys.argv]),
            "torch": torch.__version__,
            "scipy": scipy.__version__,
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": 1,
            "epochs": options.epochs,
            "quantized_epochs": options.quantized_epochs,
            "seconds": round(time.perf_counter() - start),
        }
        data = {"conditions": conditions, "rows": rows, "correlations": correlations}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


def measure(name: str, seed: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One model: its rows, and how the proxies rank."""
    data = _digits(seed)
    held, train_x = data.train_x[:HELD_OUT], data.train_x[HELD_OUT:]
    held_y, train_y = data.train_y[:HELD_OUT], data.train_y[HELD_OUT:]
    torch.manual_seed(seed)
    model = MODELS[name]()
    train(model, train_x, train_y, options.epochs, 2e-3, seed)
    prepared = qgraph.prepare(model, BASE, (held[:2],))
    batches = [(held[i : i + BATCH], held_y[i : i + BATCH]) for i in range(0, HELD_OUT, BATCH)]

    def evaluate(candidate: nn.Module) -> float:
        return scores(candidate, held, held_y)[0]

    def plan(budget: int, how: Any) -> Allocation:
        return allocation(
            prepared, f"{8 * (budget + 0.5) / weights} bits", evaluate, how=how, lower_is_better=True, batches=batches,
            loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        )  # fmt: skip

    layers = [layer for layer in qgraph.inspect(prepared).layers if layer.weight is not None]
    weights = sum(math.prod(layer.shape) for layer in layers)
    rows = []
    plans: dict[str, Allocation] = {}
    for bits in options.bits:
        uniform = qgraph.prepare(model, f"W{bits}", (held[:2],))
        budget = sum(layer.bytes_after for layer in qgraph.inspect(uniform).layers if layer.weight is not None)
        configs: dict[str, Any] = {f"uniform W{bits}": (f"W{bits}", budget)}
        for how in ("evaluate", "fisher", "snr"):
            plans[how] = plan(budget, how)
            configs[f"mixed, {how}, as W{bits}"] = (plans[how].config, plans[how].stored)
        for label, (config, stored) in configs.items():
            quantized = qgraph.prepare(model, config, (held[:2],))
            loss, accuracy = scores(quantized, data.test_x, data.test_y)
            train(quantized, train_x, train_y, options.quantized_epochs, 5e-4, seed)
            after = scores(quantized, data.test_x, data.test_y)
            rows.append({
                "model": name, "seed": seed, "bits": label, "bytes": stored, "bits_per_weight": 8 * stored / weights,
                "loss": loss, "accuracy": accuracy, "trained_loss": after[0], "trained_accuracy": after[1],
            })  # fmt: skip
    return rows, [
        {"model": name, "seed": seed, "proxy": how, "spearman": rank_correlation(plans[how], plans["evaluate"])}
        for how in ("fisher", "snr")
    ]


def rank_correlation(proxy: Allocation, real: Allocation) -> float:
    """Spearman's, over all layers and candidates but the widest, whose cost is 0 by definition."""
    pairs = [
        (a.costs[bits], b.costs[bits])
        for a, b in zip(proxy.layers, real.layers, strict=True)
        for bits in sorted(a.costs)[:-1]
    ]
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


@torch.no_grad()
def scores(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and accuracy in eval mode."""
    model.eval()
    out = model(x)
    return float(F.cross_entropy(out, y)), float((out.argmax(1) == y).float().mean())


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float, seed: int) -> None:
    """AdamW with a rate that decays to 0."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    steps = epochs * (len(x) // BATCH)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order)[: len(x) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--quantized-epochs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
