"""Does the file compute what the model does? Checker, then onnxruntime with and without its optimizer, on
two shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from qgraph.errors import ExportError
from qgraph.exporters.lowering.records import ActivationRecord
from qgraph.exporters.probe import (
    STRETCH,
    TOLERANCE,
    Probed,
    add_probe_outputs,
    probe,
    relative_difference,
    session_of,
)
from qgraph.exporters.signature import FlatModel, run_eagerly
from qgraph.exporters.skeleton import skeleton
from qgraph.exporters.write import save
from qgraph.modules import ActivationForm

LEVELS = ((True, "ORT_ENABLE_ALL"), (False, "ORT_DISABLE_ALL"))
# onnxruntime fuses DequantizeLinear with its neighbours into kernels that compute something else: MatMulNBits quantizes
# float activations, uint8 x int8 products may saturate. With this setting it computes what the operators say.
QDQ_AS_WRITTEN = {"session.disable_quant_qdq": "1"}
ROUNDING = 1e-3  # more than this is no rounding of float32 sums
CHAIN = 0.5  # a run with flips may differ so much, of the largest output, if its every stretch is proven equal


_OTHER_FORMS = "try target='standard' or leave that layer out with a rule, and report it"
_OTHER_SIZES = "name fewer dimensions in dynamic_shapes, or pass an example of the sizes that the file is for"


@dataclass(frozen=True, slots=True)
class Example:
    """Inputs and torch's answer; `resized` where their sizes are not those that the file was made from."""

    name: str
    tensors: Sequence[Tensor]
    reference: Sequence[Tensor]
    resized: bool = False


def other_values(flat: FlatModel, tensors: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Example]:
    """The example turned round in all its dimensions: there shows what a trace took off its values for good.

    Masks stay, since some leave nothing to attend to when they are turned. None where the model does not take the
    values, or answers in another shape or by no number.
    """
    masks = [tensor.unique().numel() <= 2 for tensor in tensors]
    turned = [t if mask else t.flip(tuple(range(t.dim()))) for t, mask in zip(tensors, masks, strict=True)]
    try:
        answer = run_eagerly(flat, turned)
    except Exception:
        return []
    alike = [value.shape for value in answer] == [value.shape for value in reference]
    finite = all(bool(torch.isfinite(value).all()) for value in answer)
    return [Example("other values", turned, answer)] if alike and finite else []


@dataclass(slots=True)
class Verified:
    """The outcome: largest difference of the outputs, flips, differences by site and module path."""

    max_difference: float = 0.0
    flips: int = 0
    differences: dict[str, float] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class WrongFile(ExportError):
    """The file computes something else.

    `shape_only`: it is right on the example it was made from. `rounding`: so little that rounding may be all there is.
    `line`: of the user's code, where it is known to be the cause.
    """

    def __init__(self, message: str, shape_only: bool, rounding: bool = False, line: str = "") -> None:
        super().__init__(message)
        self.shape_only = shape_only
        self.rounding = rounding
        self.line = line


def check(path: Path) -> None:
    """Run onnx.checker, on all but the content of large weights: it holds a file twice.

    Raises
    ------
    ExportError
        When it finds the file invalid.
    """
    try:
        apart = path.with_name(f"{path.name}.data").exists()
        onnx.checker.check_model(str(path) if apart else skeleton(path), full_check=False)
    except Exception as error:
        raise ExportError(
            f"export: onnx.checker refuses the file: {error}; expected a valid model; please report this"
        ) from error


