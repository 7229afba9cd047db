"""Check 5: a file that equals the prepared model at both shapes and holds every planned quantizer, or a clear refusal.

`qgraph.export` compares each file with torch itself. Here a file with weights alone, where no code on a rounding tie
can go the other way, is run once more, on the zoo's own shapes; one with activations is left to that comparison.
"""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

import qgraph
from qgraph.errors import ExportError
from qgraph.exporters.report import ExportReport
from qgraph.exporters.signature import flatten_inputs, flatten_outputs
from qgraph.modules import WeightQuantizer
from tests.zoo.checks import CONFIG, WEIGHTS, Call, Found, seed

ROUNDING = 1e-4
LINE = re.compile(r"\.py:\d+")


def check(found: Found, model: nn.Module, calls: list[Call]) -> None:
    """Export the example with weights alone and with activations, run the file at both shapes; add to `found`."""
    for config in (WEIGHTS, CONFIG):
        prepared = qgraph.prepare(model, config, calls[0].args, example_kwargs=calls[0].kwargs).eval()
        planned = _planned(prepared, calls[0])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            try:
                report = qgraph.export(prepared, path, calls[0].args, example_kwargs=calls[0].kwargs, progress=False)
            except ExportError as error:
                found.export = f"refused: {error}"
                if not LINE.search(str(error)):
                    found.failures.append(f"export {config}: {error} (no line)")
                return
            found.export = "; ".join(report.dynamic) or "static"
            found.export_notes += [note for note in report.notes if note not in found.export_notes]
            in_file = {
                f"{layer.path}.{layer.operand}".strip(".") for layer in report.layers if layer.form != "not used"
            }
            unused = {
                site
                for note in report.notes
                if "no output depends on it" in note
                for site in note.split(": ")[1].split(", ")
            }
            if missing := planned - in_file - unused:
                found.failures.append(f"export {config}: not in the file: {sorted(missing)[:4]} ({len(missing)})")
            if config == WEIGHTS:
                _run_file(found, model, prepared, path, calls[:2], report)
                if found.export_calls == 1:
                    _export_dynamic(found, model, prepared, path, calls[:2])


def _run_file(
    found: Found, model: nn.Module, prepared: nn.Module, path: Path, calls: list[Call], report: ExportReport
) -> None:
    for number, call in enumerate(calls):
        if number == 0 or _fits(calls[0], call, model, report):
            found.export_calls = number + 1
            if (problem := _compare(prepared, path, call)) is not None:
                found.failures.append(f"export, call {number}: {problem}")


def _export_dynamic(found: Found, model: nn.Module, prepared: nn.Module, path: Path, calls: list[Call]) -> None:
    """Where the sizes that come out dynamic by themselves are not all that the second shape has, ask for those."""
    one, two = (flatten_inputs(model, call.args, call.kwargs) for call in calls)
    if one.names != two.names or list(one.arguments) != list(one.names):
        return  # nested arguments, or another number of tensors
    differing = {
        name: {i: f"size{a.shape[i]}_{b.shape[i]}" for i in range(a.dim()) if a.shape[i] != b.shape[i]}
        for name, a, b in zip(one.names, one.tensors, two.tensors, strict=True)
        if a.dim() == b.dim() and a.shape != b.shape
    }
    call = calls[0]
    try:
        report = qgraph.export(
            prepared, path, call.args, example_kwargs=call.kwargs, dynamic_shapes=differing, progress=False
        )
    except ExportError as error:
        found.export_notes.append(f"no file for the second shape: {error}")
        return
    _run_file(found, model, prepared, path, calls, report)
    found.export_notes.append(f"asked for: {'; '.join(report.dynamic)}")


def _planned(prepared: nn.Module, call: Call) -> set[str]:
    """Sites of the weight quantizers that one run in eval calls."""
    called: set[str] = set()
    hooks = [
        m.register_forward_hook(lambda m, args, out: called.add(m.site))
        for m in prepared.modules()
        if isinstance(m, WeightQuantizer)
    ]
    _outputs(prepared, call)
    for hook in hooks:
        hook.remove()
    return called


def _fits(first: Call, second: Call, model: nn.Module, report: ExportReport) -> bool:
    """Whether a file made from `first` takes `second`: it differs in dynamic sizes alone."""
    dynamic = {line.split(": ")[0]: {int(d) for d in re.findall(r"(\d+)=", line)} for line in report.dynamic}
    one, two = (flatten_inputs(model, call.args, call.kwargs) for call in (first, second))
    if one.names != two.names or repr((one.args, one.kwargs)) != repr((two.args, two.kwargs)):
        return False
    return all(
        a.dim() == b.dim() and {i for i in range(a.dim()) if a.shape[i] != b.shape[i]} <= dynamic.get(name, set())
        for name, a, b in zip(one.names, one.tensors, two.tensors, strict=True)
    )


def _outputs(prepared: nn.Module, call: Call) -> tuple[Tensor, ...]:
    seed()
    with torch.no_grad():
        args, kwargs = copy.deepcopy((call.args, call.kwargs))
        return flatten_outputs(prepared(*args, **kwargs), set(kwargs))[0]


def _compare(prepared: nn.Module, path: Path, call: Call) -> str | None:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    flat = flatten_inputs(prepared, call.args, call.kwargs)
    feeds = {name: tensor.numpy() for name, tensor in zip(flat.names, flat.tensors, strict=True)}
    got = [
        torch.from_numpy(np.asarray(y))
        for y in session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
    ]
    expected = _outputs(prepared, call)
    if [tuple(t.shape) for t in got] != [tuple(t.shape) for t in expected]:
        return f"shapes {[tuple(t.shape) for t in got]}, expected {[tuple(t.shape) for t in expected]}"
    distance = _distance(expected, got)
    return None if distance <= ROUNDING else f"differs by {distance:.1e}"


def _distance(expected: Any, got: Any) -> float:
    """Of the float outputs together, relative to their length; what is not finite must be so in both."""
    total = square = 0.0
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or not a.is_floating_point():
            continue
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            return float("inf")
        total += float((a - b)[finite].double().square().sum())
        square += float(a[finite].double().square().sum())
    return (total / square) ** 0.5 if square else total**0.5
