"""Speed of static 8-bit activations in onnxruntime, over FP32: convolutions and Linear layers, one thread.

Run: python benchmarks/static.py --json benchmarks/results/static.json      (some three minutes)

Each file is written and verified by `qgraph.export`; the files of one layer take turns in one process, and the table
shows medians of processor time, which other programs on the machine disturb least. ``chain`` is a convolution between
two of its kind, its result seen by a static quantizer alone (QLinearConv); ``single`` ends in float (a product with the
windows of its input).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import qgraph
from qgraph.runtime import session_for

CONFIGS = ("float", "A8sW7", "A8sW8")
WARMUP = 5


class Chain(nn.Module):
    """Three convolutions of one kind with ReLU between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu()).relu()


@dataclass(frozen=True)
class Case:
    """One layer and the shape of its input."""

    name: str
    model: nn.Module
    shape: tuple[int, ...]


def cases() -> list[Case]:
    torch.manual_seed(0)
    found = []
    for channels, size in ((64, 28), (128, 28), (256, 14)):
        name = f"conv 3x3, {channels} channels, {size}x{size}"
        found.append(Case(f"{name}, chain of 3", Chain(channels), (1, channels, size, size)))
        found.append(Case(f"{name}, single", nn.Conv2d(channels, channels, 3, padding=1), (1, channels, size, size)))
    for rows, inputs, outputs in ((128, 1024, 1024), (128, 512, 2048), (1, 1024, 1024)):
        found.append(Case(f"Linear {inputs} to {outputs}, {rows} rows", nn.Linear(inputs, outputs), (rows, inputs)))
    return found


def main() -> None:
    """Measure, print, and write JSON where asked."""
    options = arguments()
    rows = [row for case in cases() if options.match in case.name for row in measure(case, options)]
    table = Table("layer", "config", "ms", "x FP32", "form", "largest difference", "ties")
    for row in rows:
        table.add_row(
            row["layer"], row["config"], f"{row['ms']:.3f}", f"{row['speedup']:.2f}", row["form"],
            f"{row['max_difference']:.0e}", str(row["flips"]),
        )  # fmt: skip
    Console(width=170).print(table)
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions(options), "rows": rows}, indent=1) + "\n")


def measure(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One layer at every config."""
    torch.manual_seed(1)
    example = torch.randn(case.shape)
    reports, paths = [], []
    with tempfile.TemporaryDirectory() as folder:
        for config in options.configs:
            prepared = qgraph.prepare(case.model, config)
            if config != "float":
                qgraph.calibrate(prepared, [torch.randn(case.shape) for _ in range(4)])
            paths.append(Path(folder) / f"{len(paths)}.onnx")
            reports.append(
                qgraph.export(prepared, paths[-1], (example,), target="ort", dynamic_shapes={}, progress=False)
            )
        times = processor_times(paths, example, options.runs)
    return [
        {
            "layer": case.name,
            "config": config,
            "ms": round(1e3 * seconds, 4),
            "speedup": round(times[0] / seconds, 3),
            "form": "; ".join(dict.fromkeys(layer.form for layer in report.layers)) or "float",
            "max_difference": report.max_difference,
            "flips": report.flips,
            "file_bytes": report.file_bytes,
        }
        for config, seconds, report in zip(options.configs, times, reports, strict=True)
    ]


def processor_times(paths: list[Path], example: Tensor, runs: int) -> list[float]:
    """Median seconds of processor time a run; the files take turns."""
    sessions = [session_for(path) for path in paths]
    feeds = [{session.get_inputs()[0].name: example.numpy()} for session in sessions]
    taken: list[list[float]] = [[] for _ in sessions]
    for _ in range(WARMUP + runs):
        for session, feed, times in zip(sessions, feeds, taken, strict=True):
            started = time.process_time()
            session.run(None, feed)
            times.append(time.process_time() - started)
    return [statistics.median(times[WARMUP:]) for times in taken]


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = re.findall(r"model name\s*:\s*(.*)", text)
    flags = set(re.findall(r"\b(?:avx2|avx512f|avx512_vnni|avx_vnni)\b", text))
    return {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "processor": names[0] if names else "",
        "instructions": sorted(flags),
        "cores": os.cpu_count(),
        "threads": 1,
        "runs": options.runs,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="the first one is what speed is compared with")
    parser.add_argument("--match", default="", help="only layers whose name holds this")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
