"""Products of an activation's codes with a packed weight, in integers: Linear, matmul and convolution.

Codes of a static activation are uint8 here whatever its scheme, u = code - lowest level, so with a zero point z:

    x = s_x (u - z)        y = s_x s_w (sum_k (u - z) w)        w = code - c, c the middle of the levels

and, where the weight's zero point is a float, plus `s_x s_w (c - z_w) sum_k (u - z)`. A weight is int8 where that is
exact. onnxruntime's uint8 x int8 kernels for AVX2 without VNNI add pairs of products in 16 bits, with saturation: where
two neighbours can exceed that, the weight is uint8 about 128, which is exact everywhere and slower.

A convolution is a product with the windows of its input laid out as rows (`emit_windows`), or QLinearConv where nothing
but a static quantizer sees its result (`chains.py`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering.activation import RowCodes
from qgraph.exporters.lowering.builder import MICROSOFT, GraphBuilder
from qgraph.exporters.packing import PackedWeight, emit_codes, emit_scale, emit_zero_point
from qgraph.exporters.packing.emit import group_runs
from qgraph.modules import ActivationForm

SMALLEST, SMALLEST_CONV = 4096, 256  # below this many weights a float product is as fast
SATURATION = 2**15 - 1
BYTE_MIDDLE = 128
MIN_WINDOW, MIN_CHANNELS = 512, 64  # values a window and output channels from which laying windows out pays


@dataclass(frozen=True, slots=True)
class Codes:
    """A static activation as codes up to `top`, uint8 for integer products; it is `scale * (code - zero_point)`."""

    value: ir.Value
    scale: float
    zero_point: int
    top: int


def emit_quantize(b: GraphBuilder, x: ir.Value, form: ActivationForm, name: str) -> Codes:
    """QuantizeLinear, and Clip below 8 bits."""
    assert form.fixed is not None
    bottom, top = form.spec.levels
    zero = form.fixed.zero_point - bottom
    wide = x if x.dtype in (None, ir.DataType.FLOAT) else b.cast(x, ir.DataType.FLOAT, name=f"{name}/wide")
    step = b.constant(np.asarray(form.fixed.step, np.float32), "scalar")
    y = b.op("QuantizeLinear", [wide, step, _byte(b, zero)], name=f"{name}/QuantizeLinear", dtype=ir.DataType.UINT8)
    y = clip_codes(b, y, top - bottom, name)
    y.shape = x.shape
    return Codes(y, form.fixed.scale, zero, top - bottom)


def clip_codes(b: GraphBuilder, codes: ir.Value, top: int, name: str) -> ir.Value:
    """Codes below 8 bits end at `top`; uint8 itself ends at 255."""
    if top == np.iinfo(np.uint8).max:
        return codes
    return b.op("Clip", [codes, _byte(b, 0), _byte(b, top)], name=f"{name}/Clip", dtype=ir.DataType.UINT8)


def emit_dequantize(b: GraphBuilder, codes: Codes, like: ir.Value, name: str) -> ir.Value:
    """The float value of codes. Not DequantizeLinear: beside it onnxruntime would quantize float weights on its own."""
    y = b.cast(codes.value, ir.DataType.FLOAT, name=f"{name}/Cast")
    if codes.zero_point:
        zero = b.constant(np.asarray(codes.zero_point, np.float32), "scalar")
        y = b.op("Sub", [y, zero], name=f"{name}/Sub")
    y = b.op("Mul", [y, b.constant(np.asarray(codes.scale, np.float32), "scalar")], name=f"{name}/Mul")
    if like.dtype not in (None, ir.DataType.FLOAT):
        y = b.cast(y, like.dtype, name=f"{name}/narrow")
    y.type, y.shape = ir.TensorType(like.dtype or ir.DataType.FLOAT), like.shape
    return y


def why_not(packed: PackedWeight, axis: int, top: int) -> str | None:
    """Why a weight with its outputs along `axis` cannot be multiplied in integers, or None."""
    if packed.spec is None:
        return "pruned float weight"
    groups = packed.groups
    if groups.kind != "tensor" and (groups.kind != "channel" or groups.axis % len(packed.shape) != axis):
        return "groups do not run along the contracted dimension"
    if group_runs(packed)[0] > 1:
        return f"one scale a channel is what integer products take, found groups of {groups.block}"
    least = SMALLEST if len(packed.shape) == 2 else SMALLEST_CONV
    if packed.numel < least:
        return f"small (below {least} weights)"
    if packed.numel // packed.shape[axis] * top * BYTE_MIDDLE >= 2**31:
        return "the sum of so many products may exceed 32 bits"
    return None


def middle(packed: PackedWeight) -> int:
    """What is taken off a level so that codes lie about 0."""
    assert packed.spec is not None
    return 2 ** (int(packed.spec.bits) - 1) if packed.spec.scheme == "affine" else 0


def is_signed(packed: PackedWeight, top: int) -> bool:
    """Whether int8 codes are exact in every kernel: two neighbouring products fit 16 bits."""
    c = middle(packed)
    return 2 * top * max(abs(level - c) for level in packed.levels) <= SATURATION


def stretch(packed: PackedWeight, top: int) -> int:
    """The largest factor by which linear codes stay exact int8: a finer unit for an integer bias."""
    largest = max(abs(level) for level in packed.levels)
    return max(1, min(SATURATION // (2 * top * largest), np.iinfo(np.int8).max // largest))


def emit_weight_codes(
    b: GraphBuilder, packed: PackedWeight, name: str, top: int, factor: int = 1
) -> tuple[ir.Value, ir.Value]:
    """The integer weight in its own shape, int8 about 0 or uint8 about 128, and its zero point, a scalar."""
    signed = is_signed(packed, top)
    kind = ir.DataType.INT8 if signed else ir.DataType.UINT8
    shift = -middle(packed) + (0 if signed else BYTE_MIDDLE)
    codes = emit_codes(b, packed, name, kind, shift)
    if factor > 1:
        codes = b.op("Mul", [codes, b.constant(np.asarray(factor, np.int8), "factor")], name=f"{name}/stretch")
    zero = np.asarray(0, np.int8) if signed else np.asarray(BYTE_MIDDLE, np.uint8)
    return codes, b.constant(zero, "zero")


def emit_matrix(b: GraphBuilder, codes: ir.Value, packed: PackedWeight, axis: int, name: str) -> ir.Value:
    """Codes as (values a window, outputs): the windows' order is that of `emit_windows`."""
    rank = len(packed.shape)
    order = [*range(2, rank), 1, 0] if rank > 2 else [1 - axis, axis]
    if order != list(range(rank)):
        codes = b.op("Transpose", [codes], {"perm": order}, name=f"{name}/matrix")
    return codes if rank == 2 else b.reshape(codes, [-1, packed.shape[0]], name=f"{name}/matrix")


