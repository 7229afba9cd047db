"""Files of qgraph beside those of the tools that a user would pick instead, of the same float model.

    python benchmarks/export.py [--models mlp gpt_block resnet18] [--peers FOLDER] [--json FILE]

For each file: bytes; load time, peak and resident memory in a process of its own, which has imported onnxruntime; how
many times faster than the FP32 file it is at batch 1 and 64 on one and two threads, the two files in turns; how far
onnxruntime is from the torch model that the file was made of (of onnxruntime's own quantizers, which make none, from
the float model). `--peers` makes an environment for torchao and Brevitas each in a folder, on the torch that runs this.
Weights are random: sizes, times and agreement mean what they say, accuracy means nothing here. Ten minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from export_models import MODELS, build
from export_peers import PEERS
from forms import processor
from load import load
from training import environment

import qgraph
from qgraph.runtime import session_for, time_files

HERE = Path(__file__).parent
CONFIGS = {
    "mlp": ["W8@128", "W4@128", "A8W4@128", "W2@128", "W1.58", "W1", "A8W1@128", "A8W4", "A4W1", "A8sW7"],
    "gpt_block": ["W8@128", "W4@128", "A8W4@128", "W2@128", "W1.58", "W1", "A8W1@128", "A8W4", "A4W1", "A8sW7"],
    "resnet18": ["W8", "W4", "A8sW7", "W1.58", "W1"],
}
NEEDED = {"brevitas": ("onnxoptimizer",)}  # for its export
BATCHES, THREADS = (1, 64), (1, 2)
FIGURES = ("load_seconds", "resident_mb", "peak_mb")


def main() -> None:
    """Write the files, measure them, print a table, write JSON where asked."""
    options = arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            files = float_file(name, Path(folder)) | ours(name, Path(folder)) | onnxruntimes(name, Path(folder))
            files |= peers(name, Path(folder), options.peers)
            for key, made in files.items():
                rows.append({"model": name, "tool": key[0], "config": key[1], **measure(name, made, files, options)})
                print(line(rows[-1]), flush=True)
    print("\n" + table(rows))
    if options.json:
        import onnxruntime

        setting = {
            "command": " ".join(["python", *sys.argv]),
            "processor": processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
        }
        options.json.write_text(json.dumps({"conditions": setting, "rows": rows}, indent=1) + "\n")


# -- files: (tool, config) -> path and what its own torch model computes, or why there is none ------------------------

Made = tuple[Path, np.ndarray] | str


def float_file(name: str, folder: Path) -> dict[tuple[str, str], Made]:
    """FP32, as torch.onnx writes it."""
    model, x = build(name)
    path = folder / f"{name}-float.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (x,), str(path), dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
    return {("torch", "FP32"): (path, model(x).numpy())}


def ours(name: str, folder: Path) -> dict[tuple[str, str], Made]:
    """Target "ort", and one of "standard"."""
    found: dict[tuple[str, str], Made] = {}
    for config in CONFIGS[name]:
        rows = "@" not in config and config.startswith("A") and "s" not in config  # a scale a row: whole numbers
        options: list[dict[str, Any]] = [{"target": "ort", "optimize_for": "latency" if rows else "size"}]  # kernels
        options += [{"target": "standard"}] if config.startswith("W4") else []
        for chosen in options:
            model, x = build(name)
            prepared = qgraph.prepare(model, config, x).eval()
            if "s" in config:
                qgraph.calibrate(prepared, [x], progress=False)
            text = ", ".join(chosen.values())
            path = folder / f"{name}-{config}-{text.replace(', ', '-')}.onnx"
            qgraph.export(prepared, path, (x,), progress=False, **chosen)
            with torch.no_grad():
                found[f"qgraph, {text}", config] = (path, prepared(x).numpy())
    return found


def onnxruntimes(name: str, folder: Path) -> dict[tuple[str, str], Made]:
    """onnxruntime's own quantizers, on the FP32 file."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, prepared = folder / f"{name}-float.onnx", folder / f"{name}-pre.onnx"
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    expected = build(name)[0](build(name)[1]).numpy()

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{onnx.load(source).graph.input[0].name: build(name)[1].numpy()}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    def dynamic(path: Path) -> None:
        quantize_dynamic(str(prepared), str(path), weight_type=QuantType.QInt8, per_channel=True)

    def static(path: Path) -> None:
        quantize_static(str(prepared), str(path), Reader(), per_channel=True, weight_type=QuantType.QInt8)

    def nbits(bits: int) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=128, is_symmetric=False)
            quantizer.process()
            quantizer.model.save_model_to_file(str(path), False)

        return write

    tools = {"quantize_dynamic": dynamic, "quantize_static": static}
    tools |= {f"MatMulNBits {bits}@128": nbits(bits) for bits in (2, 4, 8)} if name != "resnet18" else {}
    found: dict[tuple[str, str], Made] = {}
    for tool, write in tools.items():
        path = folder / f"{name}-{tool.replace(' ', '_').replace('@', '_')}.onnx"
        try:
            write(path)
            found["onnxruntime", tool] = (path, expected)
        except Exception as error:  # what a tool cannot do is told, not hidden
            found["onnxruntime", tool] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return found


