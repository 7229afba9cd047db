"""examples/distributed.py: killed on two processes, it goes on with one as if nothing had been."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.loops import processes

STEPS, EVERY, KILLED = 24, 5, 12


def test_a_killed_run_goes_on_with_another_number_of_processes(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    arguments = [KILLED, tmp_path / "killed", STEPS, EVERY]
    run = subprocess.run(
        [sys.executable, *command, "-m", "tests.loops.example", *map(str, arguments)],
        cwd=processes.ROOT, env=processes.environment(), capture_output=True, text=True, timeout=processes.TIMEOUT,
    )  # fmt: skip
    assert run.returncode != 0 and "SIGKILL" in run.stderr, run.stderr
    before = {int(step): float(loss) for step, loss in re.findall(r"step (\d+) loss (\S+)", run.stdout)}
    assert list(before) == list(range(KILLED + 1)), run.stdout

    [losses] = processes.run(
        "tests.loops.example:twice", tmp_path / "one", 1, killed=str(tmp_path / "killed"), steps=STEPS, every=EVERY
    )
    whole, resumed = losses["whole"], losses["resumed"]
    saved = KILLED // EVERY * EVERY
    # The parts of a batch are the same on one process and on two, and so are their sums: no rounding differs.
    assert [round(loss, 6) for loss in whole[: KILLED + 1]] == list(before.values())
    assert len(whole) == STEPS and resumed == whole[saved:]
    assert whole[-1] < 0.5 * whole[0]
