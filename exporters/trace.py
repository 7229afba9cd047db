"""From a model in its quantized, exporting form to an ONNX graph whose weights and activations are still our
nodes.

The graph holds one `qgraph::Weight` node per quantized weight and one `qgraph::Activation` node per
quantized activation, each with its site; `exporters.lowering` replaces them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx.defs import OpSchema, SchemaError, get_schema, register_schema
from torch import Tensor, fx, nn

from qgraph.capture.names import any_name
from qgraph.errors import ExportError
from qgraph.exporters.computed import FromInputs, forget_computation, names_from_inputs
from qgraph.exporters.constants import Decision, constants, decisions_by_size
from qgraph.exporters.lowering import recurrent
from qgraph.exporters.lowering.records import DOMAIN
from qgraph.exporters.rewrites import ALWAYS, ATTENTION, Rewrites, modules_as_they_are, values_unread
from qgraph.exporters.shapes import ShapePlan
from qgraph.exporters.signature import FlatModel
from qgraph.exporters.translations import table_read_once, translations
from qgraph.exporters.where import chain, forward_line, line_in, user_line
from qgraph.modules import exporting

MINIMUM_OPSET = 18  # the lowest that torch's exporter writes; LayerNormalization is there from 17 on
DEFAULT_OPSET = 20
GENERAL_HINT = "see the chained error, and try dynamic_shapes={} for a static file"
HINTS = {  # what a known failure says -> what helps
    "fake tensor in the exported program": "a gradient taken inside a forward (torch.autograd.grad) has no form in a "
    "file: write it as a formula, or take it outside",
    "No ONNX function found": "write it in operations that ONNX has",
    "batch_sizes": "a packed sequence has no form in ONNX: pass the padded tensor to the recurrent layer",
    "_packed_sequence": "a packed sequence has no form in ONNX: pass the padded tensor to the recurrent layer",
}
SELECTING = frozenset({"topk", "sort", "argsort", "argmax", "argmin", "kthvalue", "mode"})
CHATTY = (
    "torch.onnx",
    "torch.export",
    "torch._export",
    "torch.fx.experimental.symbolic_shapes",
    "onnxscript",
    "onnx_ir",
)
_one_at_a_time = threading.RLock()  # the exporter of torch, and what is replaced while it runs, are for one thread


@dataclass(slots=True)
class Traced:
    """An ONNX graph in memory, the sites that it quantizes, what was changed for it.

    `random`: the lines of the user's code that draw at random; `selecting`: those that pick by comparing values;
    `decisions`: what it takes for granted of sizes that are dynamic.
    """

    model: ir.Model
    sites: set[str]
    notes: list[str]
    random: list[str]
    selecting: list[str]
    decisions: list[Decision]


def trace(
    flat: FlatModel,
    tensors: Sequence[Tensor],
    plan: ShapePlan,
    opset: int,
    python: bool = False,
    calls: Mapping[str, Sequence[str]] | None = None,
) -> Traced:
    """Export to an ONNX graph in memory.

    Parameters
    ----------
    flat : FlatModel
        The model in eval mode.
    tensors : sequence of Tensor
        Example inputs; no dynamic size is 0 or 1.
    plan : ShapePlan
        The dynamic dimensions.
    opset : int
    python : bool
        Trace every module's own Python in place of its captured graph.
    calls : mapping, optional
        What the weight of each call of a site is named.

    Raises
    ------
    FromInputs
        For weights that are computed from the inputs.
    DataDependent, ExportError, Exception
        The exporter's own error where it is none of ours: the caller decides whether to try fewer dynamic
        sizes.
    """
    with _one_at_a_time:
        try:
            return _trace(flat, tensors, plan, opset, python, calls, Rewrites(ALWAYS))
        except Exception as error:
            if not _attention_trouble(error):
                raise
        return _trace(flat, tensors, plan, opset, python, calls, Rewrites({**ALWAYS, **ATTENTION}))


def _trace(
    flat: FlatModel,
    tensors: Sequence[Tensor],
    plan: ShapePlan,
    opset: int,
    python: bool,
    calls: Mapping[str, Sequence[str]] | None,
    rewrites: Rewrites,
) -> Traced:
    _register_schemas()
    named = plan.torch_dims()
    shapes = {
        name: {dim: named[label] for dim, label in dims.items()} or None
        for name, dims in zip(flat.inputs.names, plan.dims, strict=True)
    }
    traced_shapes = {name: tuple(t.shape) for name, t in zip(flat.inputs.names, tensors, strict=True)}
    labels = {name: dict(dims) or None for name, dims in zip(flat.inputs.names, plan.dims, strict=True)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(torch.no_grad())
        stack.enter_context(any_name())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        with (
            exporting(python, calls) as sites,
            recurrent.RecurrentAsOperator(),
            rewrites,
            modules_as_they_are(),
            values_unread(),
            decisions_by_size(_trace.__name__, traced_shapes) as decisions,
        ):
            program = torch.export.export(flat, tuple(tensors), dynamic_shapes=shapes, strict=False)
        if computed := names_from_inputs(program):
            raise FromInputs(computed)
        forget_computation(program)
        stack.enter_context(table_read_once())
        try:
            onnx_program = torch.onnx.export(
                program,
                dynamic_shapes=labels,
                input_names=list(flat.inputs.names),
                output_names=list(flat.output_names),
                opset_version=opset,
                custom_translation_table=translations(),
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            raise Untranslated(_recorded_at(error)) from error
    assert onnx_program is not None
    random, selecting = (_lines_of(program.graph, condition) for condition in (_draws, _selects))
    return Traced(onnx_program.model, sites, rewrites.notes, random, selecting, decisions)


def _lines_of(graph: fx.Graph, condition: Callable[[torch._ops.OpOverload], bool]) -> list[str]:
    """Where the operators of a graph for which a condition holds are called."""
    found = [n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload) and condition(n.target)]
    return list(dict.fromkeys(line_in(node.meta.get("stack_trace", "")) or str(node.target) for node in found))


def _draws(operator: torch._ops.OpOverload) -> bool:
    training_alone = re.search("dropout|attention", str(operator))
    return torch.Tag.nondeterministic_seeded in operator.tags and not training_alone


def _selects(operator: torch._ops.OpOverload) -> bool:
    """Whether positions come out that the order of float values decides: rounding may swap two that are close."""
    return operator._schema.name.partition("::")[2] in SELECTING


class Untranslated(Exception):
    """torch.onnx failed on a traced graph; the text is the stack trace of the operation that it stopped at."""


def _recorded_at(error: BaseException) -> str:
    """The stack trace of the node that torch's translation was at (of a decomposed graph: names are others there)."""
    for exception in chain(error):
        for frame, _ in traceback.walk_tb(exception.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, fx.Node) and node.meta.get("stack_trace"):
                return str(node.meta["stack_trace"])
    return ""


