"""Bytes of exported files beside the bytes of their content: codes, scales, zero points and unquantized floats.

The models are small and deep, where nodes and names count most; their parameters are random.

    python benchmarks/size.py [--configs W1 A4W1-2:4] [--models gpt encoder] [--targets ort standard] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qgraph
from qgraph.demo import DigitsCNN, DigitsTransformer

CONFIGS = ["W1", "W1.58", "W3", "W4", "W1-2:4", "W4-70%", "A4W1", "A8W4@128", "A4W1-2:4"]
TARGETS = ["ort", "standard"]
SHARE = 1.02  # of the content: what a file may take, and what it takes beyond is listed


def encoder(layers: int, width: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "mlp, 3 layers of 256": (
        lambda: nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)),
        lambda: torch.randn(4, 256),
    ),
    "digits cnn": (DigitsCNN, lambda: torch.randn(3, 1, 8, 8)),
    "digits transformer, 2 layers of 96": (DigitsTransformer, lambda: torch.randn(3, 1, 8, 8)),
    "encoder, 4 layers of 128": (lambda: encoder(4, 128), lambda: torch.randn(2, 9, 128)),
    "encoder, 12 layers of 128": (lambda: encoder(12, 128), lambda: torch.randn(2, 9, 128)),
}


def main() -> None:
    """Export, print a table, and write what was asked for."""
    options = arguments()
    rows = [
        measure(name, config, target)
        for name in MODELS
        if not options.models or any(part in name for part in options.models)
        for config in options.configs
        for target in options.targets
    ]
    table = Table(title=f"KB of a file beyond {SHARE:g} times its content")
    for column in ("model", "config", "target", "content, bytes", "file, bytes", "beyond, KB", "nodes"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def measure(name: str, config: str, target: Any) -> dict[str, Any]:
    """One export."""
    import onnx

    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), inputs()
    for parameter in model.parameters():  # else equal ones, fresh norms and biases, were stored once
        nn.init.normal_(parameter, std=0.1)
    prepared = qgraph.prepare(model, config).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        report = qgraph.export(prepared, path, (x,), target=target, verify=False, progress=False)
        nodes = len(onnx.load(path).graph.node)
    beyond = (report.file_bytes - SHARE * report.ideal_bytes) / 1024
    return {
        "model": name,
        "config": config,
        "target": target,
        "content": report.ideal_bytes,
        "file": report.file_bytes,
        "beyond_kb": round(beyond, 2),
        "nodes": nodes,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--models", nargs="+", default=[], help="parts of their names")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
