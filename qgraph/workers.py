"""Jobs in a few processes, with messages about their progress; the demo trains its models so."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from qgraph.errors import QGraphError

__all__ = ["Tell", "run_jobs"]

Job = TypeVar("Job")
Result = TypeVar("Result")
Tell = Callable[[str, float], None]  # what is being done, and the share of the job that was finished since

POLL_SECONDS = 0.1

_messages: Any = None  # the queue of this process, when it is a worker


def run_jobs(function: Callable[[Job, Tell], Result], jobs: Sequence[Job], workers: int, tell: Tell) -> list[Result]:
    """Call a function on each job, in this process or in several; results come in the order of the jobs.

    Parameters
    ----------
    function : callable (job, tell) -> result
        At module level, so that a worker can import it.
    workers : int
        Processes; with 1 everything runs here.
    tell : callable (what, share)
        Called in this process with what the jobs tell.
    """
    if workers <= 1 or len(jobs) <= 1:
        return [function(job, tell) for job in jobs]
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    messages = context.SimpleQueue()
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _become_worker, (messages,))
    try:
        futures = [pool.submit(_call, function, job) for job in jobs]
        waiting = set(futures)
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, POLL_SECONDS)
            while not messages.empty():
                tell(*messages.get())
            for future in done:
                future.result()  # the first failure ends the run
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _become_worker(messages: Any) -> None:
    global _messages
    _messages = messages


def _call(function: Callable[[Any, Tell], Any], job: Any) -> Any:
    try:
        return function(job, lambda what, share: _messages.put((what, share)))
    except QGraphError as error:
        # Subclasses may take more than a message, and would not come back from a worker.
        raise QGraphError(str(error)) from None
