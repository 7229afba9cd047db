"""How fast each form of a Linear layer runs in onnxruntime, over FP32: the table that `export(optimize_for=...)` reads.

A layer of each width is exported with its kernel and without (target "standard": the same quantizer, a float product),
and run on each number of rows in turn with the FP32 file, on one thread; ratios of medians, above 1 faster than FP32.

    python benchmarks/forms.py [--widths 512 1024 2048 4096] [--rows 1 4 ...] [--repeats 25] [--clock cpu] [--add]

The table of the package, exporters/lowering/speeds.json, is written anew, for this processor alone; with `--add` beside
the others that it has. `--clock cpu` counts the time of the process, on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

import qgraph
from qgraph.exporters.lowering.speeds import PATH, key_of
from qgraph.runtime import session_for

# One config for each kernel, with and without the correction that zero points need.
CONFIGS = {
    "W4": (4, False, True),
    "W1.58": (4, False, False),
    "A8W4@128": (4, True, True),
    "A8W1.58@128": (2, True, False),
    "A8W2@128": (2, True, True),
    "A8W8@128": (8, True, True),
}


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    table: dict[str, list[dict[str, Any]]] = {key_of(*kernel): [] for kernel in CONFIGS.values()}
    for width in options.widths:
        for rows, found in measure(width, options).items():
            for config, (kernel, plain) in found.items():
                key = key_of(*CONFIGS[config])
                table[key].append({"weights": width * width, "rows": rows, "kernel": kernel, "plain": plain})
                print(f"{width:5d} {rows:4d} rows  {config:12s} kernel {kernel:5.2f}  plain {plain:5.2f}", flush=True)
    found = {
        "processor": processor(), "onnxruntime": onnxruntime.__version__, "python": platform.python_version(),
        "threads": 1, "clock": options.clock, "over": "the FP32 file, above 1 is faster", "forms": table,
    }  # fmt: skip
    before = json.loads(options.json.read_text()) if options.add and options.json.exists() else []
    others = [other for other in before if other["processor"] != found["processor"]]
    options.json.write_text("[\n" + ",\n".join(map(text_of, [*others, found])) + "\n]\n")


def text_of(found: dict[str, Any]) -> str:
    """What one processor did, a line for each measurement."""
    lines = ",\n".join(
        f"  {json.dumps(key)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for key, rows in found["forms"].items()
    )
    setting = {key: value for key, value in found.items() if key != "forms"}
    return f'{json.dumps(setting)[:-1]}, "forms": {{\n{lines}\n}}}}'


def measure(width: int, options: argparse.Namespace) -> dict[int, dict[str, tuple[float, float]]]:
    """By rows and config: the speed of the kernel and of the float product."""
    x = torch.randn(2, width)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        batch = torch.export.Dim("batch")
        torch.onnx.export(
            nn.Linear(width, width), (x,), str(folder / "float.onnx"), dynamo=True, external_data=False,
            dynamic_shapes=({0: batch},), verbose=False,
        )  # fmt: skip
        sessions = [session_for(folder / "float.onnx")]
        for number, config in enumerate(CONFIGS):
            prepared = qgraph.prepare(nn.Linear(width, width), config, x)
            for target in ("ort", "standard"):
                path = folder / f"{number}-{target}.onnx"
                chosen = {"target": target, "optimize_for": "size"}  # the kernel, where there is one
                report = qgraph.export(prepared, path, (x,), verify=False, progress=False, **chosen)
                assert ("MatMulNBits" in report.layers[0].form) == (target == "ort"), report
                sessions.append(session_for(path))
    result = {}
    for rows in options.rows:
        times = interleaved(sessions, np.random.default_rng(0).standard_normal((rows, width), np.float32), options)
        speeds = [round(times[0] / taken, 3) for taken in times[1:]]
        result[rows] = dict(zip(CONFIGS, zip(speeds[::2], speeds[1::2], strict=True), strict=True))
    return result


def interleaved(sessions: list[Any], x: np.ndarray, options: argparse.Namespace) -> list[float]:
    """Median seconds of each session, run in turn."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times: list[list[float]] = [[] for _ in sessions]
    for turn in range(options.repeats + 2):
        for session, taken in zip(sessions, times, strict=True):
            start = clock()
            session.run(None, {session.get_inputs()[0].name: x})
            if turn > 1:
                taken.append(clock() - start)
    return [statistics.median(taken) for taken in times]


def processor() -> str:
    """The instruction sets that decide, and what the system calls the processor."""
    try:
        name = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return f"{name[1] if name else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--add", action="store_true", help="keep what other processors did")
    parser.add_argument("--json", type=Path, default=PATH)
    return parser.parse_args()


if __name__ == "__main__":
    main()
