"""What a training step costs over full precision: time and peak memory, eager and compiled, and peers beside.

Each round runs one step of every case in turn, so that a slow moment of the machine falls on all; the ratios are those
of the medians over the rounds. Peak memory is that of a process which does three steps of one case alone, less what it
had before the model was made; tensors of 1 MB and more are mapped, so that what is freed is given back.

    python benchmarks/training.py [--models gpt resnet18] [--rounds 7] [--threads 1] [--compile] [--peers FOLDER]

`--compile` adds compiled steps over compiled FP32 ones: minutes of compilation a case. `--peers` makes an environment
for each peer in a folder, on the torch that runs this, and skips a peer that cannot be had.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_models import MODELS, Step

import qgraph
from qgraph.ops import native

HERE = Path(__file__).parent
CONFIGS = ("W4@128", "A8W4@128", "A4W1", "A1W1-2:4", "W1.58")
FULL = "FP32"
PEERS = ("torchao", "brevitas")
SAMPLE = "W4@128"  # what schedules and accumulated gradients are measured with
BATCHES = 2

Case = Callable[[], None]


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(peak_memory(*options.memory_of)))
        return
    results = []
    for model in options.models:
        results += measure(model, options, compiled=False)
        if options.compile:
            results += measure(model, options, compiled=True)
    if not options.no_memory:
        megabytes = {}
        for result in results:
            key = result["model"], result["config"]
            if key not in megabytes:
                megabytes[key] = memory_in_a_process(*key, options)
            if megabytes[key] is not None and not result["compiled"]:
                result |= {"megabytes": megabytes[key], "memory": megabytes[key] / megabytes[result["model"], FULL]}
    peers = [found for model in options.models for found in measure_peers(model, options)]
    print(table(results, peers))
    setting = {
        "torch": torch.__version__, "python": platform.python_version(), "threads": options.threads,
        "rounds": options.rounds, "compiled_passes": native.library() is not None,
        "clock": "time of this process", "step": "forward, backward, AdamW",
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({**setting, "results": results, "peers": peers}, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--configs", nargs="*", default=list(CONFIGS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peers", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", default=HERE / "results" / "training.json")
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "CONFIG"), help=argparse.SUPPRESS)
    return parser.parse_args()


def step_of(name: str, config: str) -> Step:
    """A training step of a model at a config, or in full precision."""
    model, inputs, targets = MODELS[name]()
    if config != FULL:
        model = qgraph.prepare(model, config, (inputs,), inplace=True)
    return Step(model, inputs, targets)


def measure(name: str, options: argparse.Namespace, compiled: bool) -> list[dict[str, Any]]:
    """The ratio of every case to the one it is compared with, by medians over interleaved rounds."""
    cases = cases_of(name, options, compiled)
    for step, _ in cases.values():  # memory, graphs, compilation
        step()
    times: dict[str, list[float]] = {case: [] for case in cases}
    for done in range(options.rounds):
        for case, (step, _) in cases.items():
            start = time.process_time()
            step()
            times[case].append(time.process_time() - start)
        print(f"{name}{', compiled' * compiled}: round {done + 1} of {options.rounds}", file=sys.stderr, flush=True)
    medians = {case: statistics.median(found) for case, found in times.items()}
    return [
        {
            "model": name, "config": case, "compiled": compiled, "seconds": medians[case], "over": over,
            "time": medians[case] / medians[over],
        }
        for case, (_, over) in cases.items()
    ]  # fmt: skip


def cases_of(name: str, options: argparse.Namespace, compiled: bool) -> dict[str, tuple[Case, str]]:
    """What is measured, by name, with the name of what it is compared with."""
    steps = {config: step_of(name, config) for config in (FULL, *options.configs)}
    if compiled:
        for step in steps.values():
            step.model = torch.compile(step.model)
    cases: dict[str, tuple[Case, str]] = {config: (step, FULL) for config, step in steps.items()}
    if not compiled and SAMPLE in steps:
        cases[f"{SAMPLE}, schedules"] = Scheduled(step_of(name, SAMPLE)), SAMPLE
        cases[f"{FULL}, {BATCHES} batches"] = Accumulated(steps[FULL]), f"{FULL}, {BATCHES} batches"
        cases[f"{SAMPLE}, {BATCHES} batches"] = Accumulated(steps[SAMPLE]), f"{FULL}, {BATCHES} batches"
    return cases


class Scheduled:
    """A step with two schedules that are stepped, and have nothing to change then."""

    def __init__(self, step: Step) -> None:
        self.inner = step
        model = step.model
        self.schedules = [qgraph.QuantizationStart(model, 0), qgraph.ProgressiveBits(model, {0: 4, 10**9: 1})]

    def __call__(self) -> None:
        self.inner()
        for schedule in self.schedules:
            schedule.step()


class Accumulated:
    """A step of the optimizer after the gradients of several batches."""

    def __init__(self, step: Step) -> None:
        self.inner = step

    def __call__(self) -> None:
        for _ in range(BATCHES):
            self.inner.gradients()
        self.inner.update()


def peak_memory(name: str, config: str) -> float:
    """Megabytes that three steps of one case take at most, in this process."""
    before = high_water()
    step = step_of(name, config)
    for _ in range(3):
        step()
    return high_water() - before


def high_water() -> float:
    """Megabytes that this process had resident at most; the usual ru_maxrss of a child begins at its parent's."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def memory_in_a_process(name: str, config: str, options: argparse.Namespace) -> float | None:
    """`peak_memory` in a process of its own; None for cases that are no config."""
    if config not in (FULL, *options.configs):
        return None
    command = [sys.executable, str(Path(__file__)), "--threads", str(options.threads), "--memory-of", name, config]
    # What is freed goes back to the system, or glibc's unused memory between what is used would be measured as well.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure_peers(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The peers' ratios to full precision, each measured in its own environment; a peer that cannot be had says why."""
    if options.peers is None:
        return []
    found = []
    for peer in PEERS:
        python, reason = environment(options.peers / peer, peer)
        command = [str(python), str(HERE / "training_peers.py"), peer, name, "--rounds", str(options.rounds)]
        command += ["--threads", str(options.threads)]
        if reason is None:
            done = subprocess.run(command, capture_output=True, text=True)
            reason = done.stderr.strip().splitlines()[-1] if done.returncode else None
        if reason is not None:
            found.append({"peer": peer, "model": name, "skipped": {"all": reason}, "ratios": {}})
            continue
        found.append({"peer": peer, "model": name, **json.loads(done.stdout.splitlines()[-1])})
    return found


def environment(folder: Path, *packages: str) -> tuple[Path, str | None]:
    """The Python of an environment that holds packages beside this torch, and why there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "torch_of_the_benchmark.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    constraint = folder / "constraints.txt"
    constraint.write_text(f"torch=={torch.__version__}\n")
    command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraint), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    return python, done.stderr.strip().splitlines()[-1] if done.returncode else None


def table(results: list[dict[str, Any]], peers: list[dict[str, Any]]) -> str:
    """The figures as a table of Markdown."""
    lines = ["| model | case | seconds a step | time | over | peak memory over FP32 |", "| --- " * 6 + "|"]
    for r in results:
        memory = f"{r['memory']:.2f}" if r.get("memory") else ""
        mode = ", compiled" if r["compiled"] else ""
        lines.append(
            f"| {r['model']}{mode} | {r['config']} | {r['seconds']:.2f} | {r['time']:.2f} | {r['over']} | {memory} |"
        )
    for p in peers:
        for config, ratio in p["ratios"].items():
            lines.append(f"| {p['model']} | {p['peer']} {config} | | {ratio:.2f} | {FULL} | |")
        for config, reason in p["skipped"].items():
            lines.append(f"| {p['model']} | {p['peer']} {config} | | skipped: {reason} | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
