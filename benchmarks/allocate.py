"""Mixed bits against uniform bits at the same size, on two pretrained models and on the two of `qgraph demo`.

Run: python -m benchmarks.allocate --seeds 0 1 --json benchmarks/results/allocate.json      (forty minutes)

`benchmarks.allocate_models` has the models and their data; the pretrained ones need transformers and Pillow. Bits are
allocated within the bytes of a uniform config by 300 samples that no training saw: by the divergence from the float
model's outputs, by the loss, and by two proxies. All are judged on test samples, quantized as they are, and the small
models after a short training too. Spearman's correlation with the costs by divergence is over all layers and widths.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
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
from benchmarks.accuracy.data import DEFAULT_CACHE
from benchmarks.allocate_models import BATCH, DEMO, Samples, Trained, demo, lite0, minilm, train
from qgraph.analysis.allocate import Allocation

BASE = "W8"
HOWS = ("divergence", "loss", "fisher", "snr")


def main() -> None:
    """Measure, print, and write JSON where asked."""
    options = arguments()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    correlations: list[dict[str, Any]] = []
    start = time.perf_counter()
    for name in options.models:
        for seed in options.seeds:
            measured, correlated = measure(name, seed, options)
            rows += measured
            correlations += correlated
    table = Table("model", "seed", "bits", "bytes", "bits/weight", "loss", "accuracy", "loss, trained", "acc., trained")
    for found in rows:
        table.add_row(
            found["model"], str(found["seed"]), found["bits"], shown(found["bytes"], ","),
            shown(found.get("bits_per_weight"), ".2f"), f"{found['loss']:.3f}", f"{found['accuracy']:.1%}",
            shown(found.get("trained_loss"), ".3f"), shown(found.get("trained_accuracy"), ".1%"),
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    for found in correlations:
        shares = f"{found['proxy']} against divergence: {found['spearman']:.3f}"
        console.print(f"{found['model']}, seed {found['seed']}: {shares}")
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
    trained = load(name, seed, options)
    rows = [row(name, seed, "float", trained, trained.model, None, options)]
    with tempfile.TemporaryDirectory() as folder:
        planner = Planner(trained, Path(folder))
        for bits in options.bits if name in DEMO else options.real_bits:
            uniform = qgraph.prepare(trained.model, f"W{bits}", trained.example)
            budget = sum(layer.bytes_after for layer in qgraph.inspect(uniform).layers if layer.weight is not None)
            rows.append(row(name, seed, f"uniform W{bits}", trained, uniform, budget, options))
            for by in HOWS:
                plan = planner.plan(budget, by)
                mixed = qgraph.prepare(trained.model, plan.config, trained.example)
                rows.append(row(name, seed, f"mixed, {by}, as W{bits}", trained, mixed, plan.stored, options))
    return rows, [
        {"model": name, "seed": seed, "proxy": by, "spearman": rank_correlation(planner.last[by], real)}
        for real in (planner.last["divergence"],)
        for by in HOWS[1:]
    ]


def load(name: str, seed: int, options: argparse.Namespace) -> Trained:
    """A model by its name."""
    if name in DEMO:
        return demo(name, seed, options.epochs)
    return {"lite0": lite0, "minilm": minilm}[name](options.cache, seed)


class Planner:
    """Allocations of one model, by each source of costs; evaluated scores are kept for all budgets."""

    def __init__(self, trained: Trained, folder: Path) -> None:
        self.prepared = qgraph.prepare(trained.model, BASE, trained.example)
        layers = [layer for layer in qgraph.inspect(self.prepared).layers if layer.weight is not None]
        self.weights = sum(math.prod(layer.shape) for layer in layers)
        inputs, classes = trained.held_out
        self.batches = list(zip(inputs.split(BATCH), classes.split(BATCH), strict=True))
        self.trained, self.folder = trained, folder
        self.last: dict[str, Allocation] = {}
        self.evaluate: dict[str, Any] = {
            "divergence": qgraph.divergence(self.prepared, [x for x, _ in self.batches], select=trained.logits),
            "loss": lambda candidate: trained.scores(candidate, trained.held_out)[0],
        }

    def plan(self, budget: int, by: str) -> Allocation:
        """Bits within these bytes."""
        how: Any = "evaluate" if by in self.evaluate else by
        self.last[by] = qgraph.allocation(
            self.prepared, f"{8 * (budget + 0.5) / self.weights} bits", self.evaluate.get(by), how=how,
            lower_is_better=True, resume=self.folder / f"{by}.json", batches=self.batches, loss=self._loss,
        )  # fmt: skip
        return self.last[by]

    def _loss(self, model: nn.Module, batch: Samples) -> Tensor:
        return F.cross_entropy(self.trained.logits(model(batch[0])), batch[1])


def row(
    name: str, seed: int, bits: str, trained: Trained, model: nn.Module, size: int | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Scores on the test samples, of the small models also after a short training."""
    loss, accuracy = trained.scores(model, trained.test)
    found = {"model": name, "seed": seed, "bits": bits, "bytes": size, "loss": loss, "accuracy": accuracy}
    if size is not None:
        layers = [layer for layer in qgraph.inspect(model).layers if layer.weight is not None]
        found["bits_per_weight"] = 8 * size / sum(math.prod(layer.shape) for layer in layers)
        if name in DEMO and trained.known is not None:
            train(model, trained.known, options.quantized_epochs * (len(trained.known[0]) // BATCH), 5e-4, seed)
            found["trained_loss"], found["trained_accuracy"] = trained.scores(model, trained.test)
    print(found, flush=True)
    return found


def shown(value: float | None, form: str) -> str:
    """A number as text, where there is one."""
    return "-" if value is None else format(value, form)


def rank_correlation(proxy: Allocation, real: Allocation) -> float:
    """Spearman's, over all layers and candidates but the widest, whose cost is 0 by definition."""
    pairs = [
        (a.costs[bits], b.costs[bits])
        for a, b in zip(proxy.layers, real.layers, strict=True)
        for bits in sorted(a.costs)[:-1]
    ]
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*DEMO, "lite0", "minilm"], default=[*DEMO, "lite0", "minilm"])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3], help="of the small models")
    parser.add_argument("--real-bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where pretrained models and data are kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--quantized-epochs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