def emit_row_scale(b: GraphBuilder, packed: PackedWeight, name: str, gain: np.ndarray | None = None) -> ir.Value:
    """Scales of the outputs, (outputs,) or (1,), times `gain`."""
    scale = b.reshape(emit_scale(b, packed, name), [-1], name=f"{name}/scale")
    if gain is None:
        return scale
    return b.op("Mul", [scale, b.constant(gain.astype(np.float32), "gain")], name=f"{name}/scale")


def emit_product(
    b: GraphBuilder,
    x: Codes,
    packed: PackedWeight,
    axis: int,
    name: str,
    bias: ir.Value | None,
    gain: np.ndarray | None,
    microsoft: bool,
) -> ir.Value:
    """The product of rows of codes, (..., values), with the weight; float32 (..., outputs).

    Parameters
    ----------
    bias : ir.Value, shape (outputs,), optional
    gain : ndarray, shape (outputs,), optional
        A further factor of each output.
    microsoft : bool
        Use MatMulIntegerToFloat, one pass over the result, in place of MatMulInteger, Cast, Mul and Add.
    """
    codes, zero = emit_weight_codes(b, packed, name, x.top)
    matrix = emit_matrix(b, codes, packed, axis, name)
    scale = emit_row_scale(b, packed, name, gain)
    x_scale = b.constant(np.asarray(x.scale, np.float32), "scalar")
    x_zero = _byte(b, x.zero_point)
    has_zeros = packed.spec is not None and packed.spec.scheme == "affine"
    if microsoft:
        inputs = [x.value, matrix, x_scale, scale, x_zero, zero, bias]
        y = b.op("MatMulIntegerToFloat", inputs, name=f"{name}/MatMulIntegerToFloat", domain=MICROSOFT)
    else:
        y = b.op("MatMulInteger", [x.value, matrix, x_zero, zero], name=f"{name}/MatMulInteger")
        y = b.cast(y, ir.DataType.FLOAT, name=f"{name}/sum")
        y = b.op("Mul", [y, b.op("Mul", [scale, x_scale], name=f"{name}/scale")], name=f"{name}/scaled")
        if bias is not None:
            y = b.op("Add", [y, bias], name=f"{name}/bias")
    return _corrected(b, y, x, packed, axis, scale, name) if has_zeros else y


