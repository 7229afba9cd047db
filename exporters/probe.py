"""Layer by layer: the same model in torch and in onnxruntime, with torch made to go on from onnxruntime's
activations.

At each quantized activation torch's value is compared with onnxruntime's, the quantizer is checked on its
own (`ties.py`), and then onnxruntime's result replaces torch's. So one flipped code cannot spread, and each
stretch between two quantizers is held to float rounding.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from qgraph.exporters.lowering.records import ActivationRecord
from qgraph.exporters.signature import FlatModel, run_eagerly
from qgraph.exporters.ties import explain
from qgraph.exporters.ties_static import explain_static
from qgraph.modules import ActivationForm, ActivationQuantizer

TOLERANCE = 1e-5
# A sum of n float32 values is off by about sqrt(n) units in the last place (Higham and Mary, 2019, SIAM J. Sci. Comput.
# 41(5), "A new approach to probabilistic rounding error analysis"); a quantizer's output stands on three such sums.
SUMS, UNIT = 3, 2.0**-24
STRETCH = 1e-4  # inside the model: sums that cancel lose digits there which no output shows


@dataclass(slots=True)
class Probed:
    """What was found, in the order in which torch runs.

    `differences` maps sites and module paths to the largest difference relative to the largest value;
    `first` is the first that is beyond the tolerance, with what differs.
    """

    differences: dict[str, float] = field(default_factory=dict)
    flips: int = 0
    ties: int = 0
    first: tuple[str, str] | None = None
    outputs: list[np.ndarray] = field(default_factory=list)
    forced: tuple[Tensor, ...] = ()

    def note(self, name: str, difference: float, what: str, tolerance: float = STRETCH) -> None:
        """Record a difference, and the first one beyond its tolerance."""
        self.differences[name] = max(difference, self.differences.get(name, 0.0))
        if self.first is None and not difference <= tolerance:
            self.first = (name, f"{what} differs by {difference:.1e} of its largest value")


def add_probe_outputs(model: ir.Model, records: Sequence[ActivationRecord], layers: Mapping[str, ir.Value]) -> None:
    """Make intermediate values outputs of `model`, in place, behind its own."""
    graph = model.graph
    seen = [value for r in records for value in (r.before, r.after, r.factor, r.offset) if value is not None]
    wanted = {value.name for value in seen}
    wanted |= {value.name for value in layers.values() if value.name}
    codes = {record.after.name for record in records if record.has_codes}
    present = {value.name for value in graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value.name in wanted and value.name not in present:
                if value.type is None:
                    value.type = ir.TensorType(ir.DataType.UINT8 if value.name in codes else ir.DataType.FLOAT)
                graph.outputs.append(value)


def probe(
    flat: FlatModel,
    tensors: Sequence[Tensor],
    session: ort.InferenceSession,
    records: Sequence[ActivationRecord],
    forms: Mapping[str, ActivationForm],
    layers: Mapping[str, ir.Value],
) -> Probed:
    """Run both and compare; see the module's text.

    Parameters
    ----------
    flat, tensors : the model in eval mode and its inputs
    session : InferenceSession
        Of the file with the outputs of `add_probe_outputs`.
    records, forms : where quantized activations are in the file, and what they compute
    layers : module path -> the value that is the module's output in the file, at the last of its calls
    """
    feeds = {name: tensor.detach().cpu().numpy() for name, tensor in zip(flat.inputs.names, tensors, strict=True)}
    fetch = [value.name for value in session.get_outputs()]
    values = dict(feeds) | dict(zip(fetch, session.run(fetch, feeds), strict=True))
    found = Probed()
    by_site: dict[str, list[ActivationRecord]] = defaultdict(list)
    for record in records:
        by_site[record.site].append(record)
    quantizers = [m for m in flat.modules() if isinstance(m, ActivationQuantizer) and m.site in by_site]
    compared = {path: flat.model.get_submodule(path) for path, value in layers.items() if value.name in values}
    free, calls = _undisturbed(flat, tensors, quantizers, compared)
    hooks: list[tuple[nn.Module, Any]] = [
        (m, _Quantizer(m.site, by_site[m.site], values, forms[m.site], free[m.site], found)) for m in quantizers
    ]
    hooks += [
        (module, _Layer(path, values[layers[path].name], calls[path], found)) for path, module in compared.items()
    ]
    found.forced = _run_hooked(flat, tensors, hooks)
    found.outputs = [values[name] for name in fetch[: len(flat.output_names)]]
    return found


def _undisturbed(
    flat: FlatModel,
    tensors: Sequence[Tensor],
    quantizers: Sequence[ActivationQuantizer],
    layers: Mapping[str, nn.Module],
) -> tuple[dict[str, list[Tensor]], Counter[str]]:
    """What reaches each quantizer when torch runs on its own, and how often each layer is called."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    calls: Counter[str] = Counter()

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert isinstance(module, ActivationQuantizer)
        seen[module.site].append(args[0].detach())

    def count(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[path] += 1

    counting = [(module, functools.partial(count, path)) for path, module in layers.items()]
    _run_hooked(flat, tensors, [*((module, keep) for module in quantizers), *counting])
    return seen, calls


def _run_hooked(
    flat: FlatModel, tensors: Sequence[Tensor], hooks: Sequence[tuple[nn.Module, Any]]
) -> tuple[Tensor, ...]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        return run_eagerly(flat, tensors)
    finally:
        for handle in handles:
            handle.remove()


class _Quantizer:
    """Forward hook of an activation quantizer: compare, then go on from onnxruntime's value."""

    def __init__(
        self,
        site: str,
        records: list[ActivationRecord],
        values: dict[str, Any],
        form: ActivationForm,
        free: list[Tensor],
        found: Probed,
    ) -> None:
        self.site, self.records, self.values, self.form = site, records, values, form
        self.free, self.found = free, found
        self.calls = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = args[0].detach()
        record = self._record(x)
        if record is None:
            return output
        before = x
        if record.before is not None:
            before = torch.from_numpy(self.values[record.before.name]).to(x.dtype).reshape(x.shape)
            self.found.note(self.site, relative_difference(x, before), "the value that reaches this quantizer")
        after = self._after(record, x.dtype).reshape(x.shape)
        own = self._own(x, before)
        if record.scale is None:
            explained = explain(before, after, own, self.form)
        else:
            explained = explain_static(before, after, own, self.form, record.tie)
        self.found.flips += explained.flips
        self.found.ties += explained.ties
        allowed = max(TOLERANCE, SUMS * self._length(x) ** 0.5 * UNIT)
        self.found.note(self.site, explained.unexplained, "what this quantizer makes of its input", allowed)
        return after.to(output.dtype)

    def _after(self, record: ActivationRecord, dtype: torch.dtype) -> Tensor:
        """The quantized value in the file; codes are dequantized."""
        value = torch.from_numpy(self.values[record.after.name])
        if record.has_codes:
            factor = torch.tensor(record.scale) if record.factor is None else self._value(record.factor)
            value = (value.float() - record.zero_point) * factor
        if record.offset is not None:
            value = value + self._value(record.offset)
        return value.to(dtype)

    def _value(self, value: ir.Value) -> Tensor:
        assert value.name is not None
        return torch.from_numpy(self.values[value.name])

    def _length(self, x: Tensor) -> int:
        """How many values share one scale."""
        return max(piece.shape[-1] for piece in self.form.groups.pieces(x))

    def _own(self, x: Tensor, before: Tensor) -> Tensor:
        """torch's value to count flips against: that of its own run, up to the first flip that spread."""
        own = self.free[self.calls - 1] if self.calls <= len(self.free) else x
        return own if relative_difference(own, before) <= STRETCH else x

    def _record(self, x: Tensor) -> ActivationRecord | None:
        """The node of this call: a site that is called several times has several, in order.

        Where none has the shape it is one whose rows are laid out otherwise.
        """
        shapes = [(record, self._shape(record)) for record in self.records]
        rows = math.prod(x.shape[:-1]), x.shape[-1:]
        fitting = [record for record, shape in shapes if shape == tuple(x.shape)] or [
            record for record, shape in shapes if shape is not None and (math.prod(shape[:-1]), shape[-1:]) == rows
        ]
        self.calls += 1
        if not fitting:
            return None
        return fitting[min(self.calls, len(fitting)) - 1]

    def _shape(self, record: ActivationRecord) -> tuple[int, ...] | None:
        wanted = [value for value in (record.before, record.after) if value is not None]
        found = [self.values.get(value.name) for value in wanted]
        last = found[-1]
        return None if last is None or any(value is None for value in found) else last.shape


class _Layer:
    """Forward hook of a module that owns a quantized weight: compare its output, that of the last of its calls."""

    def __init__(self, path: str, value: np.ndarray, calls: int, found: Probed) -> None:
        self.path, self.value, self.left, self.found = path, value, calls, found

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.left -= 1
        if self.left:
            return
        tensor = output[0] if isinstance(output, tuple) and output else output
        if isinstance(tensor, Tensor) and tuple(tensor.shape) == self.value.shape and tensor.is_floating_point():
            difference = relative_difference(tensor.detach(), torch.from_numpy(self.value))
            self.found.note(self.path, difference, "its output")


def session_of(
    model: bytes | Path, optimize: bool = True, settings: Mapping[str, str] | None = None
) -> ort.InferenceSession:
    """A quiet CPU session, with every graph optimization or with none, and with settings of its own."""
    options = ort.SessionOptions()
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference over the largest expected value; equal NaN and Inf are no difference, else it is
    infinite.
    """
    if expected.shape != found.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    a, b = expected.double().cpu(), found.double().cpu()
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)) or not torch.equal(
        a[~finite].nan_to_num(0), b[~finite].nan_to_num(0)
    ):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    largest = float(a[finite].abs().max())
    difference = float((a - b)[finite].abs().max())
    return difference / largest if largest else difference