@dataclass(slots=True)
class Verifier:
    """Compares one saved file with the model; `folder` takes the file with intermediate outputs, made when
    first needed.
    """

    flat: FlatModel
    path: Path
    folder: Path
    model: ir.Model
    records: Sequence[ActivationRecord]
    forms: Mapping[str, ActivationForm]
    layers: Mapping[str, ir.Value]
    progress: Callable[[str], None] = lambda text: None
    rounding_kernels: bool = False  # whether the file has products that round more than float32's own
    settings: Mapping[str, str] = field(default_factory=dict)  # of the session, beyond onnxruntime's own
    _probe_saved: bool = False

    def run(self, examples: Sequence[Example]) -> Verified:
        """Compare all examples at both optimizer levels, then layer by layer on the first.

        Raises
        ------
        WrongFile
            Naming the first layer that differs.
        """
        verified = Verified()
        for optimize, level in LEVELS:
            self.progress(f"running onnxruntime, {level}")
            session = self._session(self.path, optimize)
            for example in examples:
                outputs = self._outputs(session, example)
                difference = worst_difference(example.reference, outputs)
                verified.runs.append(f"{level} on {example.name}")
                if difference > TOLERANCE:
                    difference = self._explain(example, optimize, level, outputs, difference, verified)
                verified.max_difference = max(verified.max_difference, difference)
        if not verified.differences and (self.layers or self.records):
            self.progress("comparing layer by layer")
            found = self._probe(examples[0], optimize=True)
            verified.differences = found.differences
        if self.settings:
            verified.notes.append(self._by_default(examples[0]))
        return verified

    def _by_default(self, example: Example) -> str:
        """What onnxruntime makes of the file without the settings."""
        settings = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        try:
            outputs = self._outputs(session_of(self.path), example)
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            return f"checked with {settings}; onnxruntime's own fusions fail on it: {str(error).splitlines()[0]}"
        difference = worst_difference(example.reference, outputs)
        return f"checked with {settings}; fused as onnxruntime does by default it is {difference:.1e} from torch"

    def _explain(
        self,
        example: Example,
        optimize: bool,
        level: str,
        outputs: Sequence[np.ndarray],
        difference: float,
        verified: Verified,
    ) -> float:
        """A difference beyond the tolerance: rounding ties, or an error."""
        self.progress(f"comparing layer by layer, {level}")
        found = self._probe(example, optimize)
        where = f"onnxruntime ({level}) on {example.name}"
        forced = worst_difference(found.forced, found.outputs)
        if found.first is None and forced > STRETCH:
            found.first = (
                "the outputs",
                f"computed from equal activations, they differ by {forced:.1e} of the largest one",
            )
        if found.first is not None:
            layer, what = found.first
            raise WrongFile(
                f"export: the file does not compute what the model does: {where}, the first layer that "
                f"differs is {layer}: {what}; the outputs "
                f"differ by {difference:.1e}, expected at most {TOLERANCE:.0e} of the largest one; no file "
                f"was written; {_OTHER_SIZES if example.resized else _OTHER_FORMS}",
                shape_only=example.resized,
                rounding=difference < ROUNDING,
            )
        proven = bool(self.records) and not self.rounding_kernels  # quantizer by quantizer
        if proven and not found.flips and difference <= STRETCH:
            verified.differences = verified.differences or found.differences
            return difference
        same_run = worst_difference([torch.from_numpy(o) for o in found.outputs], outputs) <= TOLERANCE
        # What flips do to the outputs, as far as is known: those of the run that is proven stretch by stretch.
        chain = max(CHAIN, 2 * worst_difference(example.reference, found.outputs)) if found.flips else CHAIN
        if not (found.flips if same_run else found.ties and difference < chain):
            raise WrongFile(
                f"export: the file does not compute what the model does: {where}, the outputs differ by "
                f"{difference:.1e} of the largest one, expected "
                f"{TOLERANCE:.0e}, although the {len(found.differences)} layers that were compared one by "
                "one agree; no file was written; try "
                "target='standard', and report it",
                shape_only=example.resized,
                rounding=difference < ROUNDING,
            )
        verified.flips = max(verified.flips, found.flips, 1)
        verified.differences = verified.differences or found.differences
        return max(forced, *found.differences.values(), 0.0)

    def _session(self, path: Path, optimize: bool) -> ort.InferenceSession:
        try:
            return session_of(path, optimize, self.settings)
        except Exception as error:
            raise WrongFile(
                f"export: onnxruntime does not load the file: {error}; expected a model it runs; try "
                "target='standard', and report it",
                False,
            ) from error

    def _outputs(self, session: ort.InferenceSession, example: Example) -> list[np.ndarray]:
        feeds = {n: t.detach().cpu().numpy() for n, t in zip(self.flat.inputs.names, example.tensors, strict=True)}
        feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
        try:
            return session.run(None, feeds)
        except Exception as error:
            raise WrongFile(
                f"export: onnxruntime fails on {example.name}: {error}; expected the shapes that the model "
                "takes; try "
                "dynamic_shapes={} for a static file, and report it",
                shape_only=example.resized,
            ) from error

    def _probe(self, example: Example, optimize: bool) -> Probed:
        path = self.folder / "probe.onnx"
        if not self._probe_saved:
            outputs = list(self.model.graph.outputs)
            add_probe_outputs(self.model, self.records, self.layers)
            save(self.model, path)
            del self.model.graph.outputs[len(outputs) :]
            self._probe_saved = True
        session = self._session(path, optimize)
        return probe(self.flat, example.tensors, session, self.records, self.forms, self.layers)


def worst_difference(expected: Sequence[Tensor], found: Sequence[np.ndarray]) -> float:
    """Largest difference over the largest value of all float outputs; integers and booleans must be equal."""
    pairs = [(e.detach(), torch.from_numpy(np.asarray(f))) for e, f in zip(expected, found, strict=True)]
    worst, largest = 0.0, 0.0
    for e, f in pairs:
        if not e.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(e.cpu(), f.to(e.dtype)) else float("inf"))
            continue
        own = float(e[torch.isfinite(e)].abs().max()) if bool(torch.isfinite(e).any()) else 0.0
        largest = max(largest, own)
        difference = relative_difference(e, f)
        worst = max(worst, difference * own if own else difference)
    return worst / largest if largest else worst
