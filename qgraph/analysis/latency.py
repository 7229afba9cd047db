"""What each layer takes in onnxruntime at each width: files at uniform bits, timed in turns, and profiled by node."""

from __future__ import annotations

import functools
import json
import re
import shutil
import statistics
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from qgraph.analysis.costs import Unit, as_it_was
from qgraph.errors import ConfigError
from qgraph.exporters.merge import separate
from qgraph.exporters.onnx import export
from qgraph.exporters.report import content_of
from qgraph.exporters.signature import flatten_inputs
from qgraph.prepare import disabled
from qgraph.runtime import time_files
from qgraph.terminal import progress_bar

RUNS, SECONDS = (30, 1000), 1.0  # of each file: as many runs as its time allows, between these
PROFILED = 10
# What onnxruntime's optimizer adds to the name of a node, or of its output, where it replaces it; and what it draws in.
_ADDED = re.compile(r"^fused |(_nchwc|_token_\d+|/\w*Fusion/?)+$")
_DRAWN_IN = {"BatchNormalization", "Add", "Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid"}


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of one run.

    Parameters
    ----------
    whole : float
        Of the float model.
    rest : float
        Of what belongs to no layer that gets bits.
    layers : list of list of float
        For each layer one at each width, such that with the rest they add up to the files that were timed.
    """

    whole: float
    rest: float
    layers: list[list[float]]

    def at(self, column: int) -> float:
        """Of the model with one width everywhere, over the float model."""
        return (self.rest + sum(row[column] for row in self.layers)) / self.whole


class Stopwatch:
    """Exports a model at given bits as it would be exported for latency, and times the files beside the float model's.

    Parameters
    ----------
    model : nn.Module
        A prepared model; it is left as it was.
    units : sequence of Unit
        Its layers that get bits.
    inputs, kwargs : the arguments to run it on
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], inputs: Any, kwargs: Mapping[str, Any] | None) -> None:
        if inputs is None:
            raise ConfigError(
                "allocate: a budget of latency needs example_inputs=, the arguments that a run is timed with."
            )
        self.model, self.units, self.inputs, self.kwargs = model, units, inputs, kwargs
        self.runs = 0  # of each file, as the first one's time allows
        self.folder = Path(tempfile.mkdtemp(prefix="qgraph-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        flat = flatten_inputs(model, inputs, kwargs)
        self.feed = {name: t.detach().cpu().numpy() for name, t in zip(flat.names, flat.tensors, strict=True)}

    def measure(self, widths: Sequence[float], progress: bool) -> Times:
        """Every layer at every width."""
        with progress_bar(progress, len(widths) + 2, "timing") as advance:
            plain, paths = self._plain, []
            advance()
            for bits in widths:
                paths.append(self._write(f"{bits}.onnx", [bits] * len(self.units)))
                advance()
            pairs = [self._pair(plain, path) for path in paths]
            parts = [self._by_layer(path) for path in paths]
            advance()
        whole = statistics.median(pair[0] for pair in pairs)
        totals = [whole * found / beside for beside, found in pairs]
        # Profiling has a cost of its own: parts that exceed the whole are scaled to it.
        parts = [
            [t * min(1, total / (sum(part) or 1)) for t in part] for part, total in zip(parts, totals, strict=True)
        ]
        rests = [total - sum(part) for total, part in zip(totals, parts, strict=True)]
        rest, weights = max(0.0, min(rests)), sum(unit.weights for unit in self.units)
        # Where a fused node bears no name of ours its time is in what is left, and is shared out by size.
        layers = [
            [part[i] + max(0.0, left - rest) * unit.weights / weights for part, left in zip(parts, rests, strict=True)]
            for i, unit in enumerate(self.units)
        ]
        return Times(whole, rest, layers)

    def share(self, bits: Sequence[float]) -> float:
        """What a run takes with these bits, one number for each layer, over the float model."""
        whole, found = self._pair(self._plain, self._write("chosen.onnx", bits))
        return found / whole

    @functools.cached_property
    def _plain(self) -> Path:
        with disabled(self.model):
            return self._export("float.onnx")

    def _write(self, name: str, bits: Sequence[float]) -> Path:
        with as_it_was(self.model):
            for unit, width in zip(self.units, bits, strict=True):
                unit.set_bits(width)
            return self._export(name)

    def _export(self, name: str) -> Path:
        path = self.folder / name
        export(
            self.model,
            path,
            self.inputs,
            example_kwargs=self.kwargs,
            optimize_for="latency",
            verify=False,
            progress=False,
        )
        return path

    def _pair(self, plain: Path, other: Path) -> tuple[float, float]:
        """Milliseconds of two files in turns; of more than two each would find its weights out of the cache."""
        feeds = [self._feed(plain), self._feed(other)]
        if not self.runs:
            least, most = RUNS
            first = time_files([plain], least, feeds=feeds[:1])[0].median_ms
            self.runs = min(most, max(least, int(1000 * SECONDS / first)))
        one, two = time_files([plain, other], self.runs, feeds=feeds)
        return one.median_ms, two.median_ms

    def _feed(self, path: Path) -> dict[str, np.ndarray]:
        return {item.name: self.feed[item.name] for item in onnx.load(path, load_external_data=False).graph.input}

    def _by_layer(self, path: Path) -> list[float]:
        """Milliseconds of the nodes that are named after each layer."""
        import onnxruntime

        path = _with_names(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.enable_profiling, options.profile_file_prefix = True, str(path.with_suffix(""))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = self._feed(path)
        for _ in range(PROFILED):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        durations: dict[str, list[float]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                durations[_ADDED.sub("", event["name"].removesuffix("_kernel_time"))].append(event["dur"] / 1000)
        taken, owner = [0.0] * len(self.units), self._owners(path)
        for name in durations.keys() & owner.keys():
            taken[owner[name]] += statistics.median(durations[name]) * len(durations[name]) / PROFILED
        return taken

    def _owners(self, path: Path) -> dict[str, int]:
        """Name of a node, and of what it computes -> the place of its layer."""
        places = {name: i for i, unit in enumerate(self.units) for name in (*unit.paths, *unit.names()) if name}
        owners: dict[str, int] = {}
        for node in onnx.load(path, load_external_data=False).graph.node:
            stem = node.name.rpartition("/")[0] or node.name
            while stem and stem not in places:
                stem = stem.rpartition(".")[0]
            if stem:
                owners |= dict.fromkeys((node.name, *node.output), places[stem])
            elif node.op_type in _DRAWN_IN and (near := [owners[name] for name in node.input if name in owners]):
                owners[node.output[0]] = near[0]
        return owners


def _with_names(path: Path) -> Path:
    """A file whose nodes have names: itself, or a copy where its metadata alone has them."""
    model = onnx.load(path, load_external_data=False)
    if not content_of(model).get("nodes"):
        return path
    separate(model)
    named = path.with_suffix(".named.onnx")
    onnx.save(model, named)
    return named