def _corrected(
    b: GraphBuilder, y: ir.Value, x: Codes, packed: PackedWeight, axis: int, scale: ir.Value, name: str
) -> ir.Value:
    """Plus `s_x s_w (c - z_w)` times the sum of a row, which a column of ones gives."""
    sums = _row_sums(b, x.value, _byte(b, x.zero_point), packed, axis, name)
    factor = _shift(b, packed, scale, name)
    factor = b.op("Mul", [factor, b.constant(np.asarray(x.scale, np.float32), "scalar")], name=f"{name}/shift")
    return b.op("Add", [y, b.op("Mul", [sums, factor], name=f"{name}/correction")], name=f"{name}/corrected")


def emit_row_product(
    b: GraphBuilder, x: RowCodes, packed: PackedWeight, axis: int, name: str, bias: ir.Value | None
) -> ir.Value:
    """The product of rows with a scale and an offset of their own, (..., values), with the weight.

    With weight w_jk = s_j (C_jk + d_j) of whole C, and x_k = a u_k + o of whole u:

        y_j = a s_j sum_k u_k C_jk  +  a (sum_k u_k) s_j d_j  +  o sum_k w_jk

    Parameters
    ----------
    bias : ir.Value, shape (outputs,), optional
    """
    codes, zero = emit_weight_codes(b, packed, name, x.top)
    matrix = emit_matrix(b, codes, packed, axis, name)
    scale, x_zero = emit_row_scale(b, packed, name), _byte(b, x.zero_point)
    shift = _shift(b, packed, scale, name) if packed.spec is not None and packed.spec.scheme == "affine" else None
    y = b.op("MatMulInteger", [x.value, matrix, x_zero, zero], name=f"{name}/MatMulInteger")
    y = b.op("Mul", [b.cast(y, ir.DataType.FLOAT, name=f"{name}/sum"), x.scale], name=f"{name}/scaled")
    y = b.op("Mul", [y, scale], name=f"{name}/scaled")
    if shift is not None:
        sums = b.op("Mul", [_row_sums(b, x.value, x_zero, packed, axis, name), x.scale], name=f"{name}/sums")
        y = b.op("Add", [y, b.op("Mul", [sums, shift], name=f"{name}/correction")], name=f"{name}/corrected")
    if x.offset is not None:
        columns = _column_sums(b, matrix, zero, packed, axis, scale, shift, name)
        y = b.op("Add", [y, b.op("Mul", [x.offset, columns], name=f"{name}/offset")], name=f"{name}/corrected")
    return y if bias is None else b.op("Add", [y, bias], name=f"{name}/bias")


def _shift(b: GraphBuilder, packed: PackedWeight, scale: ir.Value, name: str) -> ir.Value:
    """`s_w (c - z_w)`: what each value of a weight is beyond `s_w` times its whole code."""
    zero = b.reshape(emit_zero_point(b, packed, name), [-1], name=f"{name}/shift")
    shift = b.op("Sub", [b.constant(np.asarray(middle(packed), np.float32), "scalar"), zero], name=f"{name}/shift")
    return b.op("Mul", [shift, scale], name=f"{name}/shift")


