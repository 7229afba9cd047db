"""Weights and static activations as QuantizeLinear and DequantizeLinear, for toolchains that read those.

A weight is an initializer of int2, int4, int8 or their unsigned kin, one DequantizeLinear behind it: per tensor, per
channel, or blocked along the contracted dimensions. Float zero points have no place in DequantizeLinear; they are an
addition behind it:

    s (q - z) = DequantizeLinear(q, s, c) + s (c - z)        c the middle of the levels

Source: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from qgraph.config import QuantSpec
from qgraph.errors import ExportError
from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.lowering.integer import Codes, middle
from qgraph.exporters.packing import PackedWeight, emit_scale, emit_zero_point, unpack
from qgraph.exporters.packing.emit import group_runs, spread_groups, to_shape
from qgraph.modules import ActivationForm
from qgraph.ops import Groups, Quantized

FORMAT = "qdq"
FOUR_BITS, TWO_BITS = 21, 25  # opsets with such types; blocks came with the former
TWO_BITS_IR = 13


@dataclass(frozen=True, slots=True)
class Container:
    """An integer type of ONNX."""

    bits: int
    signed: bool

    @property
    def dtype(self) -> np.dtype:
        """In numpy."""
        return ir.DataType[str(self).upper()].numpy()

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"


def container_for(packed: PackedWeight, opset: int) -> Container:
    """The narrowest type of an opset that holds a weight's levels."""
    low, high = packed.levels
    widths = [bits for bits, since in ((2, TWO_BITS), (4, FOUR_BITS), (8, 0)) if opset >= since]
    signed = low < 0
    for bits in widths:
        ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        if ends[0] <= low and high <= ends[1]:
            return Container(bits, signed)
    raise ValueError(f"levels {low}..{high} do not fit 8 bits")


@dataclass(frozen=True, slots=True)
class Emitted:
    """A weight in this form: its float value, a description, what to say of it, and the bytes that it takes."""

    value: ir.Value
    form: str
    notes: tuple[str, ...]
    nbytes: int


