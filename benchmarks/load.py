"""What it costs to load a file: time and memory of an onnxruntime session, packed and preunpacked, beside FP32.

The model is a stack of square Linear layers with random weights. Each file is loaded in a process of its own, which
imports onnxruntime first and measures from there: the time until the session is made and has run once, the memory that
it then has resident, and the most that it had on the way. Rounds go over all files in turn; medians.

    python benchmarks/load.py [--layers 6] [--width 4096] [--configs W1 W4 ...] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONFIGS = ["W1", "W2", "W4", "W8"]
TARGETS = ["ort", "standard"]
PROBE = """
import json, re, sys, time
import numpy, onnxruntime
def memory(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = memory("VmRSS")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
start = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
made = time.perf_counter() - start
session.run(None, {session.get_inputs()[0].name: numpy.zeros(json.loads(sys.argv[2]), numpy.float32)})
ran = time.perf_counter() - start
print(json.dumps([made, ran, memory("VmRSS") - before, memory("VmHWM") - before]))
"""
FIGURES = ("seconds", "resident_mb", "peak_mb")


def main() -> None:
    """Export, load, print a table, write what was asked for."""
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        files = {("FP32", "", "float"): float_file(Path(folder), options)}
        for config in options.configs:
            for target in TARGETS:
                for form in ("packed", "preunpacked"):
                    files[config, target, form] = quantized_file(Path(folder), config, target, form, options)
        shape = (1, options.width)
        rounds = [
            {key: load(path, shape, options.threads)[1:] for key, path in files.items()} for _ in range(options.rounds)
        ]
        sizes = {key: path.stat().st_size / 2**20 for key, path in files.items()}
    rows = []
    for key, size in sizes.items():
        figures = zip(*(found[key] for found in rounds), strict=True)
        rows.append(
            dict(zip(("config", "target", "form"), key, strict=True))
            | {"file_mb": size}
            | dict(zip(FIGURES, map(statistics.median, figures), strict=True))
        )
    print(table(rows))
    setting = {"python": platform.python_version(), "layers": options.layers, "width": options.width}
    if options.json:
        options.json.write_text(json.dumps({**setting, **versions(), "rows": rows}, indent=1) + "\n")


def layers(options: argparse.Namespace) -> Any:
    """The float model."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(options.width, options.width) for _ in range(options.layers))).eval()


def float_file(folder: Path, options: argparse.Namespace) -> Path:
    """The FP32 model as torch.onnx writes it."""
    import torch

    path = folder / "float.onnx"
    torch.onnx.export(
        layers(options), (torch.zeros(1, options.width),), str(path), dynamo=True, external_data=False, verbose=False
    )
    return path


def quantized_file(folder: Path, config: str, target: Any, form: str, options: argparse.Namespace) -> Path:
    """One export; not verified, which would take as long again."""
    import torch

    import qgraph

    path = folder / f"{config}-{target}-{form}.onnx".replace(":", "")
    x = torch.zeros(1, options.width)
    prepared = qgraph.prepare(layers(options), config, x, inplace=True)
    qgraph.export(prepared, path, (x,), target=target, preunpacked=form == "preunpacked", verify=False, progress=False)
    return path


def load(path: Path, shape: tuple[int, ...], threads: int) -> list[float]:
    """Of one process: seconds until there is a session, and until it has run once; MB resident, and at the most."""
    command = [sys.executable, "-c", PROBE, str(path), json.dumps(shape), str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the figures of a file over those of the FP32 one in brackets."""
    base = rows[0]
    lines = ["| config | target | form | file, MB | load, s | resident, MB | peak, MB |", "| --- " * 7 + "|"]
    for row in rows:
        cells = [f"{row[name]:.2f} ({row[name] / base[name]:.2f})" for name in ("file_mb", *FIGURES)]
        lines.append("| " + " | ".join([row["config"], row["target"], row["form"], *cells]) + " |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """What was measured with."""
    import onnxruntime
    import torch

    return {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where files are made for a while: 4 GB; a temporary folder")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