def _row_sums(b: GraphBuilder, codes: ir.Value, zero: ir.Value, packed: PackedWeight, axis: int, name: str) -> ir.Value:
    """Sums of rows of codes less their zero point, float32 (..., 1): a product with a column of ones."""
    ones = b.constant(np.ones((packed.numel // packed.shape[axis], 1), np.int8), "ones")
    sums = b.op("MatMulInteger", [codes, ones, zero], name=f"{name}/sums")
    return b.cast(sums, ir.DataType.FLOAT, name=f"{name}/sums")


def _column_sums(
    b: GraphBuilder,
    matrix: ir.Value,
    zero: ir.Value,
    packed: PackedWeight,
    axis: int,
    scale: ir.Value,
    shift: ir.Value | None,
    name: str,
) -> ir.Value:
    """Sums of the weight over what is contracted, (outputs,): known when the file is loaded."""
    length = b.constant(np.asarray(packed.numel // packed.shape[axis], np.float32), "scalar")
    whole = [b.cast(value, ir.DataType.FLOAT, name=f"{name}/columns") for value in (matrix, zero)]
    total = b.op("Sub", whole, name=f"{name}/columns")
    total = b.op("ReduceSum", [total, b.ints([0])], {"keepdims": 0}, name=f"{name}/columns")
    total = b.op("Mul", [total, scale], name=f"{name}/columns")
    if shift is None:
        return total
    return b.op("Add", [total, b.op("Mul", [shift, length], name=f"{name}/columns")], name=f"{name}/columns")


@dataclass(frozen=True, slots=True)
class Window:
    """The geometry of a convolution over its spatial dimensions."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]  # begins, then ends
    dilations: tuple[int, ...]
    group: int

    @staticmethod
    def of(node: ir.Node, weight_shape: tuple[int, ...]) -> Window | None:
        """That of a Conv node; None where its padding depends on the input's size."""
        kernel = tuple(weight_shape[2:])
        found = {key: node.attributes[key] for key in node.attributes}
        if "auto_pad" in found and found["auto_pad"].as_string() not in ("NOTSET", "VALID"):
            return None

        def ints(key: str, default: int, count: int) -> tuple[int, ...]:
            return tuple(found[key].as_ints()) if key in found else (default,) * count

        rank = len(kernel)
        group = found["group"].as_int() if "group" in found else 1
        return Window(kernel, ints("strides", 1, rank), ints("pads", 0, 2 * rank), ints("dilations", 1, rank), group)

    def attributes(self) -> dict[str, object]:
        """As Conv and QLinearConv take them."""
        return {
            "kernel_shape": list(self.kernel),
            "strides": list(self.strides),
            "pads": list(self.pads),
            "dilations": list(self.dilations),
            "group": self.group,
        }


def emit_windows(b: GraphBuilder, x: Codes, window: Window, name: str) -> ir.Value:
    """Codes (batch, channels, *sizes) -> (batch, *output sizes, window * channels): place by place, then channels."""
    rank = len(window.kernel)
    last = [0, *range(2, rank + 2), 1]
    y = b.op("Transpose", [x.value], {"perm": last}, name=f"{name}/rows")
    if any(window.pads):
        pads = [0, *window.pads[:rank], 0, 0, *window.pads[rank:], 0]
        y = b.op("Pad", [y, b.ints(pads), _byte(b, x.zero_point)], name=f"{name}/pad")
    if math.prod(window.kernel) == 1 and all(stride == 1 for stride in window.strides):
        return y
    axes, steps = b.ints(range(1, rank + 1)), b.ints(window.strides)
    parts = []
    for place in itertools.product(*map(range, window.kernel)):
        starts = [i * d for i, d in zip(place, window.dilations, strict=True)]
        left = [(k - 1 - i) * d for k, i, d in zip(window.kernel, place, window.dilations, strict=True)]
        ends = [-size if size else np.iinfo(np.int64).max for size in left]
        parts.append(b.op("Slice", [y, b.ints(starts), b.ints(ends), axes, steps], name=f"{name}/window"))
    return parts[0] if len(parts) == 1 else b.op("Concat", parts, {"axis": rank + 1}, name=f"{name}/windows")


def emit_convolution(
    b: GraphBuilder,
    x: Codes,
    packed: PackedWeight,
    window: Window,
    name: str,
    bias: ir.Value | None,
    gain: np.ndarray | None,
    microsoft: bool,
) -> ir.Value:
    """A convolution as a product with its windows; float32 (batch, outputs, *sizes)."""
    rows = Codes(emit_windows(b, x, window, name), x.scale, x.zero_point, x.top)
    y = emit_product(b, rows, packed, 0, name, bias, gain, microsoft)
    rank = len(window.kernel)
    return b.op("Transpose", [y], {"perm": [0, rank + 1, *range(1, rank + 1)]}, name=f"{name}/channels")


def why_no_windows(packed: PackedWeight, window: Window) -> str | None:
    """Why a convolution is not worth laying out, or cannot be."""
    if window.group != 1:
        return "a grouped convolution whose result something else than a static quantizer sees"
    values, outputs = packed.numel // packed.shape[0], packed.shape[0]
    least = MIN_WINDOW if math.prod(window.kernel) > 1 else MIN_CHANNELS
    if values < least or outputs < MIN_CHANNELS:
        return f"few channels: below {least} values a window or {MIN_CHANNELS} outputs the float kernel is as fast"
    return None


def _byte(b: GraphBuilder, value: int) -> ir.Value:
    return b.constant(np.asarray(value, np.uint8), "byte")


def reference(
    x: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, x_scale: float, x_zero: int
) -> np.ndarray:
    """What `emit_product` computes, in float64: x (rows, values), codes (outputs, values), scale, zero (outputs,)."""
    weight = scale[:, None] * (codes.astype(np.float64) - zero[:, None])
    return x_scale * (x.astype(np.float64) - x_zero) @ weight.T
