"""A quantized activation as core ONNX operators: scales computed from the values at hand, then rounded and
dequantized.

The nodes do what `qgraph.ops.fake_quantize` does, step by step, so that both differ by float rounding alone.
What one group is comes from `grouping.py`; one small function per method and scheme follows, chosen by
`CODED` and `LEARNED`. Below 8 bits this gains no speed over 8 in stock onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.config import QuantSpec
from qgraph.errors import ExportError
from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.lowering.grouping import GroupMath, on_groups
from qgraph.modules import ActivationForm
from qgraph.ops import scale_is_mean
from qgraph.ops.codes import absmean_factor, middle
from qgraph.ops.seq import levels_a_side

TINY = float(np.finfo(np.float32).tiny)


def lower_activation(b: GraphBuilder, x: ir.Value, form: ActivationForm, name: str) -> ir.Value:
    """Emit the quantizer of one activation.

    Parameters
    ----------
    b : GraphBuilder
    x : ir.Value
        Any shape of known rank; narrower floats are computed in float32, as torch does.
    form : ActivationForm
        Spec, groups and, for LSQ, the learned step.
    name : str
        Prefix of the node names: the site.

    Returns
    -------
    ir.Value
        The dequantized activation, of the shape and dtype of `x`.
    """
    spec = form.spec
    step = None if form.step is None else form.step.detach().float().cpu().numpy()
    if step is not None and step.size != 1:
        raise ExportError(
            f"{name}: found a learned step per group, shape {step.shape}; an activation is exported with "
            "one step a tensor; "
            "use granularity='tensor' for it"
        )
    wide = x if x.dtype in (None, ir.DataType.FLOAT) else b.cast(x, ir.DataType.FLOAT, name=f"{name}/wide")
    wide.shape = x.shape
    y = on_groups(b, wide, form.groups, name, lambda math, piece: _recipe(math, piece, spec, step))
    if x.dtype not in (None, ir.DataType.FLOAT):
        y = b.cast(y, x.dtype, name=f"{name}/narrow")
    y.type, y.shape = ir.TensorType(x.dtype or ir.DataType.FLOAT), x.shape
    return y


@dataclass(frozen=True, slots=True)
class RowCodes:
    """A dynamic activation as uint8 codes up to `top`: ``scale (code - zero_point) + offset``, both (..., 1)."""

    value: ir.Value
    scale: ir.Value
    offset: ir.Value | None
    zero_point: int
    top: int


def has_row_codes(form: ActivationForm, x: ir.Value) -> bool:
    """Whether `lower_to_codes` takes an activation: one scale a row of its last dimension, found from the values."""
    known = x.shape is not None and len(x.shape) > 1 and x.dtype in (None, ir.DataType.FLOAT)
    whole = form.groups.kind == "token" and form.groups.block is None
    return known and whole and form.fixed is None and (form.spec.method, form.spec.scheme) in CODED


def lower_to_codes(b: GraphBuilder, x: ir.Value, form: ActivationForm, name: str) -> RowCodes:
    """The same quantizer as `lower_activation`, before its result is made of codes, scale and offset."""
    m, spec = GroupMath(b, name, [-1]), form.spec
    coded = CODED[spec.method, spec.scheme](m, x, spec)
    bottom, top = int(spec.levels[0]), int(spec.levels[1] - spec.levels[0])
    q, offset, zero = coded.q, coded.offset, -bottom
    if bottom:
        q = m.add(q, m.scalar(-bottom))
    if offset is not None:  # codes about their middle: less to cancel
        zero = (top + 1) // 2
        centre = m.scalar(zero) if coded.mean is None else m.sub(m.scalar(zero), coded.mean)
        offset = m.add(offset, m.mul(coded.scale, centre))
    codes = b.cast(q, ir.DataType.UINT8, name=f"{name}/codes")
    codes.shape = x.shape
    return RowCodes(codes, coded.scale, offset, zero, top)


@dataclass(frozen=True, slots=True)
class Coded:
    """What a quantizer finds of each group: `offset + scale (q - mean)`; None stands for 0.

    `centred` is ``q - mean`` where it was needed already.
    """

    q: ir.Value
    scale: ir.Value
    offset: ir.Value | None = None
    mean: ir.Value | None = None
    centred: ir.Value | None = None

    def dequantized(self, m: GroupMath) -> ir.Value:
        """The float values."""
        y = m.mul(self.q if self.centred is None else self.centred, self.scale)
        return y if self.offset is None else m.add(self.offset, y)


def ddt_affine(m: GroupMath, x: ir.Value, spec: QuantSpec) -> Coded:
    """`mean x + a (q - mean q)`, a being the ridge regression of x on q."""
    q, _, _ = _affine_codes(m, x, spec)
    mean = m.mean(q)
    centred = m.sub(q, mean)  # its mean is 0, so x need not be centred
    return Coded(q, _slope(m, x, centred, spec), m.mean(x), mean, centred)


def ddt_affine_row(m: GroupMath, x: ir.Value, spec: QuantSpec) -> ir.Value:
    """`ddt_affine` of a short row, dequantized, five nodes fewer: `mean x + n mean(x n)`, n being q normalized.

    With `n = (q - mean q) / sqrt(v + lam)`, v the variance of q, the slope is `mean(x n) / sqrt(v + lam)`.
    """
    q, _, _ = _affine_codes(m, x, spec)
    n = m.normalized(q, spec.lam)
    return m.add(m.mean(x), m.mul(n, m.mean(m.mul(x, n))))


def ddt_linear(m: GroupMath, x: ir.Value, spec: QuantSpec) -> Coded:
    """`a q`, a being the ridge regression of x on q."""
    q = _linear_round(m, m.div(x, _nonzero(m, _linear_scale(m, x, spec))), spec)
    return Coded(q, _slope(m, x, q, spec))


def ste_affine(m: GroupMath, x: ir.Value, spec: QuantSpec) -> Coded:
    """`offset + step q`; the offset is min x, or lies half the levels below the mean."""
    q, scale, low = _affine_codes(m, x, spec)
    return Coded(q, scale, low)


def ste_linear(m: GroupMath, x: ir.Value, spec: QuantSpec) -> Coded:
    """`step q`, 0 for a group of zeros whatever their codes; at 8 bits what MatMulNBits does at accuracy level 4."""
    scale = _linear_scale(m, x, spec)
    return Coded(_linear_round(m, m.div(x, _nonzero(m, scale)), spec), scale)


def lsq_affine(m: GroupMath, x: ir.Value, spec: QuantSpec, step: np.ndarray | None) -> ir.Value:
    """`min x + step q` with a learned step, clipped to the levels."""
    scale = _learned(m, step)
    low = m.min(x)
    q = m.clip(m.round(m.div(m.sub(x, low), scale)), *spec.levels)
    return m.add(low, m.mul(q, scale))


def lsq_linear(m: GroupMath, x: ir.Value, spec: QuantSpec, step: np.ndarray | None) -> ir.Value:
    """`step q` with a learned step, clipped to the levels."""
    scale = _learned(m, step)
    return m.mul(_linear_round(m, m.div(x, scale), spec), scale)


def seq(m: GroupMath, x: ir.Value, spec: QuantSpec, step: np.ndarray | None) -> ir.Value:
    """ParetoQ's levels over a learned range, each `middle` away from its code."""
    size = m.scalar(_size(step))
    f = m.div(x, size)
    if spec.bits == 1:
        return m.where(m.op("GreaterOrEqual", f, m.scalar(0)), size, m.scalar(-_size(step)))
    a_side = levels_a_side(spec)
    shift = m.scalar(middle(spec))
    q = m.clip(m.round(m.add(m.mul(f, m.scalar(a_side)), shift)), *spec.levels)
    return m.mul(m.sub(q, shift), m.scalar(_size(step) / a_side))


