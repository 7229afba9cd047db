"""`export`: from a prepared model to a packed ONNX file that was run, compared and then renamed into
place.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from rich.console import Console
from torch import Tensor, nn

from qgraph.errors import CalibrationError, ExportError
from qgraph.exporters.assemble import as_stored, assemble, describe
from qgraph.exporters.computed import FromInputs, quantize_as_they_come
from qgraph.exporters.constants import constants, decided_otherwise
from qgraph.exporters.job import Job, Say, check_arguments, collect_again, prepare_job
from qgraph.exporters.layouts import gather_moves, keep_rows
from qgraph.exporters.lowering.graph import Lowered, lower, remove_unused
from qgraph.exporters.lowering.qdq import FOUR_BITS, TWO_BITS, TWO_BITS_IR
from qgraph.exporters.merge import merge
from qgraph.exporters.naming import (
    SHARED,
    drop_defaults,
    merge_reshapes,
    module_names,
    module_outputs,
    rename,
    restore_parameters,
    shorten,
    thin_names,
)
from qgraph.exporters.outline import outline, owners
from qgraph.exporters.preunpack import preunpack
from qgraph.exporters.report import ExportReport, metadata
from qgraph.exporters.shapes import ShapePlan, candidate_plans, given_plan, tracing_example
from qgraph.exporters.signature import run_eagerly
from qgraph.exporters.trace import DEFAULT_OPSET, Traced, explain, is_data_dependent, trace
from qgraph.exporters.verify import QDQ_AS_WRITTEN, Example, Verified, Verifier, WrongFile, check, other_values
from qgraph.exporters.write import move_into_place, save, workspace
from qgraph.graph import unwrapped
from qgraph.version import __version__


def export(
    prepared: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    target: Literal["standard", "ort", "qdq"] = "ort",
    dynamic_shapes: Any = None,
    opset: int | None = None,
    scale_dtype: Literal["float32", "float16"] = "float32",
    preunpacked: bool = False,
    optimize_for: Literal["latency", "throughput", "size"] | None = None,
    verify: bool = True,
    progress: bool = True,
) -> ExportReport:
    """Write a prepared model as an ONNX file with packed low-bit weights.

    Parameters
    ----------
    prepared : nn.Module
        What `qgraph.prepare` returned. It is exported as it computes in eval mode, and left exactly as it
        was.
    path : path
        The file; above 2 GB weights go to ``<path>.data``. It is written whole or not at all.
    example_inputs : tuple, Tensor or mapping
        Positional arguments of the model, or a mapping of keyword ones; dicts, sequences and dataclasses among them
        become named tensor inputs.
    example_kwargs : mapping, optional
        Keyword arguments.
    target : {"ort", "standard", "qdq"}
        "ort" uses com.microsoft operators where they are faithful; "standard" core operators alone; "qdq" keeps weights
        as int4 or int8 behind DequantizeLinear and static activations as QuantizeLinear and DequantizeLinear, for
        toolchains that fuse those. What these two cannot express is written in other core operators.
    dynamic_shapes : optional
        As `torch.export.export` takes it; ``{}`` for none. Left out, batch and sequence are made dynamic
        where the model allows, and the report says which.
    opset : int, optional
        At least 18; "qdq" takes 21 by itself, which has int4 and blocks, and int2 from 25 on.
    scale_dtype : {"float32", "float16"}
        How scales of weights are stored. Rounding them to float16 changes a weight by a two-thousandth of its distance
        from the zero point at most; the file is compared with the model that has them so, and the report says how far
        that one's outputs are from the trained one's.
    preunpacked : bool
        Store weights as a runtime holds them once it has loaded a packed file (the 4-bit codes of a kernel, int8, or
        float): a larger file, which loads without unpacking. The report gives both sizes.
    optimize_for : {"latency", "throughput", "size"}, optional
        Of target "ort": which of its faithful forms a Linear layer takes: onnxruntime's low-bit kernel, a float
        product with the weight unpacked at load, or, of activations with a scale a row, an integer product.
        "latency", and left out, takes the one that is fastest at the example's sizes, "throughput" at 256 rows or
        more, by what benchmarks/forms.py and benchmarks/integers.py measured; "size" the kernel, which needs least
        memory. The report says of each layer why.
    verify : bool
        Run the file in onnxruntime, with and without its optimizer, and compare with the model.
    progress : bool
        Say on a terminal what is going on.

    Returns
    -------
    ExportReport

    Raises
    ------
    ExportError
        When the model cannot be exported, or the file computes something else. No file is left then, and one
        that was there is as it was.
    """
    path, prepared = Path(path), unwrapped(prepared)
    options = check_arguments(prepared, target, opset, scale_dtype, preunpacked, optimize_for)
    with workspace(path) as folder, _teller(progress) as say:
        opset = opset or (FOUR_BITS if target == "qdq" else DEFAULT_OPSET)
        job = prepare_job(prepared, example_inputs, example_kwargs, opset, target, options, preunpacked, say)
        say("looking for dynamic sizes")
        plans = _plans(job, dynamic_shapes)
        built = _first_that_works(job, plans, folder, path, verify, given=dynamic_shapes is not None)
        size = move_into_place(folder / path.name, path)
    return describe(built.report, file_bytes=size, verified=built.verified)


# A file above these many bytes for each byte of content, and beside it, has fewer names, short float vectors together,
# and its repeated nodes written once; not a `standard` one, since not every runtime reads functions.
NODE_SHARE, NODE_BYTES = 1.02, 4 * 1024


@dataclass(slots=True)
class _Built:
    report: ExportReport
    verified: Verified | None


def _plans(job: Job, dynamic_shapes: Any) -> Iterator[ShapePlan]:
    tensors = job.flat.inputs.tensors

    def run(other: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return run_eagerly(job.flat, other)

    if dynamic_shapes is None:
        return candidate_plans(tensors, job.flat.inputs.names, run)
    plan = given_plan(job.flat.inputs, dynamic_shapes, run)
    return iter([plan] if plan.larger is None else [plan, replace(plan, traces_larger=True)])


def _first_that_works(
    job: Job, plans: Iterator[ShapePlan], folder: Path, path: Path, verify: bool, given: bool
) -> _Built:
    """Build with the first plan; go to the next if tracing specialises a size or the file is wrong at a second shape:
    a less dynamic one, or for sizes that are `given` one that is traced at others.

    Where a captured graph holds for the example's sizes alone, the modules' own Python is traced.
    """
    refused: ExportError | None = None
    for plan in plans:
        found: tuple[ExportError, str] | None = None
        final = False
        for python in (False, True) if job.may_run_python else (False,):
            try:
                if python is not job.python:
                    collect_again(job, python)
                return _build_exactly(job, plan, folder, path, verify)
            except WrongFile as error:
                if not (error.shape_only or python or plan.traces_larger):
                    raise
                if found is None or error.line:
                    decides = f"{error.line} decides by it" if error.line else "the file was wrong at another size"
                    found = error, decides
            except CalibrationError:  # a use that in graphs shares another's range
                assert found is not None
            except _TraceFailed as error:
                lines = constants(error)
                if found is None or lines:  # Python names the line where a guard of a graph does not
                    found = error.explained, "; ".join(lines) or "torch.export made it a constant"
                final = error.final
        assert found is not None
        refused = refused or found[0]
        if not any(plan.dims) or final:
            raise refused
        if given:
            continue
        job.notes.append(f"not dynamic: {'; '.join(plan.describe(job.flat.inputs.names))} ({found[1]})")
    assert refused is not None, "there is a plan, and it works or fails"
    raise refused


def _build_exactly(job: Job, plan: ShapePlan, folder: Path, path: Path, verify: bool) -> _Built:
    """Build; where rounding is too much, once more without the kernels that sum otherwise than MatMul."""
    try:
        return _build(job, plan, folder, path, verify)
    except WrongFile as error:
        if not (error.rounding and job.options.float_kernels and job.target == "ort"):
            raise
    job.options = replace(job.options, float_kernels=False)
    return _build(job, plan, folder, path, verify)


class _TraceFailed(Exception):
    """The tracer gave up; `final` when fewer dynamic sizes will not help."""

    def __init__(self, explained: ExportError, final: bool) -> None:
        super().__init__(str(explained))
        self.explained = explained
        self.final = final


def _build(job: Job, plan: ShapePlan, folder: Path, path: Path, verify: bool) -> _Built:
    traced = _trace(job, plan)
    model, notes = traced.model, traced.notes
    outputs = module_outputs(model.graph, job.model)
    layers = {path: y for path, y in outputs.items() if y.dtype in (None, ir.DataType.FLOAT)}
    rename(model.graph, job.model)
    restore_parameters(model.graph, job.model.named_parameters(remove_duplicate=False))
    keep_rows(model.graph, layers, job.collected.activations)
    gather_moves(model.graph, layers)
    job.say("packing weights")
    options = replace(job.options, sizes=plan.sizes(job.flat.inputs.tensors))
    lowered = lower(model, job.collected, job.target, layers, options)
    if unused := [site for site in job.collected.weights if site not in lowered.weights]:
        notes.append(f"not in the file, since no output depends on it: {', '.join(unused)}")
    parameters = dict(job.model.named_parameters(remove_duplicate=False))
    own = {*parameters, *dict(job.model.named_buffers(remove_duplicate=False))}
    report = _report(job, model, lowered, plan, notes, path, own)
    merge_reshapes(model.graph)
    remove_unused(model.graph)
    if job.preunpacked:
        preunpack(model, [site for site, record in lowered.weights.items() if record.shared_with is None])
        report = as_stored(report, model)
    owned_by = owners(model.graph)
    thin_names(model.graph, lowered.nodes)
    drop_defaults(model.graph)
    shorten(model.graph, {*own, *(item.name for item in report.leftovers), *lowered.stacked})
    _stamp(model, report)
    file = folder / path.name
    job.say("writing")
    _save(job, model, report, owned_by, file)
    check(file)
    try:
        others = not (traced.selecting or traced.random)
        verified = _verify(job, plan, file, folder, model, lowered, layers, others) if verify else None
    except WrongFile as error:
        if traced.random:
            raise _draws_at_random(job, traced.random) from error
        if traced.selecting and not error.shape_only:
            raise _selects_by_rounding(job, traced.selecting, error) from error
        if error.shape_only and (lines := decided_otherwise(traced.decisions, _other_shapes(job, plan))):
            raise _decides_by_size(job, lines) from error
        raise
    return _Built(report, verified)


def _save(job: Job, model: ir.Model, report: ExportReport, owned_by: Sequence[str], file: Path) -> None:
    """Write the model; where its content is the smaller part of it, in ways that are less easy to read, one by one."""
    modules = {name: type(module).__name__ for name, module in job.model.named_modules()}
    limit = int(NODE_SHARE * report.ideal_bytes) + NODE_BYTES

    def fits(model: ir.Model) -> bool:
        save(model, file)
        return file.stat().st_size <= limit

    if fits(model):
        return
    module_names(model.graph, modules)
    if fits(model):
        return
    small = ir.load(file)  # a copy: the comparison layer by layer needs the plain one
    merged = merge(small, [item.name for item in report.leftovers])
    shorten(small.graph, {name for name in small.graph.initializers if name in merged or "." in name})
    _stamp(small, report, merged)
    if fits(small):
        return
    if job.target == "ort":
        outline(small, [SHARED] * len(merged) + list(owned_by), modules)
    else:
        _stamp(small, report, merged, [node.name for node in small.graph])
        for node in small.graph:
            node.name = None
    save(small, file)


def _report(
    job: Job, model: ir.Model, lowered: Lowered, plan: ShapePlan, notes: list[str], path: Path, own: set[str]
) -> ExportReport:
    """The report as far as it is known before the file is run."""
    return assemble(
        job.original,
        model,
        lowered,
        job.collected,
        own,
        path=str(path),
        target=job.target,
        dynamic=plan.describe(job.flat.inputs.names),
        dropped=job.flat.dropped,
        notes=(*job.notes, *notes),
    )


def _trace(job: Job, plan: ShapePlan) -> Traced:
    job.say("tracing" + (f" with {'; '.join(plan.describe(job.flat.inputs.names))}" if any(plan.dims) else ""))
    try:
        example = tracing_example(plan, job.flat.inputs.tensors)
        traced = trace(job.flat, example, plan, job.opset, job.python, job.collected.calls)
    except ExportError:
        raise
    except FromInputs as found:
        sites = found.sites(job.collected.calls)
        quantize_as_they_come(job.model, sites)
        collect_again(job, job.python)
        job.notes += [f"{site} is computed from the inputs: quantized in the file as it comes" for site in sites]
        return _trace(job, plan)
    except Exception as error:
        explained = explain(error, job.original)
        explained.__cause__ = error
        raise _TraceFailed(explained, is_data_dependent(error)) from error
    if lost := [site for site in (*job.collected.weights, *job.collected.activations) if site not in traced.sites]:
        raise _TraceFailed(_lost_sites(job, lost), final=False)
    if job.python:
        traced.notes.append("traced as Python: the captured graphs hold for the example's sizes alone")
    return traced


def _draws_at_random(job: Job, lines: Sequence[str]) -> ExportError:
    return ExportError(
        f"export of {job.name}: {lines[0]} draws random numbers in eval, so the file cannot be compared with the "
        "model; expected the same outputs for the same inputs; take the noise as an input, or pass verify=False to "
        "write the file unchecked"
    )


def _other_shapes(job: Job, plan: ShapePlan) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes of the examples that a file is tried with beside the one that it was made from."""
    for tensors in (plan.second, plan.larger[0] if plan.larger is not None else None):
        if tensors is not None:
            yield {name: tuple(t.shape) for name, t in zip(job.flat.inputs.names, tensors, strict=True)}