def emit_weight(b: GraphBuilder, packed: PackedWeight, name: str) -> Emitted:
    """The float32 weight in its own shape, from `<name>.packed`, `<name>.scale` and `<name>.zero_point`.

    Raises
    ------
    ExportError
        For a pruned weight that is not quantized, and for blocks in an opset without them.
    """
    if packed.spec is None:
        raise ExportError(
            f"export of '{name}' with target='qdq': found a pruned weight that is not quantized, expected codes; give "
            f"it bits, leave it float with a rule, or take target='standard'"
        )
    count, size = group_runs(packed)
    if count > 1 and b.opset < FOUR_BITS:
        raise ExportError(
            f"export of '{name}' with target='qdq': found blocks of {size} at opset {b.opset}, expected opset "
            f"{FOUR_BITS} or later, where DequantizeLinear takes them; leave opset out, or take @channel"
        )
    kind = container_for(packed, b.opset)
    quantized = unpack(packed)
    assert quantized.codes is not None
    codes = quantized.codes.numpy()
    if count > 1:  # blocks run along the contracted dimensions, one after the other
        codes = packed.groups.sparsity_rows().to_rows(quantized.codes).numpy()
    stored = b.initializer(f"{name}.packed", codes.astype(kind.dtype))
    scale = emit_scale(b, packed, name)
    node = f"{name}.unpack"
    axis, flat = _axis(packed), count > 1
    if not flat:
        scale = b.reshape(scale, [] if axis is None else [-1], name=node)
    attributes = {} if axis is None else {"axis": 1 if flat else axis, **({"block_size": size} if flat else {})}
    centre = middle(packed)
    inputs = [stored, scale]
    if centre:
        shape = packed.arrays["scale"].shape if flat else (() if axis is None else (-1,))
        zeros = np.full(packed.arrays["scale"].shape, centre).reshape(shape).astype(kind.dtype)
        inputs.append(b.constant(zeros, "zero"))
    value = b.op("DequantizeLinear", inputs, attributes, name=f"{name}/DequantizeLinear", dtype=ir.DataType.FLOAT)
    notes: tuple[str, ...] = ()
    if "zero_point" in packed.arrays:
        value = b.op("Add", [value, _shift(b, packed, name)], name=f"{name}/shift")
        notes = ("its float zero points are an Add behind DequantizeLinear",)
    if flat:
        value = to_shape(b, packed, value, name)
    value.shape, value.type = ir.Shape(packed.shape), ir.TensorType(ir.DataType.FLOAT)
    extra = sum(array.nbytes for key, array in packed.arrays.items() if key in ("scale", "zero_point"))
    grouping = f"blocks of {size}" if flat else ("per tensor" if axis is None else "per channel")
    return Emitted(value, f"DequantizeLinear {kind} {grouping}", notes, -(-codes.size * kind.bits // 8) + extra)


def _axis(packed: PackedWeight) -> int | None:
    """The dimension of the scales; None for one scale."""
    if packed.arrays["scale"].size == 1 and packed.groups.kind == "tensor":
        return None
    rank = len(packed.shape)
    return rank - 1 if packed.groups.kind == "token" else packed.groups.axis % rank


def _shift(b: GraphBuilder, packed: PackedWeight, name: str) -> ir.Value:
    """`s (c - z)` in a shape that meets the dequantized codes."""
    node = f"{name}.unpack"
    c = b.constant(np.asarray(middle(packed), np.float32), "scalar")
    shift = b.op(
        "Mul", [emit_scale(b, packed, name), b.op("Sub", [c, emit_zero_point(b, packed, name)], name=node)], name=node
    )
    count, size = group_runs(packed)
    if count > 1:
        rows, columns = packed.rows
        return spread_groups(b, shift, (rows, count, size), columns, node)
    axis = _axis(packed)
    return b.reshape(shift, [-1 if i == axis else 1 for i in range(len(packed.shape))], name=node)


def emit_activation(b: GraphBuilder, x: ir.Value, form: ActivationForm, name: str) -> tuple[ir.Value, Codes]:
    """QuantizeLinear and DequantizeLinear of a static activation: the float value, and the codes between them."""
    assert form.fixed is not None
    bottom, top = form.spec.levels
    kind = np.int8 if bottom < 0 else np.uint8
    ends = np.iinfo(kind)
    wide = x if x.dtype in (None, ir.DataType.FLOAT) else b.cast(x, ir.DataType.FLOAT, name=f"{name}/wide")
    zero = b.constant(np.asarray(form.fixed.zero_point, kind), "zero")
    step, scale = (b.constant(np.asarray(v, np.float32), "scalar") for v in (form.fixed.step, form.fixed.scale))
    dtype = ir.DataType.from_numpy(np.dtype(kind))
    codes = b.op("QuantizeLinear", [wide, step, zero], name=f"{name}/QuantizeLinear", dtype=dtype)
    if (bottom, top) != (ends.min, ends.max):
        limits = [b.constant(np.asarray(level, kind), "level") for level in (bottom, top)]
        codes = b.op("Clip", [codes, *limits], name=f"{name}/Clip", dtype=dtype)
    codes.shape = x.shape
    y = b.op("DequantizeLinear", [codes, scale, zero], name=f"{name}/DequantizeLinear", dtype=ir.DataType.FLOAT)
    y.shape = x.shape
    if x.dtype not in (None, ir.DataType.FLOAT):
        y = b.cast(y, x.dtype, name=f"{name}/narrow")
        y.shape = x.shape
    return y, Codes(codes, form.fixed.scale, form.fixed.zero_point, top)


def read(
    shape: tuple[int, ...], groups: Groups, spec: QuantSpec | None, sparse: bool, arrays: dict[str, np.ndarray]
) -> Quantized:
    """A weight from the arrays of a file in this form.

    Raises
    ------
    ValueError
        When they do not go together.
    """
    codes = torch.from_numpy(arrays["packed"].astype(np.int16))
    if codes.numel() != int(np.prod(shape)):
        raise ValueError(f"found {codes.numel()} codes for shape {shape}")
    if tuple(codes.shape) != shape:
        codes = groups.sparsity_rows().from_rows(codes, shape)
    scale = torch.from_numpy(arrays["scale"].astype(np.float32))
    if tuple(scale.shape) != groups.shape(shape):
        raise ValueError(f"found scales of shape {tuple(scale.shape)}; expected {groups.shape(shape)}")
    zero = torch.from_numpy(arrays["zero_point"].copy()) if "zero_point" in arrays else None
    return Quantized(codes, scale, zero, groups, spec, sparse)