def peers(name: str, folder: Path, environments: Path | None) -> dict[tuple[str, str], Made]:
    """torchao and Brevitas, each in its own environment."""
    found: dict[tuple[str, str], Made] = {}
    for peer in PEERS if environments is not None else ():
        assert environments is not None
        python, reason = environment(environments / peer, peer, *NEEDED.get(peer, ()))
        if reason is None:
            command = [str(python), str(HERE / "export_peers.py"), peer, name, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            reason = done.stderr.strip().splitlines()[-1] if done.returncode else None
        if reason is not None:
            found[peer, "all"] = reason
            continue
        for config, made in json.loads(done.stdout.splitlines()[-1]).items():
            path = Path(made.get("path", ""))
            found[peer, config] = made.get("skipped") or (path, np.load(path.with_suffix(".npy")))
    return found


# -- figures -----------------------------------------------------------------------------------------------------------


def measure(name: str, made: Made, files: dict[tuple[str, str], Made], options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one file; `skipped` where there is none, or where onnxruntime does not run it."""
    if isinstance(made, str):
        return {"skipped": made}
    path, expected = made
    plain = files["torch", "FP32"]
    assert not isinstance(plain, str)
    shape = MODELS[name][1]
    x = build(name)[1].numpy()
    try:
        session = session_for(path)
        got = session.run(None, {session.get_inputs()[0].name: x})[0]
        loads = [load(path, (1, *shape), 1) for _ in range(options.rounds)]
        latency = {
            f"batch {batch}, {threads} thread{'s' * (threads > 1)}": speed(plain[0], path, (batch, *shape), threads)
            for threads in THREADS
            for batch in BATCHES
        }
    except Exception as error:
        return {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    difference = float(np.abs(got - expected).max() / np.abs(expected).max())
    seconds, _, resident, peak = map(statistics.median, zip(*loads, strict=True))
    figures = dict(zip(FIGURES, (seconds, resident, peak), strict=True))
    return {"file_mb": path.stat().st_size / 2**20, **figures, "speed": latency, "difference": difference}


def speed(plain: Path, path: Path, shape: tuple[int, ...], threads: int) -> float:
    """How many times faster than the FP32 file."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    feeds = [{session_for(file).get_inputs()[0].name: x} for file in (plain, path)]
    runs = max(5, min(60, int(1000 / time_files([plain], 3, threads=threads, feeds=feeds[:1])[0].median_ms)))
    return time_files([plain, path], runs, threads=threads, feeds=feeds)[1].speedup


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"| {row['model']} | {row['tool']} | {row['config']} | "
    if "skipped" in row:
        return head + f"skipped: {row['skipped']} |"
    speeds = [f"{value:.2f}" for value in row["speed"].values()]
    cells = [f"{row['file_mb']:.2f}", *(f"{row[key]:.2f}" for key in FIGURES), *speeds, f"{row['difference']:.0e}"]
    return head + " | ".join(cells) + " |"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    speeds = [f"speed, batch {batch}, {threads} thr." for threads in THREADS for batch in BATCHES]
    heads = ["model", "tool", "config", "file, MB", "load, s", "resident, MB", "peak, MB", *speeds, "difference"]
    return "\n".join(["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|", *map(line, rows)])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=3, help="processes that load a file")
    parser.add_argument("--peers", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
