"""Products with a packed weight matrix by com.microsoft::MatMulNBits, where that is faithful to what was
trained.

onnxruntime has an exact kernel for float activations at 4 bits, and kernels for 2, 4 and 8 bits that
quantize activations inside: symmetric int8 per token and block, which is what the `A8@B` activation
quantizer trains. Float zero points would make it unpack the weight at each call, so they are a correction by
sums over blocks, c being the middle of the codes:

    x W~^T = sum_g s_g (q_g - z_g) . x_g = MatMulNBits(x; s, q - c) + blocksum(x) (s (c - z))^T

The int8 kernel is given activations that are quantized already, which it then finds to be so and takes as
they are. Where its weight is not folded (no optimizer) onnxruntime falls back to a float product, which is
then the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qgraph.config import QuantSpec
from qgraph.exporters.lowering.builder import MICROSOFT, GraphBuilder
from qgraph.exporters.packing import PackedWeight, emit_nbits, emit_scale, emit_zero_point, nbits_for, rows_of
from qgraph.exporters.packing.dense import Bits
from qgraph.modules import ActivationForm
from qgraph.ops import Groups

KERNEL_BLOCKS = (32, 64, 128)  # 2 bits at accuracy level 4 has kernels for these alone; 16 and 256 are slow
SMALLEST = 4096  # below this many weights a plain MatMul is as fast, and its nodes are fewer bytes
EXACT, INT8 = 0, 4  # accuracy_level: float activations; symmetric int8 activations per token and block


@dataclass(frozen=True, slots=True)
class Kernel:
    """A MatMulNBits form: field width and block of the run-time weight, and what the kernel does to
    activations.
    """

    bits: int
    block: int
    accuracy: int

    def __str__(self) -> str:
        inside = "int8 activations inside" if self.accuracy == INT8 else "float activations"
        return f"MatMulNBits {self.bits}-bit block {self.block}, {inside}"


def choose_kernel(packed: PackedWeight, axis: int, activation: ActivationForm | None) -> Kernel | str:
    """The kernel for a weight whose output channels lie along `axis`, or why there is none.

    Parameters
    ----------
    packed : PackedWeight
        Of a matrix.
    axis : int
        0 for ``x @ w.T``, 1 for ``x @ w``.
    activation : ActivationForm, optional
        The quantizer of the other operand.
    """
    if packed.spec is None:
        return "pruned float weight"
    bits = nbits_for(packed)
    if not _rows_are_outputs(packed.groups, axis):
        return "groups do not run along the contracted dimension"
    outputs, inputs = packed.shape[axis], packed.shape[1 - axis]
    if outputs * inputs < SMALLEST:
        return f"small (below {SMALLEST} weights)"
    if activation is not None and kernel_quantizes(activation.spec):
        block = activation.groups.block
        if block in KERNEL_BLOCKS and _divides(block, packed.groups, inputs):
            return Kernel(bits, block, INT8)
    if bits > 4:
        return "no exact kernel for codes above 4 bits and float activations"
    block = next(
        (n for n in reversed(KERNEL_BLOCKS) if n <= max(inputs, 32) and _divides(n, packed.groups, inputs)),
        None,
    )
    if block is None:
        return f"groups of {packed.groups.block} are no multiple of {KERNEL_BLOCKS[0]}"
    return Kernel(4, block, EXACT)


def kernel_quantizes(spec: QuantSpec) -> bool:
    """Whether MatMulNBits at accuracy level 4 computes exactly this activation quantizer."""
    return (spec.bits, spec.scheme, spec.granularity, spec.method, spec.scale) == (
        8,
        "linear",
        "block",
        "ste",
        "minmax",
    )


def emit_kernel(
    b: GraphBuilder,
    packed: PackedWeight,
    axis: int,
    kernel: Kernel,
    x: ir.Value,
    sums: ir.Value | None,
    name: str,
) -> ir.Value:
    """The product of x, shape (..., inputs), with the weight; see `choose_kernel` for `axis`.

    Parameters
    ----------
    sums : ir.Value, optional
        `block_sums` of what the kernel takes x for; needed where the weight has zero points.
    """
    outputs, inputs = packed.shape[axis], packed.shape[1 - axis]
    codes, scales, *gain = rows_of(b, packed, name, kernel, lambda p, name: _constants(b, p, kernel, name))
    attrs = {"K": inputs, "N": outputs, "bits": kernel.bits, "block_size": kernel.block}
    if kernel.accuracy != EXACT:  # which is what leaving it out means
        attrs["accuracy_level"] = kernel.accuracy
    y = b.op("MatMulNBits", [x, codes, scales], attrs, name=f"{name}/MatMulNBits", domain=MICROSOFT)
    if sums is None:
        return y
    turned = b.op("Transpose", gain, {"perm": [1, 0]}, name=f"{name}/gain")
    return b.op("Add", [y, b.op("MatMul", [sums, turned], name=f"{name}/correction")], name=f"{name}/corrected")


def _constants(b: GraphBuilder, packed: PackedWeight, kernel: Kernel, name: str) -> list[ir.Value]:
    """Codes and scales of a kernel, and of a weight with zero points the gain of its correction, (rows, groups)."""
    doubled = _doubled(packed, kernel)
    codes, scales = emit_nbits(b, doubled or packed, name, kernel.bits, kernel.block)
    if doubled is not None:
        half = b.constant(np.asarray(0.5, np.float32), "scalar")
        scales = b.op("Mul", [scales, half], name=f"{name}/half")
    if not has_zero_points(packed):
        return [codes, scales]
    assert packed.spec is not None
    bits = int(packed.spec.bits)
    middle = 2 ** (bits - 1) if doubled is None else (2**bits - 1) / 2
    shift = b.constant(np.asarray(middle, np.float32), "scalar")
    shifted = b.op("Sub", [shift, emit_zero_point(b, packed, name)], name=f"{name}/shift")
    return [codes, scales, b.op("Mul", [emit_scale(b, packed, name), shifted], name=f"{name}/gain")]


def _doubled(packed: PackedWeight, kernel: Kernel) -> PackedWeight | None:
    """The weight with the levels 2 q - (2^b - 1), at half the scale, where a field has room for them.

    They are symmetric about zero. Levels 0 and 1 about a middle of 1 are not: product and correction would be
    large, cancel, and leave the rounding of both.
    """
    spec = packed.spec
    if not has_zero_points(packed) or spec is None or spec.bits >= kernel.bits:
        return None
    bits = int(spec.bits)
    stream = Bits(bits, offset=1 - 2**bits, step=2)
    return replace(packed, spec=QuantSpec(bits, "linear"), stream=stream)


def has_zero_points(packed: PackedWeight) -> bool:
    """Whether a correction is needed."""
    return packed.spec is not None and packed.spec.scheme == "affine"


def block_sums(b: GraphBuilder, x: ir.Value, groups: Groups, inputs: int, rank: int, name: str) -> ir.Value:
    """Sums of x over the weight's groups along its last dimension: (..., inputs) -> (..., groups)."""
    block = groups.block
    if groups.kind == "tensor" or block is None or block >= inputs:
        return b.op("ReduceSum", [x, b.ints([-1])], {"keepdims": 1}, name=f"{name}/sum")
    padding = -inputs % block
    if padding:
        x = b.op("Pad", [x, b.ints([0] * (2 * rank - 1) + [padding])], name=f"{name}/pad")
    cut = b.op("Reshape", [x, b.ints([0] * (rank - 1) + [-1, block])], name=f"{name}/blocks")
    return b.op("ReduceSum", [cut, b.ints([-1])], {"keepdims": 0}, name=f"{name}/sums")


def _rows_are_outputs(groups: Groups, axis: int) -> bool:
    return groups.kind == "tensor" or (groups.kind == "channel" and groups.axis % 2 == axis)


def _divides(block: int, groups: Groups, inputs: int) -> bool:
    whole = groups.kind == "tensor" or groups.block is None or groups.block >= inputs
    return whole or (groups.block or 0) % block == 0


def reference(x: np.ndarray, block: int) -> np.ndarray:
    """What MatMulNBits at accuracy level 4 takes its activations for: symmetric int8 per row and block."""
    out = np.empty_like(x, dtype=np.float64)
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block].astype(np.float64)
        scale = np.abs(part).max(-1, keepdims=True) / 127
        out[..., start : start + block] = np.round(part / np.where(scale == 0, 1, scale)) * scale
    return out
