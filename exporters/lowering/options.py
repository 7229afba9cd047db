"""What an export asks of a lowering, and by it the choice between two faithful forms of a product."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch

from qgraph.exporters.lowering.linear import INT8, Kernel, has_zero_points
from qgraph.exporters.lowering.speeds import key_of, speed
from qgraph.exporters.packing import PackedWeight

PURPOSES = ("latency", "throughput", "size")
MANY = 256  # rows at which a product is timed for throughput


@dataclass(frozen=True, slots=True)
class Options:
    """How a graph is lowered.

    Parameters
    ----------
    float_kernels : bool
        Whether products may be summed otherwise than MatMul does it: MatMulNBits on float activations, whole numbers of
        dynamic ones.
    scale_dtype : torch.dtype
        In which scales are stored, float32 or float16; they are rounded to it already.
    optimize_for : {"latency", "throughput", "size"}, optional
        None is "latency"; "size" takes a kernel wherever there is one.
    sizes : mapping of str to int
        The dynamic sizes of the example, by name.
    stacked : bool
        Whether weights that are alike may be stored and unpacked together.
    """

    float_kernels: bool = True
    scale_dtype: torch.dtype = torch.float32
    optimize_for: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    stacked: bool = True

    @property
    def stored_scales(self) -> type[np.floating]:
        """`scale_dtype` in numpy."""
        return np.float16 if self.scale_dtype == torch.float16 else np.float32

    @property
    def by_speed(self) -> bool:
        """Whether the faster form is taken."""
        return self.optimize_for != "size"

    def compare(self, kernel: Kernel, packed: PackedWeight, x: ir.Value) -> tuple[bool, str]:
        """Whether a kernel is at least as fast on `x` as a float product, by the table of `speeds`, and why."""
        rows = self.rows(x) or MANY  # where the graph does not say how many, a kernel must do well on many
        found = speed(key_of(kernel.bits, kernel.accuracy == INT8, has_zero_points(packed)), rows, packed.numel)
        if found is None:
            return False, "so small a layer was not measured with MatMulNBits"
        is_fast = found.kernel >= found.plain
        return is_fast, (
            f"at {rows} row{'s' * (rows > 1)} MatMulNBits is {'faster' if is_fast else 'slower'} than a float product "
            f"({found.kernel:.2g} and {found.plain:.2g} of FP32's speed)"
        )

    def rows(self, x: ir.Value) -> int | None:
        """Rows of a left operand: the example's, or many for throughput; None where the graph does not say."""
        sizes = [] if x.shape is None else [_size(dim, self.sizes) for dim in list(x.shape)[:-1]]
        known = [size for size in sizes if size is not None]
        if x.shape is None or len(known) < len(sizes):
            return None
        return max(math.prod(known), MANY if self.optimize_for == "throughput" else 1)


def _size(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | None:
    if isinstance(dim, int):
        return dim
    factors = [sizes.get(name.strip()) for name in (dim.value or "").split("*")]
    return None if None in factors else math.prod(size for size in factors if size is not None)
