"""Memory and time of exporting a large transformer with random weights, over the memory of its float parameters.

    python benchmarks/large.py [--width 2048] [--layers 20] [--config W1] [--target ort] [--json FILE]

20 layers of 2048 are a billion parameters, 3.8 GB. Memory is what the process has resident beyond what it had before
the model was made: at most, and when the export is over. The file is not run, which takes as much again in onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import qgraph


class Block(nn.Module):
    """Attention and a two-layer perceptron, normalized before each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = width // 64

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


def main() -> None:
    """Make, prepare, export, print."""
    options = arguments()
    export = qgraph.export  # which imports the exporter: no part of the memory
    start = memory("VmRSS")
    model = nn.Sequential(*(Block(options.width) for _ in range(options.layers)))
    count = sum(parameter.numel() for parameter in model.parameters())
    own = 4 * count / 2**20
    x = torch.randn(1, 8, options.width)
    prepared = qgraph.prepare(model, options.config, x, inplace=True).eval()
    ready = memory("VmHWM") - start
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report = export(prepared, Path(folder) / "large.onnx", (x,), target=options.target, verify=False)
    row = {
        "config": options.config,
        "target": options.target,
        "parameters": count,
        "float_mb": round(own),
        "prepared_peak": round(ready / own, 2),
        "export_peak": round((memory("VmHWM") - start) / own, 2),
        "after": round((memory("VmRSS") - start) / own, 2),
        "file_mb": round(report.file_bytes / 2**20),
        "seconds": round(time.perf_counter() - began),
        "torch": torch.__version__,
    }
    Console().print(row)
    if options.json:
        rows = json.loads(options.json.read_text()) if options.json.exists() else []
        options.json.write_text(json.dumps([*rows, row], indent=1) + "\n")


def memory(key: str) -> float:
    """Megabytes: "VmRSS", resident now, or "VmHWM", at most so far."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--config", default="W1")
    parser.add_argument("--target", default="ort")
    parser.add_argument("--folder", type=Path, help="for the file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a row is added to it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
