"""Running .onnx files in onnxruntime: sessions, made-up inputs, fair timings, and comparison with a model.

The verification that is part of an export is in `qgraph.exporters.verify`; this is what the command line and
the demo need for files that exist already.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qgraph.errors import InspectError

__all__ = [
    "Comparison",
    "Timing",
    "compare_outputs",
    "feed_for",
    "session_for",
    "time_files",
    "verify",
]

ROUNDING = 1e-5  # of the largest output: beyond it a value is not rounded otherwise, but another code
WARMUP = 10  # the first runs allocate
TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True, slots=True)
class Timing:
    """One file: bytes, seconds to load it, and the median milliseconds of a run."""

    file: str
    file_bytes: int
    load_seconds: float
    median_ms: float
    speedup: float  # of the first file's median over this one's


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a file's outputs are from the model's.

    `max_difference` is relative to the largest value of each output; `beyond` of `values` are further apart
    than float rounding.
    """

    max_difference: float
    beyond: int
    values: int
    same_decisions: float  # share of rows with the same largest value

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self)


def session_for(path: str | Path, threads: int = 1) -> Any:
    """An onnxruntime session on the CPU.

    Raises
    ------
    InspectError
        For a file that is not there, or that onnxruntime does not load.
    """
    import onnxruntime

    if not Path(path).is_file():
        raise InspectError(f"{path}: no such file; expected an .onnx file.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes derive from Exception alone
        raise InspectError(f"{path}: onnxruntime does not load it: {error}") from error


def feed_for(session: Any, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Made-up inputs: normal floats, and zeros for integers, which are indices into tables of unknown length.

    Parameters
    ----------
    sizes : mapping, optional
        The size of each dynamic dimension by name; 1 where it is not given.
    """
    generator = np.random.default_rng(seed)
    feed = {}
    for item in session.get_inputs():
        if item.type not in TYPES:
            raise InspectError(f"input {item.name}: cannot make up a {item.type}; expected one of {', '.join(TYPES)}.")
        shape = [size if isinstance(size, int) else (sizes or {}).get(size, 1) for size in item.shape]
        kind = np.dtype(TYPES[item.type])
        feed[item.name] = generator.standard_normal(shape).astype(kind) if kind.kind == "f" else np.zeros(shape, kind)
    return feed


def time_files(
    paths: Sequence[str | Path],
    runs: int = 100,
    sizes: Mapping[str, int] | None = None,
    threads: int = 1,
    feeds: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> list[Timing]:
    """Median times of several files that take turns in one process, so that noise hits all alike."""
    sessions, loads = [], []
    for path in paths:
        started = time.perf_counter()
        sessions.append(session_for(path, threads))
        loads.append(time.perf_counter() - started)
    feeds = feeds or [feed_for(session, sizes) for session in sessions]
    taken: list[list[float]] = [[] for _ in sessions]
    for turn in range(WARMUP + runs):
        for session, feed, times in zip(sessions, feeds, taken, strict=True):
            started = time.perf_counter()
            session.run(None, feed)
            if turn >= WARMUP:
                times.append(time.perf_counter() - started)
    medians = [1e3 * statistics.median(times) for times in taken]
    return [
        Timing(str(path), Path(path).stat().st_size, load, median, medians[0] / median)
        for path, load, median in zip(paths, loads, medians, strict=True)
    ]


def verify(path: str | Path, model: nn.Module, example_inputs: Any, **example_kwargs: Any) -> Comparison:
    """Run a file and a model, in eval mode, on the same inputs.

    Raises
    ------
    InspectError
        Where the file's inputs or outputs are not the model's, or one of the two does not run on the inputs.
    """
    from qgraph.exporters.signature import flat_model, flatten_inputs

    session = session_for(path)
    inputs = flatten_inputs(model, example_inputs, example_kwargs or None)
    expected = [item.name for item in session.get_inputs()]
    found = dict(zip(inputs.names, inputs.tensors, strict=True))
    if missing := [name for name in expected if name not in found]:
        raise InspectError(
            f"{path}: takes {', '.join(expected)}, and the example holds {', '.join(found)}; "
            f"no {', '.join(missing)} among them."
        )
    training = model.training
    try:
        with torch.no_grad():
            wanted = flat_model(model.eval(), inputs)(*inputs.tensors)
    except Exception as error:
        raise InspectError(f"verify: the model does not run on the inputs: {type(error).__name__}: {error}") from error
    finally:
        model.train(training)
    try:
        got = session.run(None, {name: found[name].detach().cpu().numpy() for name in expected})
    except Exception as error:
        takes = ", ".join(f"{item.name} of {item.shape}" for item in session.get_inputs())
        raise InspectError(f"verify: {path} takes {takes}, and does not run on the inputs: {error}") from error
    return compare_outputs(str(path), got, [tensor.detach().cpu().float().numpy() for tensor in wanted])


def compare_outputs(path: str, got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> Comparison:
    """Differences of outputs, each relative to the largest value of its own."""
    shapes = [value.shape for value in got], [value.shape for value in wanted]
    if shapes[0] != shapes[1]:
        raise InspectError(f"{path}: gives outputs of shapes {shapes[0]}, the model gives {shapes[1]}.")
    worst, beyond, values, decisions = 0.0, 0, 0, []
    for mine, theirs in zip(got, wanted, strict=True):
        if not theirs.size:
            continue
        largest = float(np.abs(theirs).max()) or 1.0
        difference = np.abs(mine.astype(np.float64) - theirs) / largest
        difference = np.where(np.isnan(difference), np.inf, difference)
        worst = max(worst, float(difference.max()))
        beyond += int((difference > ROUNDING).sum())
        values += theirs.size
        if theirs.ndim:
            decisions.append(float((mine.argmax(-1) == theirs.argmax(-1)).mean()))
    same = sum(decisions) / len(decisions) if decisions else 1.0
    return Comparison(worst, beyond, values, same)
