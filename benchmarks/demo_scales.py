"""A1W1 on the demo's digits by the scale of weights and of activations: accuracy over seeds and learning rates.

    python benchmarks/demo_scales.py [--models transformer cnn] [--seeds 4] [--rates 0.001 ...] [--json FILE]

Each model is trained as `qgraph demo` trains it, from other initial values for each seed and on the same split of the
images; a run takes seconds, two run at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import qgraph
from qgraph import demo

SCALES = ("windowed", "minmax")
Job = tuple[str, str, str, float, int]


def main() -> None:
    """Train, print, write."""
    options = arguments()
    jobs = list(itertools.product(options.models, SCALES, SCALES, options.rates, range(options.seeds)))
    with ProcessPoolExecutor(options.workers) as pool:
        rows = list(pool.map(train, jobs))
    print(table(rows, options.rates))
    if options.json:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        options.json.write_text(f'{{"torch": "{torch.__version__}", "rows": [\n{lines}\n]}}\n')


def train(job: Job) -> dict[str, Any]:
    """One run."""
    name, weight, activation, rate, seed = job
    torch.set_num_threads(1)
    recipe, data = demo.Recipe(learning_rate=rate, seed=seed), demo._digits(0)
    torch.manual_seed(seed)
    config = qgraph.QConfig.parse("A1W1")
    assert config.weight is not None and config.activation is not None
    config = replace(
        config, weight=replace(config.weight, scale=weight), activation=replace(config.activation, scale=activation)
    )
    model = qgraph.prepare(demo.MODELS[name](), config, (data.test_x[:2],))
    demo._train(model, recipe, data, lambda: None)
    with torch.no_grad():
        outputs = model(data.test_x)
    return {
        "model": name, "weights": weight, "activations": activation, "rate": rate, "seed": seed,
        "accuracy": round(float((outputs.argmax(1) == data.test_y).float().mean()), 4),
        "loss": round(float(F.cross_entropy(outputs, data.test_y)), 4),
    }  # fmt: skip


def table(rows: list[dict[str, Any]], rates: list[float]) -> str:
    """Mean accuracy of each pair of scales at each rate, with its spread."""
    lines = [
        "| model | weights | activations | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "| --- " * (3 + len(rates)) + "|",
    ]
    for key in dict.fromkeys((row["model"], row["weights"], row["activations"]) for row in rows):
        cells = []
        for rate in rates:
            own = [
                row["accuracy"]
                for row in rows
                if (row["model"], row["weights"], row["activations"], row["rate"]) == (*key, rate)
            ]
            cells.append(f"{statistics.mean(own):.1%} ± {statistics.pstdev(own):.1%}")
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(demo.MODELS), default=["transformer"])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.001, 0.002, 0.005, 0.01])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
