"""What capture costs: once, when a model is prepared, and at every call, with the quantizers off.

Beside it the eager model, torch.fx.symbolic_trace and torch.export, where they can. Every round times each case once,
in turn, so that a slow moment of the machine falls on all of them; ratios are medians over the rounds of the ratio
to eager in the same round. Two bounds are checked, and the command fails where one is broken:

- capture takes at most three forward and backward passes of training and 20 ms a module;
- a real model, prepared, with its quantizers off, is at most 3 % slower than eager.

Run: python benchmarks/capture.py [--rounds 15] [--threads 1] [--clock cpu] [--only TEXT]

The whole run takes about ten minutes; it writes benchmarks/results/capture.json and the table of docs/capture.md.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)  # fmt: skip

import qgraph
from qgraph.graph import coverage

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "capture.json"
PAGE = ROOT / "docs" / "capture.md"
CONFIG = "A8W4@32"
OVERHEAD, PASSES, A_MODULE = 1.03, 3, 0.020  # the bounds: ratio; passes of training and seconds a module
PLAYERS = ("prepared", "fx", "export")


@dataclass(frozen=True)
class Case:
    """A model with an input, one of another shape, and whether it is large enough for the bound of its calls."""

    make: Callable[[], nn.Module]
    first: tuple[int, ...]
    second: tuple[int, ...]
    real: bool

    def inputs(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(0, 1000, shape) if len(shape) == 2 else torch.randn(shape)


def _bert(width: int, layers: int) -> nn.Module:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    return BertModel(BertConfig(vocab_size=1000, num_attention_heads=8, **sizes))


def _llama(width: int, layers: int) -> nn.Module:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_attention_heads=8, use_cache=False, **sizes))


class Block(nn.Module):
    """Two convolutions beside a way around them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        stride = 1 if width == out else 2
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.down = None if stride == 1 else nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + (x if self.down is None else self.down(x)))


class ResNet18(nn.Module):
    """As it is commonly written, without a library."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        pairs = ((64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512))
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairs))
        self.head = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.stem(x), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


def _resnet(*widths: int) -> nn.Module:
    sizes = {"embedding_size": widths[0], "hidden_sizes": list(widths), "depths": [2] * len(widths)}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", **sizes))


CASES = {
    "BERT, d = 512, 4 layers, 4 x 64": Case(lambda: _bert(512, 4), (4, 64), (2, 96), True),
    "LLaMA, d = 512, 4 layers, 4 x 64": Case(lambda: _llama(512, 4), (4, 64), (2, 96), True),
    "ResNet-18, 16 x 64 x 64": Case(ResNet18, (16, 3, 64, 64), (8, 3, 96, 96), True),
    "the same of transformers": Case(lambda: _resnet(64, 128, 256, 512), (16, 3, 64, 64), (8, 3, 96, 96), True),
    "BERT, d = 64, 2 layers, 2 x 16": Case(lambda: _bert(64, 2), (2, 16), (3, 24), False),
    "LLaMA, d = 64, 2 layers, 2 x 16": Case(lambda: _llama(64, 2), (2, 16), (3, 24), False),
    "ResNet, 16 channels, 2 x 16 x 16": Case(lambda: _resnet(16, 16), (2, 3, 16, 16), (3, 3, 24, 24), False),
}


def main() -> None:
    """Measure, print, write, and fail where a bound is broken."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(*options.peak))
        return
    chosen = [name for name in CASES if options.only in name]
    results = {name: measure(name, CASES[name], options) for name in track(chosen, "Measuring")}
    Console(width=140).print(rich_table(results))
    if not options.only:
        conditions = setting(options)
        RESULTS.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")
        marked = f"<!-- cost -->\n{markdown(results, conditions)}\n<!-- /cost -->"
        PAGE.write_text(re.sub(r"<!-- cost -->.*?<!-- /cost -->", lambda _: marked, PAGE.read_text(), flags=re.S))
    broken = [f"{name}: {text}" for name, row in results.items() for text in row["broken"]]
    raise SystemExit("\n".join(broken) if broken else 0)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="cpu", help="cpu: the time of this process alone")
    parser.add_argument("--only", default="", help="cases whose name contains this; nothing is written")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # one process of `memory`
    return parser.parse_args()


