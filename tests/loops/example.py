"""examples/distributed.py as test_example.py runs it: in a given folder, killed at a step or not."""

from __future__ import annotations

import builtins
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

PATH = Path(__file__).parents[2] / "examples" / "distributed.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_distributed", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def twice(rank: int, folder: Path, killed: str, **options: Any) -> dict[str, list[float]]:
    """The losses of a run from the start, and of one that goes on where the killed one left off."""
    main = load().main
    return {"whole": main(str(folder / "whole"), **options), "resumed": main(killed, **options)}


def killed_at(step: int, folder: str, steps: int, every: int) -> None:
    """Run under torchrun; the process that reports the step dies of SIGKILL."""
    module = load()

    def report(text: str, **options: Any) -> None:
        builtins.print(text, **options)
        if text.startswith(f"step {step} "):
            os.kill(os.getpid(), signal.SIGKILL)

    module.print = report  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    module.main(folder, steps, every)


if __name__ == "__main__":
    killed_at(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