CODED: dict[tuple[str, str | None], Callable[[GroupMath, ir.Value, QuantSpec], Coded]] = {
    ("ddt", "affine"): ddt_affine,
    ("ddt", "linear"): ddt_linear,
    ("ste", "affine"): ste_affine,
    ("ste", "linear"): ste_linear,
}
LEARNED: dict[tuple[str, str | None], Callable[[GroupMath, ir.Value, QuantSpec, np.ndarray | None], ir.Value]] = {
    ("lsq", "affine"): lsq_affine,
    ("lsq", "linear"): lsq_linear,
    ("seq", "affine"): seq,
    ("seq", "linear"): seq,
}


def _recipe(m: GroupMath, x: ir.Value, spec: QuantSpec, step: np.ndarray | None) -> ir.Value:
    kind = spec.method, spec.scheme
    if kind in LEARNED:
        return LEARNED[kind](m, x, spec, step)
    if kind == ("ddt", "affine") and m.is_short_row and spec.lam > 0:
        return ddt_affine_row(m, x, spec)
    return CODED[kind](m, x, spec).dequantized(m)


def _affine_codes(m: GroupMath, x: ir.Value, spec: QuantSpec) -> tuple[ir.Value, ir.Value, ir.Value]:
    low = m.min(x)
    above = m.sub(x, low)
    if spec.scale == "minmax":
        scale = _nonzero(m, m.div(m.max(above), m.scalar(spec.levels[1])))
        return m.round(m.div(above, scale)), scale, low
    mean = m.mean(above)
    size = m.mul(m.mean(m.abs(m.sub(above, mean))), m.scalar(absmean_factor(spec)))
    offset = m.sub(m.add(low, mean), m.mul(size, m.scalar(middle(spec))))
    scale = _nonzero(m, size)
    return m.clip(m.round(m.div(m.sub(x, offset), scale)), *spec.levels), scale, offset


