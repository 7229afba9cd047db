"""Convolutions whose result nothing but a static quantizer sees: QLinearConv, from codes to codes.

    Activation(static) -> Conv [-> BatchNormalization] [-> Relu, Clip, MaxPool, Flatten, Reshape, Transpose]*
        -> Activation(static)

1. Every value on the way has one use, up to the last, which static quantizers of one range use.
2. The batch norm goes into the scales and the bias.
3. Relu and Clip are what the codes' own ends do; MaxPool and what moves values about work on codes as they are.
4. The bias is an integer in units of `s_x s_w`; narrow codes are stretched over 8 bits to make those small. What is
   rounded away may be `ROUNDED` of the quantizer's range: a value so near to where codes change is a rounding tie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.lowering.integer import (
    Codes,
    Window,
    clip_codes,
    emit_row_scale,
    emit_weight_codes,
    stretch,
    why_not,
)
from qgraph.exporters.packing import PackedWeight
from qgraph.modules import ActivationForm

MOVES = ("MaxPool", "Flatten", "Reshape", "Transpose")  # the order of codes is that of values
ROUNDED = 1e-5
BIAS_LIMIT = 2**30  # room for the sum that it is added to
FINE = 2**24  # steps of the largest bias, for a channel whose weights are all 0


@dataclass(frozen=True, slots=True)
class Affine:
    """A convolution with the batch norm behind it: its last node, and per output `gain * conv(x, w) + bias`."""

    last: ir.Node
    gain: np.ndarray | None
    bias: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Chain:
    """A convolution, the nodes behind it, and the static quantizers at the end, whose form is one."""

    conv: ir.Node
    affine: Affine
    moves: tuple[ir.Node, ...]
    ends: tuple[ir.Node, ...]


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The content of an initializer."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def only_use(value: ir.Value) -> ir.Node | None:
    """The one node that uses a value, where there is just one use and no output of the graph."""
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def affine_of(conv: ir.Node, outputs: int) -> Affine | None:
    """A convolution's bias, and the batch norm that follows; None where one of them is computed at run time."""
    bias: np.ndarray | None = None
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        bias = constant_of(conv.inputs[2])
        if bias is None:
            return None
    norm = only_use(conv.outputs[0])
    if norm is None or norm.op_type != "BatchNormalization" or norm.inputs[0] is not conv.outputs[0]:
        return Affine(conv, None, bias)
    parameters = [constant_of(value) for value in norm.inputs[1:5]]
    if any(p is None or p.shape != (outputs,) for p in parameters) or any(o.uses() for o in norm.outputs[1:]):
        return Affine(conv, None, bias)
    scale, shift, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    gain = scale / np.sqrt(variance + epsilon)
    moved = ((0 if bias is None else bias.astype(np.float64)) - mean) * gain + shift
    return Affine(norm, gain.astype(np.float32), moved.astype(np.float32))


def find_chain(conv: ir.Node, outputs: int, form_of: Callable[[ir.Node], ActivationForm | None]) -> Chain | None:
    """The chain that begins at a convolution.

    Parameters
    ----------
    form_of : callable
        Node -> its `ActivationForm` where it is a static quantizer, else None.
    """
    affine = affine_of(conv, outputs)
    if affine is None:
        return None
    moves: list[ir.Node] = []
    value = affine.last.outputs[0]
    while True:
        if value.is_graph_output():
            return None
        users = list(dict.fromkeys(node for node, _ in value.uses()))
        forms = [form for form in map(form_of, users) if form is not None]
        if forms and len(forms) == len(users):
            same = all((f.spec, f.fixed) == (forms[0].spec, forms[0].fixed) for f in forms)
            fits = same and all(_is_end(node, forms[0]) for node in moves if node.op_type not in MOVES)
            return Chain(conv, affine, tuple(moves), tuple(users)) if fits else None
        node = only_use(value)
        if node is None or node.inputs[0] is not value or node.op_type not in (*MOVES, "Relu", "Clip"):
            return None
        if any(output.uses() for output in node.outputs[1:]):
            return None
        moves.append(node)
        value = node.outputs[0]