def measure(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the cost of capture, of first calls, of every call, and of memory."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    torch.manual_seed(0)
    model, x, other = case.make(), case.inputs(case.first), case.inputs(case.second)
    for _ in range(2):
        step(model, x)  # the allocator, the kernels
    players, captures = capture_all(model, x, clock, max(3, options.rounds // 5))
    prepared = players["prepared"]
    found = coverage(prepared)
    row: dict[str, Any] = {"modules": found.modules, "graphs": found.graphs, "opaque": len(found.opaque)}
    row["call"] = calls({"eager": model, **players}, x, clock, options.rounds)
    pass_seconds = row["call"]["train"]["eager"]["ms"] / 1e3
    row["capture_ms"] = {player: 1e3 * seconds for player, seconds in captures.items()}
    row["capture_in_passes"] = captures["prepared"] / pass_seconds
    row["capture_of_bound"] = captures["prepared"] / (PASSES * pass_seconds + A_MODULE * found.modules)
    row["first_call_in_passes"] = first_calls(model, x, other, clock)
    row["memory"] = memory(name, model, x, found.graphs)
    row["broken"] = list(broken(row, case.real))
    return row


def broken(row: dict[str, Any], real: bool) -> Any:
    """The bounds that a row breaks."""
    if row["capture_of_bound"] > 1:
        yield f"capture takes {row['capture_of_bound']:.2f} of its bound"
    for mode, found in row["call"].items():
        if real and found["prepared"]["ratio"] > OVERHEAD:
            yield f"{mode}: {found['prepared']['ratio']:.3f} x eager"


def step(model: nn.Module, x: torch.Tensor) -> None:
    """One forward and backward pass of training."""
    model.zero_grad()
    first(model(x)).square().mean().backward()


def first(output: Any) -> torch.Tensor:
    """The tensor that a model's output begins with."""
    return output if isinstance(output, torch.Tensor) else next(iter(output.values()))


def capture_all(
    model: nn.Module, x: torch.Tensor, clock: Callable[[], float], rounds: int
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """The model as each tool gives it, and the median seconds that it took; a tool that cannot is left out."""
    tools: dict[str, Callable[[nn.Module], nn.Module]] = {
        "prepared": lambda m: qgraph.prepare(m, CONFIG, (x,), inplace=True),
        "fx": torch.fx.symbolic_trace,
        "export": lambda m: torch.export.export(m, (x,), strict=False).module(),
    }
    made: dict[str, nn.Module] = {}
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in list(tools):
            fresh = copy.deepcopy(model).train(name != "export")
            try:
                start = clock()
                made[name] = tools[name](fresh)
                first(made[name](x))
            except Exception as error:
                print(f"{type(model).__name__}: {name} cannot: {type(error).__name__}")
                made.pop(name, None)
                del tools[name]
                continue
            seconds.setdefault(name, []).append(clock() - start)
    qgraph.set_enabled(made["prepared"], False)
    return made, {name: statistics.median(values) for name, values in seconds.items()}


def calls(models: dict[str, nn.Module], x: torch.Tensor, clock: Callable[[], float], rounds: int) -> dict[str, Any]:
    """Milliseconds of a pass of training and of a forward in eval, and the ratio to eager."""
    found: dict[str, Any] = {}
    for mode in ("train", "eval"):
        runners = {name: m for name, m in models.items() if name != "export" or mode == "eval"}
        for name, model in runners.items():
            if name != "export":  # an exported model has no modes
                model.train(mode == "train")
        run = step if mode == "train" else torch.no_grad()(lambda model, x: model(x))
        times = in_turns(runners, lambda model, run=run: run(model, x), clock, rounds)
        found[mode] = {
            name: {
                "ms": 1e3 * statistics.median(values),
                "ratio": statistics.median(a / b for a, b in zip(values, times["eager"], strict=True)),
            }
            for name, values in times.items()
        }
    return found


def in_turns(
    models: dict[str, nn.Module], run: Callable[[nn.Module], Any], clock: Callable[[], float], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each model in each round; a round's order is that of the last one, turned by one."""
    order = list(models)
    times: dict[str, list[float]] = {name: [] for name in order}
    for model in models.values():
        run(model)
    start = clock()
    run(models["eager"])
    repeats = max(1, round(0.03 / max(clock() - start, 1e-6)))  # small models: enough calls for the clock
    for _ in range(rounds):
        order.append(order.pop(0))
        for name in order:
            gc.collect()
            start = clock()
            for _ in range(repeats):
                run(models[name])
            times[name].append((clock() - start) / repeats)
    return times


def first_calls(model: nn.Module, x: torch.Tensor, other: torch.Tensor, clock: Callable[[], float]) -> dict[str, float]:
    """Passes of training, prepared without examples: the first, which captures, then at a second shape, and again.

    In passes of the eager model on the same input.
    """
    prepared = qgraph.prepare(model.train(), CONFIG)
    qgraph.set_enabled(prepared, False)

    def seconds(model: nn.Module, x: torch.Tensor) -> float:
        start = clock()
        step(model, x)
        return clock() - start

    found: dict[str, float] = {}
    for name, value in (("first", x), ("second shape", other), ("again", other)):
        seconds(model, value)
        eager = statistics.median(seconds(model, value) for _ in range(3))
        with qgraph.disabled(prepared):
            found[name] = seconds(prepared, value) / eager
    return found


def memory(name: str, model: nn.Module, x: torch.Tensor, graphs: int) -> dict[str, float]:
    """What Python keeps of the graphs, and the peak of a process that prepares, or does not, and trains one step."""
    fresh = copy.deepcopy(model)
    gc.collect()
    tracemalloc.start()
    kept = qgraph.prepare(fresh, CONFIG, (x,), inplace=True)
    gc.collect()
    kilobytes = tracemalloc.get_traced_memory()[0] / 1024
    tracemalloc.stop()
    del kept
    peaks = {
        which: float(subprocess.check_output([sys.executable, __file__, "--peak", name, which], text=True))
        for which in ("eager", "prepared")
    }
    return {"kb_a_graph": kilobytes / graphs, "peak_mb_eager": peaks["eager"], "peak_mb_prepared": peaks["prepared"]}


def peak(name: str, which: str) -> float:
    """Megabytes that this process has held at most, after one step of training."""
    torch.manual_seed(0)
    case = CASES[name]
    model, x = case.make(), case.inputs(case.first)
    if which == "prepared":
        qgraph.set_enabled(qgraph.prepare(model, CONFIG, (x,), inplace=True), False)
    step(model, x)
    status = Path("/proc/self/status")  # a process counts the memory of the one that forked it in getrusage, not here
    if status.exists():
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


COLUMNS = (
    "model", "modules", "capture", "of bound", "fx", "export", "first call", "second shape", "again", "train",
    "train, fx", "eval", "eval, fx", "eval, export", "KB a graph", "peak MB",
)  # fmt: skip


def cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table."""

    def times(mode: str, player: str) -> str:
        found = row["call"][mode].get(player)
        return "-" if found is None else f"{found['ratio']:.3f}"

    captures, calls, kept = row["capture_ms"], row["first_call_in_passes"], row["memory"]
    return (
        name,
        str(row["modules"]),
        f"{captures['prepared']:.0f} ms, {row['capture_in_passes']:.1f} passes",
        f"{row['capture_of_bound']:.2f}",
        *(f"{captures[player]:.0f} ms" if player in captures else "-" for player in ("fx", "export")),
        *(f"{calls[key]:.1f}" for key in ("first", "second shape", "again")),
        *(times("train", player) for player in ("prepared", "fx")),
        *(times("eval", player) for player in PLAYERS),
        f"{kept['kb_a_graph']:.0f}",
        f"{kept['peak_mb_eager']:.0f} -> {kept['peak_mb_prepared']:.0f}",
    )


def rich_table(results: dict[str, Any]) -> Table:
    """The rows for a terminal, turned: a column a model."""
    rows = [cells(name, row) for name, row in results.items()]
    table = Table(*(row[0] if i else COLUMNS[0] for i, row in enumerate([rows[0], *rows])))
    for i, column in enumerate(COLUMNS[1:], start=1):
        table.add_row(column, *(row[i] for row in rows))
    return table


def markdown(results: dict[str, Any], conditions: dict[str, Any]) -> str:
    """The table of docs/capture.md."""
    kept = [COLUMNS.index(name) for name in COLUMNS if name not in ("KB a graph", "peak MB")]
    lines = [f"| {' | '.join(COLUMNS[i] for i in kept)} |", "| --- " * len(kept) + "|"]
    for name, row in results.items():
        row_cells = cells(name, row)
        lines.append(f"| {' | '.join(row_cells[i] for i in kept)} |")
    sizes = [row["memory"] for row in results.values()]
    graph_kb = statistics.median(size["kb_a_graph"] for size in sizes)
    more = [size["peak_mb_prepared"] - size["peak_mb_eager"] for size in sizes]
    c = conditions
    note = (
        f"`python benchmarks/capture.py`: {c['processor']}, {c['threads']} thread, torch {c['torch']}, "
        f"transformers {c['transformers']};\n{c['clock']} time, medians of {c['rounds']} interleaved rounds, config "
        f"`{CONFIG}`. A captured graph keeps {graph_kb:.0f} KB of Python\nobjects (median). The peak memory of a "
        f"process that prepares a model and trains one step is {min(more):.0f} to {max(more):.0f} MB above\n"
        "that of one that trains the model as it is."
    )
    return "\n".join([*lines, "", note])


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    import transformers

    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": names[0] if names else platform.processor(),
        "threads": options.threads,
        "clock": options.clock,
        "rounds": options.rounds,
        "seed": 0,
        "config": CONFIG,
        "dtype": "float32",
    }


if __name__ == "__main__":
    main()
