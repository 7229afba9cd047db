"""Run a function in several processes that form one gloo group, in a way that cannot hang or fail at interpreter exit.

Each rank is a plain subprocess: it runs the function, writes what it returned to a file, waits for the others, leaves
the group and ends by os._exit, so that threads of gloo never meet a Python that is being taken down.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds; a run takes a few


def run(function: str, folder: Path, world: int = 2, **kwargs: Any) -> list[Any]:
    """Results of ``module:function(rank, folder, **kwargs)`` on each rank; an error of any rank, with its traceback."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(kwargs, folder / "kwargs")
    command = [sys.executable, "-m", "tests.loops.processes", function, str(folder), str(world)]
    logs = [open(folder / f"log{rank}", "w") for rank in range(world)]  # noqa: SIM115, closed below
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(TIMEOUT) for process in ranks]
    finally:
        for process, log in zip(ranks, logs, strict=True):
            process.kill()  # nothing to do for one that is through
            process.wait()
            log.close()
    told = "\n".join(f"-- rank {i}, exit {code} --\n{(folder / f'log{i}').read_text()}" for i, code in enumerate(codes))
    assert codes == [0] * world, told
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world)]


def environment() -> dict[str, str]:
    """One thread a process, and the loopback interface, so that no name of the machine has to be looked up."""
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    names = {"GLOO_SOCKET_IFNAME": loopback.pop()} if loopback else {}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **names}


def main(function: str, folder: Path, world: int, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    module, name = function.split(":")
    kwargs = torch.load(folder / "kwargs", weights_only=False)
    result = getattr(importlib.import_module(module), name)(rank, folder, **kwargs)
    torch.save(result, folder / f"result{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