def _decides_by_size(job: Job, lines: Sequence[str]) -> WrongFile:
    return WrongFile(
        f"export of {job.name}: {lines[0]} decides by a size that is dynamic, and goes another way at another size; "
        "expected what holds for all sizes, since a file holds one fixed graph; compute with sizes in whole numbers "
        "(`//`, no int() of a quotient), keep the size within one case, or make it a constant (leave it out of "
        "dynamic_shapes)",
        shape_only=True,
        line=lines[0],
    )


def _selects_by_rounding(job: Job, lines: Sequence[str], error: WrongFile) -> WrongFile:
    return WrongFile(
        f"export of {job.name}: {lines[0]} picks by the order of computed values (topk, sort, argmax); of two that are "
        f"equal or closer than rounding the file may take the other one, and then all that follows differs. {error}. "
        "Where this is the cause, take example inputs and weights that leave no such values close together (fresh "
        "weights often do not, trained ones do), or pass verify=False and judge the file by its results",
        shape_only=False,
        rounding=error.rounding,
    )


def _lost_sites(job: Job, lost: Sequence[str]) -> ExportError:
    return ExportError(
        f"export of {job.name}: {len(lost)} quantized sites are not in the traced graph ({', '.join(lost[:3])}), "
        "expected all that ran eagerly; the model takes another path under torch.export: make that branch independent "
        "of it"
    )