def _is_end(node: ir.Node, form: ActivationForm) -> bool:
    """Whether a Relu or Clip changes nothing that the codes' own ends do not."""
    assert form.fixed is not None
    bottom, top = form.spec.levels
    low, high = np.float32(0), np.float32(np.inf)
    if node.op_type == "Clip":
        bounds = [constant_of(v) for v in node.inputs[1:]] + [None, None]
        if any(v is not None and constant_of(v) is None for v in node.inputs[1:]):
            return False
        low = np.float32(-np.inf) if bounds[0] is None else np.float32(bounds[0])
        high = np.float32(np.inf) if bounds[1] is None else np.float32(bounds[1])
    step = np.float32(form.fixed.step)
    places = [np.round(end / step) + form.fixed.zero_point for end in (low, high)]
    return bool(places[0] <= bottom and places[1] >= top)


def why_no_chain(packed: PackedWeight, x: Codes) -> str | None:
    """Why QLinearConv does not take this weight."""
    if packed.spec is not None and packed.spec.scheme == "affine":
        return "QLinearConv takes no float zero points"
    return why_not(packed, 0, x.top)


def emit_chain(
    b: GraphBuilder, chain: Chain, x: Codes, packed: PackedWeight, form: ActivationForm, window: Window, name: str
) -> tuple[Codes, float] | str:
    """Emit QLinearConv and what follows it.

    Returns
    -------
    tuple or str
        The codes at the end, and by how many of them the rounded bias may move a value; or why it cannot be done.
    """
    assert form.fixed is not None
    bottom, top = form.spec.levels
    outputs = packed.shape[0]
    gain, bias = chain.affine.gain, chain.affine.bias
    factor = stretch(packed, x.top)
    gain = (np.ones(1, np.float32) if gain is None else gain) / np.float32(factor)
    unit, spared = _units(packed, gain, bias, x.scale)
    steps = np.zeros(outputs) if bias is None else np.round(bias.astype(np.float64) / unit)
    if not np.all(np.abs(steps) < BIAS_LIMIT):
        return "its bias is beyond 30 bits"
    slack = 0.0 if bias is None else float(np.abs(bias - steps * unit).max()) / form.fixed.step
    if slack > ROUNDED * (top - bottom):
        return f"its bias as an integer is {slack / (top - bottom):.0e} of the next range off, more than {ROUNDED:.0e}"
    codes, zero = emit_weight_codes(b, packed, name, x.top, factor)
    scale = emit_row_scale(b, packed, name, None if factor == 1 and chain.affine.gain is None else gain)
    if spared:
        scale = b.constant((unit / x.scale).astype(np.float32), "scale")
    y_zero = form.fixed.zero_point - bottom
    y = b.op(
        "QLinearConv",
        [
            x.value,
            b.constant(np.asarray(x.scale, np.float32), "scalar"),
            b.constant(np.asarray(x.zero_point, np.uint8), "byte"),
            codes,
            scale,
            zero,
            b.constant(np.asarray(form.fixed.step, np.float32), "scalar"),
            b.constant(np.asarray(y_zero, np.uint8), "byte"),
            None if bias is None else b.constant(steps.astype(np.int32), "bias"),
        ],
        window.attributes(),
        name=f"{name}/QLinearConv",
        dtype=ir.DataType.UINT8,
    )
    y.shape = chain.affine.last.outputs[0].shape
    y = clip_codes(b, y, top - bottom, name)
    for node in chain.moves:
        if node.op_type in MOVES:
            attributes = {key: attr.value for key, attr in node.attributes.items()}
            y = b.op(node.op_type, [y, *node.inputs[1:]], attributes, name=f"{name}/{node.op_type}")
            y.type, y.shape = ir.TensorType(ir.DataType.UINT8), node.outputs[0].shape
    return Codes(y, form.fixed.scale, y_zero, top - bottom), slack


def _units(packed: PackedWeight, gain: np.ndarray, bias: np.ndarray | None, x_scale: float) -> tuple[np.ndarray, bool]:
    """What one step of the sum is worth, by output, and whether some is made up: where all weights are 0."""
    scale = np.asarray(packed.arrays["scale"], np.float32).reshape(-1) * gain
    unit = np.broadcast_to(scale, packed.shape[:1]).astype(np.float64) * x_scale
    spare = np.ones_like(unit) if bias is None else np.maximum(np.abs(bias.astype(np.float64)), 1e-30) / FINE
    return np.where(unit == 0, spare, unit), bool((unit == 0).any())
