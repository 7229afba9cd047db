"""Integer codes with their scales and zero points: the deployed form of a quantized or sparse tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.ops.codes import middle
from qgraph.ops.ddt import centred_codes
from qgraph.ops.groups import Groups
from qgraph.ops.lsq import lsq_codes, required_step
from qgraph.ops.seq import seq_codes
from qgraph.ops.ste import ste_codes


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """What is deployed of a tensor: `scale * (codes - zero_point)`, or plain values where nothing is
    quantized.

    Parameters
    ----------
    codes : Tensor, int16, or None
        Level integers, in the shape of the tensor, within `spec.levels`; 0 where a sparse linear tensor is
        pruned.
    scale : Tensor, shape (rows, groups), float32, or None
    zero_point : Tensor, shape (rows, groups), float32, or None
        None for linear schemes. A group of scale 1 whose codes are all 0 is a constant one.
    groups : Groups
    spec : QuantSpec or None
        None for sparsity alone: then `values` is set and codes, scale and zero_point are None.
    sparse : bool
    values : Tensor, float32, or None
        With spec None: the values, 0 at pruned places.
    """

    codes: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    groups: Groups
    spec: QuantSpec | None
    sparse: bool
    values: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The float32 tensor that this stands for."""
        if self.codes is None or self.scale is None:
            assert self.values is not None, "a Quantized without codes holds values"
            return self.values
        shape = self.codes.shape
        codes = self.groups.pieces(self.codes.float())
        scales = self.groups.cut_scales(self.scale, shape)
        if self.zero_point is not None:
            zeros = self.groups.cut_scales(self.zero_point, shape)
            codes = [code - zero for code, zero in zip(codes, zeros, strict=True)]
        return self.groups.join([c * s for c, s in zip(codes, scales, strict=True)], shape)

    def with_scales_of(self, dtype: torch.dtype) -> Quantized:
        """The same with scales that `dtype` holds, still as float32."""
        return self if self.scale is None else replace(self, scale=self.scale.to(dtype).float())


@torch.no_grad()
def quantize(
    x: Tensor,
    spec: QuantSpec | None,
    groups: Groups,
    *,
    dense: Tensor | None = None,
    step: Tensor | None = None,
) -> Quantized:
    """Codes, scales and zero points of `x`, such that `dequantize` gives what `fake_quantize` gives.

    Parameters are those of `fake_quantize`; with spec None the values of `x` are kept as they are, `dense`
    (any tensor) marking them as sparse. NaN or Inf in a group shows as NaN in its scale or zero point.
    """
    sparse = dense is not None
    if spec is None:
        return Quantized(None, None, None, groups, None, sparse, x.detach().float().clone())
    if x.numel() == 0:
        codes, scales = (
            torch.zeros_like(x, dtype=torch.int16),
            x.new_ones(groups.shape(x.shape), dtype=torch.float32),
        )
        return Quantized(
            codes, scales, torch.zeros_like(scales) if spec.scheme == "affine" else None, groups, spec, sparse
        )
    order = groups.memory_order(x)
    if order is not None:  # sum in the order in which `fake_quantize` sums
        there, back, moved = order
        aligned = None if dense is None else dense.permute(there)
        found = quantize(x.permute(there), spec, moved, dense=aligned, step=step)
        assert found.codes is not None
        return replace(found, codes=found.codes.permute(back), groups=groups)
    pieces = groups.pieces(x)
    dense_pieces = [None] * len(pieces) if dense is None else groups.pieces(dense)
    steps = [None] * len(pieces) if step is None else groups.cut_scales(step, x.shape)
    parts = [_codes_of_piece(*args, spec) for args in zip(pieces, dense_pieces, steps, strict=True)]
    codes = groups.join([part[0] for part in parts], x.shape)
    scale = torch.cat([part[1] for part in parts], dim=1).squeeze(-1).float()
    zero = torch.cat([part[2] for part in parts], dim=1).squeeze(-1).float() if spec.scheme == "affine" else None
    return Quantized(codes.nan_to_num(0, 0, 0).to(torch.int16), scale, zero, groups, spec, sparse)


def _codes_of_piece(
    x: Tensor, dense: Tensor | None, step: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (float), scale and zero point of one piece; the latter two of shape (rows, groups, 1)."""
    if spec.method == "ddt":
        qc, stats = centred_codes(x if dense is None else dense, None if dense is None else x, spec)
        size, offset, mean_q, mean_f, slope, _ = stats.split(1, dim=-1)
        q, scale = qc.add_(mean_q).round_(), slope * size
        constant = torch.addcmul(offset, mean_f, size) - scale * mean_q
    elif spec.method == "lsq":
        q, _, scale, low = lsq_codes(x, required_step(step, spec), spec, dense is not None)
        scale = scale + (q - q).sum(dim=-1, keepdim=True)  # a NaN among the codes has to show in the scale
        constant = torch.zeros_like(scale) if low is None else low
    elif spec.method == "seq":
        q, _, scale = seq_codes(x, required_step(step, spec), spec, dense is not None)
        scale = scale + (q - q).sum(dim=-1, keepdim=True)
        constant = -middle(spec) * scale
    else:
        q, scale, low = ste_codes(x, spec, dense is not None)
        constant = torch.zeros_like(scale) if low is None else low
    if spec.scheme == "affine":  # a slope of 0 means equal codes, all of them 0, that stand for the mean
        scale = scale.masked_fill(scale == 0, 1.0)
    return q, scale, -constant / scale