def _stamp(
    model: ir.Model,
    report: ExportReport,
    merged: Mapping[str, Sequence[str]] | None = None,
    nodes: Sequence[str | None] = (),
) -> None:
    if model.graph.opset_imports.get("", 0) >= TWO_BITS:
        model.ir_version = max(model.ir_version or 0, TWO_BITS_IR)
    model.producer_name = "qgraph"
    model.producer_version = __version__
    model.doc_string = None
    model.metadata_props.clear()
    model.metadata_props.update(metadata(report, __version__, merged, nodes))


def _verify(
    job: Job,
    plan: ShapePlan,
    file: Path,
    folder: Path,
    model: ir.Model,
    lowered: Lowered,
    layers: dict[str, ir.Value],
    others: bool,
) -> Verified:
    weighted = {site.rpartition(".")[0] for site in lowered.weights}
    examples = [Example("the example", job.flat.inputs.tensors, job.reference)]
    if plan.second is not None and plan.reference is not None:
        examples.append(Example("a second shape", plan.second, plan.reference, resized=True))
    if plan.larger is not None:
        examples.append(Example("twice the sizes", *plan.larger, resized=True))
    if others:
        examples += other_values(job.flat, job.flat.inputs.tensors, job.reference)
    verifier = Verifier(
        job.flat,
        file,
        folder,
        model,
        lowered.activations,
        job.collected.activations,
        {path: value for path, value in layers.items() if path in weighted},
        job.say,
        rounding_kernels=job.options.float_kernels and job.target == "ort",
        settings=QDQ_AS_WRITTEN if job.target == "qdq" else {},
    )
    return verifier.run(examples)


@contextlib.contextmanager
def _teller(progress: bool) -> Iterator[Say]:
    """Say on standard error what is going on, where that is a terminal."""
    if not progress or not sys.stderr.isatty():
        yield lambda text: None
        return
    with Console(file=sys.stderr).status("export") as status:
        yield lambda text: status.update(f"export: {text}")