def _linear_scale(m: GroupMath, x: ir.Value, spec: QuantSpec) -> ir.Value:
    size = m.abs(x)
    if spec.scale != "minmax":
        return m.mul(m.mean(size), m.scalar(absmean_factor(spec)))
    if scale_is_mean(spec):
        return m.mean(size)
    return m.div(m.max(size), m.scalar(spec.levels[1]))


def _linear_round(m: GroupMath, f: ir.Value, spec: QuantSpec) -> ir.Value:
    if spec.bits == 1:
        return m.where(m.op("GreaterOrEqual", f, m.scalar(0)), m.scalar(1), m.scalar(-1))
    return m.clip(m.round(f), *spec.levels)


def _slope(m: GroupMath, x: ir.Value, q: ir.Value, spec: QuantSpec) -> ir.Value:
    """`mean(x q) / (mean(q q) + lam)`; for affine codes q is centred."""
    ridge = m.add(m.mean(m.mul(q, q)), m.scalar(spec.lam))
    if spec.lam == 0:
        ridge = m.where(m.op("Equal", ridge, m.scalar(0)), m.scalar(1), ridge)
    return m.div(m.mean(m.mul(x, q)), ridge)


def _nonzero(m: GroupMath, scale: ir.Value) -> ir.Value:
    """A constant group has step 0; with the least normal number in its place all its codes are 0 as well."""
    return m.op("Max", scale, m.scalar(TINY))


def _learned(m: GroupMath, step: np.ndarray | None) -> ir.Value:
    return m.scalar(_size(step))


def _size(step: np.ndarray | None) -> float:
    assert step is not None
    return max(abs(float(step.reshape(()))), float(TINY))


def reference(x: np.ndarray, spec: QuantSpec, step: float | None = None) -> np.ndarray:
    """What the recipes compute on one group, in float64 numpy, from ddt.md's formulas."""
    x = x.astype(np.float64)
    low = x.min() if spec.scheme == "affine" else 0.0
    if step is not None and spec.method == "seq":
        scale = abs(step) / levels_a_side(spec)
        low = -middle(spec) * scale
    elif step is not None:
        scale = abs(step)
    elif spec.scale != "minmax":
        centre = x.mean() if spec.scheme == "affine" else 0.0
        scale = np.abs(x - centre).mean() * absmean_factor(spec)
        low = centre - middle(spec) * scale
    elif spec.scheme == "affine":
        scale = (x.max() - low) / spec.levels[1]
    else:
        scale = np.abs(x).mean() if scale_is_mean(spec) else np.abs(x).max() / spec.levels[1]
    f = (x - low) / (scale if scale >= TINY else 1.0)
    q = np.where(f >= 0, 1.0, -1.0) if (spec.bits, spec.scheme) == (1, "linear") else np.clip(np.round(f), *spec.levels)
    if spec.method != "ddt":
        return low + scale * q
    centre_q, centre_x = (q.mean(), x.mean()) if spec.scheme == "affine" else (0.0, 0.0)
    a = ((x - centre_x) * (q - centre_q)).mean() / (((q - centre_q) ** 2).mean() + spec.lam or 1.0)
    return centre_x + a * (q - centre_q)
