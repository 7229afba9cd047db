"""What one export works on: checked arguments, a copy of the model to run and trace, and what an eager run
shows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from onnx.defs import onnx_opset_version
from torch import Tensor, nn

from qgraph.copying import copied
from qgraph.errors import CalibrationError, ExportError
from qgraph.exporters.lowering.options import PURPOSES, Options
from qgraph.exporters.signature import FlatInputs, FlatModel, flat_model, flatten_inputs, run_eagerly
from qgraph.exporters.trace import DEFAULT_OPSET, MINIMUM_OPSET
from qgraph.exporters.verify import worst_difference
from qgraph.graph import STATE
from qgraph.modules import Collected, Quantizer, Sparsifier, WeightQuantizer, collecting

TARGETS = ("standard", "ort", "qdq")
SCALES = {"float32": torch.float32, "float16": torch.float16}
Say = Callable[[str], None]


@dataclass(slots=True)
class Job:
    """What stays the same over all attempts at one export."""

    model: nn.Module  # the working copy
    flat: FlatModel
    reference: tuple[Tensor, ...]
    collected: Collected
    original: nn.Module
    opset: int
    target: str
    say: Say
    notes: list[str]
    options: Options
    preunpacked: bool
    python: bool = False  # whether the modules' own Python is traced, not their captured graphs

    @property
    def may_run_python(self) -> bool:
        """Whether the modules' own Python computes what their graphs do: no pass of the user's has rewritten those."""
        state = self.original.__dict__.get(STATE)
        passes = () if state is None else state.shared.pipeline.passes
        return all(type(rewriting).__module__.startswith("qgraph.passes") for rewriting in passes)

    @property
    def name(self) -> str:
        return type(self.original).__name__


def check_arguments(
    prepared: Any, target: str, opset: int | None, scale_dtype: str, preunpacked: bool, optimize_for: str | None
) -> Options:
    """How to lower, from valid arguments.

    Raises
    ------
    ExportError
        For what is none of them.
    """
    if not isinstance(prepared, nn.Module):
        raise ExportError(
            f"export: found a {type(prepared).__name__} in place of the model; expected the nn.Module that "
            "qgraph.prepare returned; pass that"
        )
    if target not in TARGETS:
        raise ExportError(
            f"export: found target={target!r}; expected one of {', '.join(map(repr, TARGETS))}; choose one"
        )
    if optimize_for not in (None, *PURPOSES):
        raise ExportError(
            f"export: found optimize_for={optimize_for!r}; expected one of {', '.join(map(repr, PURPOSES))}, or None; "
            "choose one"
        )
    if preunpacked and target == "qdq":
        raise ExportError(
            "export: found preunpacked=True with target='qdq', whose weights are as runtimes take them already; "
            "expected 'ort' or 'standard' with it; leave it out"
        )
    if scale_dtype not in SCALES:
        raise ExportError(
            f"export: found scale_dtype={scale_dtype!r}; expected one of {', '.join(map(repr, SCALES))}; choose one"
        )
    if opset is not None and not (isinstance(opset, int) and MINIMUM_OPSET <= opset <= onnx_opset_version()):
        raise ExportError(
            f"export: found opset={opset!r}; expected {MINIMUM_OPSET} to {onnx_opset_version()}: torch's "
            "exporter writes none older than "
            f"{MINIMUM_OPSET}, and this onnx knows none newer; leave it out for {DEFAULT_OPSET}"
        )
    if not _is_prepared(prepared):
        raise ExportError(
            f"export: found a {type(prepared).__name__} that is not prepared, so nothing in it is "
            "quantized; expected what qgraph.prepare returns; "
            "call prepared = qgraph.prepare(model, ...) first"
        )
    return Options(scale_dtype=SCALES[scale_dtype], optimize_for=optimize_for, stacked=not preunpacked)


def _is_prepared(model: nn.Module) -> bool:
    if any(isinstance(module, Quantizer | Sparsifier) for module in model.modules()):
        return True
    from qgraph.graph import is_prepared  # a model without any site is prepared all the same

    return is_prepared(model)


def prepare_job(
    prepared: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    opset: int,
    target: str,
    options: Options,
    preunpacked: bool,
    say: Say,
) -> Job:
    for name, parameter in [*prepared.named_parameters(), *prepared.named_buffers()]:
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise ExportError(
                f"export of {type(prepared).__name__}: {name} holds NaN or Inf "
                f"({int((~torch.isfinite(parameter)).sum())} of "
                f"{parameter.numel()} values); expected finite values; the training diverged: go back to an "
                "earlier checkpoint"
            )
    model = _working_copy(prepared)
    inputs = flatten_inputs(model, example_inputs, example_kwargs)
    notes = []
    if _to_float32(inputs) or any(map(_is_other_float, (*prepared.parameters(), *prepared.buffers()))):
        notes.append("computed in float32, and compared with the model in float32: it holds other float types")
    flat = flat_model(model, inputs)
    flat.eval()
    say("running the model")
    with collecting() as collected:
        try:
            reference = run_eagerly(flat, inputs.tensors)
        except (ExportError, CalibrationError):
            raise
        except Exception as error:
            raise ExportError(
                f"export: {type(prepared).__name__} itself fails on the example inputs: "
                f"{type(error).__name__}: {error}; expected "
                "inputs that it takes; its own traceback is above"
            ) from error
    if not reference:
        raise ExportError(
            f"export of {type(prepared).__name__}: the model returns no tensor (found "
            f"{', '.join(flat.dropped) or 'nothing'}); a file needs "
            "at least one; return one"
        )
    if options.optimize_for is not None and target != "ort":
        notes.append(f"optimize_for: nothing to choose from, target {target!r} has one form of a layer")
    job = Job(model, flat, reference, collected, prepared, opset, target, say, notes, options, preunpacked)
    if options.scale_dtype != torch.float32:
        _round_scales(job)
    return job


def collect_again(job: Job, python: bool) -> None:
    """Go on with the modules' own Python, or with their graphs: a graph has one quantizer for all uses of one value, in
    Python each use has its own.
    """
    job.python = python
    with collecting(python) as job.collected:
        run_eagerly(job.flat, job.flat.inputs.tensors)


def _round_scales(job: Job) -> None:
    """Let the working copy compute with the scales that are stored, and note how far that is from the trained model."""
    dtype = job.options.scale_dtype
    for site, found in ((site, compact.rest) for site, compact in job.collected.weights.items()):
        rounded = found.with_scales_of(dtype).scale
        if found.scale is None or rounded is None:
            continue
        lost = ~rounded.isfinite() | ((rounded == 0) & (found.scale != 0))
        if bool(lost.any()):
            raise ExportError(
                f"export of {job.name}: {site} has a scale of {found.scale[lost].flatten()[0]:.3g}, which "
                f"{str(dtype).removeprefix('torch.')} does not hold; expected {torch.finfo(dtype).tiny:.1g} to "
                f"{torch.finfo(dtype).max:g}; leave scale_dtype at 'float32'"
            )
    for module in job.model.modules():
        if isinstance(module, WeightQuantizer):
            module.scale_dtype = dtype
    with collecting() as job.collected:
        rounded_reference = run_eagerly(job.flat, job.flat.inputs.tensors)
    away = worst_difference(job.reference, [tensor.numpy() for tensor in rounded_reference])
    job.reference = rounded_reference
    job.notes.append(
        f"scales are stored as {str(dtype).removeprefix('torch.')}, and the file is compared with the model that has "
        f"them so: on the example it is {away:.1e} from the trained one"
    )


def _working_copy(prepared: nn.Module) -> nn.Module:
    """A copy with modules and buffers of its own and, where they can stay, the same parameters: nobody
    writes to them in eval.
    """
    tensors = [*prepared.parameters(), *prepared.buffers()]
    as_is = all(t.device.type == "cpu" and not _is_other_float(t) for t in tensors)
    memo: dict[int, Any] = {id(parameter): parameter for parameter in prepared.parameters()} if as_is else {}
    model = copied(prepared, memo)
    for module in model.modules():
        if isinstance(module, WeightQuantizer | Sparsifier):
            module.memo.off = True
    return model.eval() if as_is else model.cpu().float().eval()


def _to_float32(inputs: FlatInputs) -> bool:
    """Bring inputs to the CPU and to float32, in place; say whether any was another float."""
    others = [_is_other_float(tensor) for tensor in inputs.tensors]
    on_cpu = [tensor.cpu() for tensor in inputs.tensors]
    inputs.tensors = tuple(t.float() if other else t for t, other in zip(on_cpu, others, strict=True))
    return any(others)


def _is_other_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float32