def explain(error: BaseException, model: nn.Module) -> ExportError:
    """An `ExportError` for a failure of the tracer, naming the user's line where there is one."""
    text = str(_innermost(error, "GuardOnDataDependentSymNode") or error)
    at = f" at {user_line(error) or forward_line(model)}"
    model_name = type(model).__name__
    if is_data_dependent(error):
        return ExportError(
            f"export of {model_name}{at}: the model branches or takes a size from the values of a tensor, "
            "found "
            f"{_first_line(text)!r}; a file holds one fixed graph, so expected only decisions on shapes; "
            "write the branch with torch.where, "
            "keep a static form (masks instead of selected rows), or leave that part out of "
            "what is exported"
        )
    if lines := constants(error):
        return ExportError(
            f"export of {model_name}: {'; '.join(lines)}, so that it cannot be dynamic; expected sizes that are "
            "computed from sizes in whole numbers (`//`, `-1` in a view), without int(), a loop over them or a size of "
            "a layer; leave it out of dynamic_shapes where it is to be a constant"
        )
    text = str(_root(error))
    advice = next((text for mark, text in HINTS.items() if any(mark in str(e) for e in chain(error))), GENERAL_HINT)
    return ExportError(
        f"export of {model_name}{at}: torch.export or torch.onnx failed with {type(_root(error)).__name__}: "
        f"{_first_line(text)}; expected a model "
        f"that torch.onnx.export(dynamo=True) takes; {advice}"
    )


def is_data_dependent(error: BaseException) -> bool:
    """Whether a value of a tensor decided the path or a size; no choice of dynamic sizes helps then."""
    return any("DataDependent" in type(e).__name__ or "data-dependent" in str(e) for e in chain(error))


def _register_schemas() -> None:
    for name in ("Weight", "Activation"):
        try:
            get_schema(name, 1, DOMAIN)
        except SchemaError:
            register_schema(
                OpSchema(
                    name,
                    DOMAIN,
                    1,
                    inputs=[OpSchema.FormalParameter("x", "T")],
                    outputs=[OpSchema.FormalParameter("y", "T")],
                    type_constraints=[
                        ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], "")
                    ],
                    attributes=[OpSchema.Attribute("site", OpSchema.AttrType.STRING, "module path and operand")],
                )
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's own chatter (missing torchvision, deprecations) off the user's terminal."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    silenced = io.StringIO()  # torch prints a failed graph; what matters of it is in the error
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(silenced),
        contextlib.redirect_stderr(silenced),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _attention_trouble(error: BaseException) -> bool:
    text = " ".join(str(e) for e in chain(error))
    return "Cannot view a tensor" in text or ("is_causal" in text and "SymBool" in text)


def _innermost(error: BaseException, name: str) -> BaseException | None:
    return next((e for e in chain(error) if name in type(e).__name__), None)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")[:300]
