"""Speed of the quantization and pruning operations, forward and backward, beside a LayerNorm of the same shape.

Every round times each case once, in turn, so that a slow moment of the machine falls on all of them; the medians over
the rounds are printed, as milliseconds and as ratios to LayerNorm's (compiled to compiled) and to
torch.fake_quantize_per_channel_affine's, with the bytes a value kept for the backward pass beside the input.

    python benchmarks/ops.py [--compile] [--dtype bfloat16] [--rounds 15] [--threads 1] [--json FILE]

On a machine that others use too, `--clock cpu` counts the time of this process alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.ops import Groups, fake_quantize, native, sparsify

LAYER_NORM, FAKE_QUANTIZE, COMPILED = "layer norm", "torch fake_quantize", ", compiled"
BLOCK = 128
SETTLED = 31 << 20  # just below the largest threshold of glibc
SPECS = {
    "affine 8": QuantSpec(8),
    "affine 4": QuantSpec(4),
    "affine 2": QuantSpec(2),
    "affine 1": QuantSpec(1),
    "linear 4": QuantSpec(4, "linear"),
    "linear 1.58": QuantSpec(1.58),
    "linear 1": QuantSpec(1, "linear"),
}
GROUPS = {"channel": Groups("channel"), f"block {BLOCK}": Groups("channel", 0, BLOCK), "token": Groups("token")}
PATTERNS = ("2:4", "4:8", "50%", "90%")
WEIGHTS = {"4-bit, 2:4": ("2:4", QuantSpec(4, "linear")), "binary, 50%": ("50%", QuantSpec(1, "linear"))}

Function = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure, print, and write what was asked for."""
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    settle_memory()
    if options.compile and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise SystemExit("--compile: no C++ compiler was found; torch.compile needs one on a CPU")
    results = []
    for shape in options.shapes:
        rows, columns = map(int, shape.split("x"))
        medians, kept = measure(rows, columns, options)
        results += [
            {
                "shape": [rows, columns],
                "case": name,
                "milliseconds": value,
                "to_layer_norm": value / medians[LAYER_NORM + COMPILED * name.endswith(COMPILED)],
                "kept_bytes": kept.get(name),
                "to_fake_quantize": value / medians[FAKE_QUANTIZE],
            }
            for name, value in medians.items()
        ]
        print(table(shape, [r for r in results if r["shape"] == [rows, columns]]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({**setting(options), "results": results}, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "4096x1024"], metavar="ROWSxCOLUMNS")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name contains this, and the two to compare with")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="measure the compiled functions too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def settle_memory() -> None:
    """Let the allocator keep what is freed, as it does in a process that trains: by default the C library hands memory
    back above a threshold that grows with the largest tensor freed so far, and a case that is over it by chance then
    measures the page faults of fresh memory, several times its own time.
    """
    torch.empty(SETTLED, dtype=torch.uint8).fill_(0)


def measure(rows: int, columns: int, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of a forward and backward pass, all cases once a round, and bytes a value kept by each."""
    cases = {
        name: f
        for name, f in eager_cases(columns, rows, getattr(torch, options.dtype)).items()
        if wanted(name, options.only)
    }
    if options.compile:
        cases |= {
            f"{name}{COMPILED}": torch.compile(f, fullgraph=True, dynamic=False)
            for name, f in cases.items()
            if name.startswith("ddt") or name == LAYER_NORM
        }
    dtype = getattr(torch, options.dtype)
    x = torch.randn(rows, columns, dtype=dtype, requires_grad=True)
    upstream = torch.randn(rows, columns, dtype=dtype)
    times: dict[str, list[float]] = {name: [] for name in cases}
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    for function in cases.values():  # warm up: compilation, memory
        timed(function, x, upstream, clock)
    for _ in range(options.rounds):
        for name, function in cases.items():
            timed(function, x, upstream, clock)  # the caches as a second call finds them
            times[name].append(timed(function, x, upstream, clock))
    kept = {name: kept_bytes(function, x) for name, function in cases.items() if not name.endswith(COMPILED)}
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}, kept


def kept_bytes(function: Function, x: Tensor) -> float:
    """Bytes a value that a function keeps for its backward pass, the input left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x)
    kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / y.numel()


def timed(function: Function, x: Tensor, upstream: Tensor, clock: Callable[[], float]) -> float:
    """Seconds of one forward and backward pass."""
    x.grad = None
    gc.disable()
    start = clock()
    function(x).backward(upstream)
    seconds = clock() - start
    gc.enable()
    return seconds


def eager_cases(columns: int, rows: int, dtype: torch.dtype) -> dict[str, Function]:
    """What is measured, by name; each a function of the tensor alone."""
    norm = torch.nn.LayerNorm(columns, dtype=dtype)
    scale, zero = torch.full((rows,), 0.3), torch.zeros(rows, dtype=torch.int32)
    cases: dict[str, Function] = {
        LAYER_NORM: norm,
        FAKE_QUANTIZE: lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -7, 7),
    }
    for kind, groups in GROUPS.items():
        for name, spec in SPECS.items():
            cases[f"ddt {name}, {kind}"] = quantizer(spec, groups)
    for pattern in PATTERNS:
        cases[f"prune {pattern}"] = pruner(SparsitySpec.parse(pattern))
    for name, (pattern, spec) in WEIGHTS.items():
        cases[f"prune and ddt {name}"] = sparse_quantizer(SparsitySpec.parse(pattern), spec)
    return cases


def quantizer(spec: QuantSpec, groups: Groups) -> Function:
    """A function that quantizes."""

    def quantize(x: Tensor) -> Tensor:
        return fake_quantize(x, spec, groups)

    quantize.__code__ = quantize.__code__.replace()  # code of its own: torch.compile keeps what it compiles by code
    return quantize


def pruner(sparsity: SparsitySpec) -> Function:
    """A function that prunes the input dimension of a weight."""
    return lambda x: sparsify(x, sparsity, Groups("channel"))


def sparse_quantizer(sparsity: SparsitySpec, spec: QuantSpec) -> Function:
    """A function that does both, as a weight with both is trained."""
    groups = Groups("channel")
    return lambda x: fake_quantize(sparsify(x, sparsity, groups), spec, groups, dense=x)


def wanted(name: str, only: str) -> bool:
    """Whether a case is measured."""
    return name in (LAYER_NORM, FAKE_QUANTIZE) or only in name


def table(shape: str, results: list[dict]) -> str:
    """The results of one shape as text."""
    lines = [f"{shape:36}{'ms':>9}{'/ layer norm':>14}{'/ fake_quantize':>17}{'bytes kept':>12}"]
    for r in results:
        kept = "" if r["kept_bytes"] is None else f"{r['kept_bytes']:.2f}"
        ratios = f"{r['to_layer_norm']:14.2f}{r['to_fake_quantize']:17.2f}"
        lines.append(f"{r['case']:36}{r['milliseconds']:9.2f}{ratios}{kept:>12}")
    return "\n".join(lines) + "\n"


def setting(options: argparse.Namespace) -> dict[str, object]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "clock": options.clock,
        "rounds": options.rounds,
        "seed": options.seed,
        "dtype": options.dtype,
        "compiled_passes": native.library() is not None,
        "statistic": "median over interleaved rounds of one forward and one backward pass",
    }


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
