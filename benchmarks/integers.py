"""Linear layers whose activations have a scale a row, multiplied in whole numbers, beside the other forms and FP32.

    python benchmarks/integers.py [--widths 256 ...] [--rows 1 4 ...] [--json benchmarks/results/integers.json]

A square layer is exported three ways: target "standard" (its quantizer, a float product), "ort" with
optimize_for="size" (a low-bit kernel where there is one), and with "latency" (MatMulInteger). Each is run on each
number of rows in turn with the FP32 file, on one thread; ratios of medians, above 1 faster than FP32. The quantizer of
the activations is in all three.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from forms import interleaved, processor
from torch import nn

import qgraph
from qgraph.runtime import session_for

CONFIGS = ("A8W7", "A8W4", "A4W4", "A4W1", "A1W1")
FORMS: dict[str, dict[str, Any]] = {
    "float": {"target": "standard"},
    "ort": {"optimize_for": "size"},
    "integer": {"optimize_for": "latency"},
}


def main() -> None:
    """Measure, print, and write JSON where asked."""
    options = arguments()
    torch.set_num_threads(1)
    rows = [row for width in options.widths for row in measure(width, options)]
    if options.json:
        setting = {
            "command": " ".join(["python", *sys.argv]), "processor": processor(), "threads": 1,
            "onnxruntime": onnxruntime.__version__, "torch": torch.__version__,
        }  # fmt: skip
        options.json.write_text(json.dumps({"conditions": setting, "rows": rows}, indent=1) + "\n")


def measure(width: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Speeds over FP32, by config and rows."""
    x = torch.randn(2, width)
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch = torch.export.Dim("batch")
        torch.manual_seed(0)
        torch.onnx.export(
            nn.Linear(width, width), (x,), str(folder / "float.onnx"), dynamo=True, external_data=False,
            dynamic_shapes=({0: batch},), verbose=False,
        )  # fmt: skip
        for config in CONFIGS:
            sessions = [session_for(folder / "float.onnx")]
            for form, chosen in FORMS.items():
                path = folder / f"{config}-{form}.onnx"
                prepared = qgraph.prepare(nn.Linear(width, width), config, x)
                report = qgraph.export(prepared, path, (x,), progress=False, **chosen)
                assert ("MatMulInteger" in report.layers[0].form) == (form == "integer"), report
                sessions.append(session_for(path))
            for rows in options.rows:
                inputs = np.random.default_rng(0).standard_normal((rows, width), np.float32)
                times = interleaved(sessions, inputs, options)
                speeds = dict(zip(FORMS, (round(times[0] / taken, 3) for taken in times[1:]), strict=True))
                found.append({"width": width, "rows": rows, "config": config, **speeds})
                text = "  ".join(f"{form} {speed:5.2f}" for form, speed in speeds.items())
                print(f"{width:5d} {rows:4d} rows  {config:6s} {text}", flush=True)
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
