"""The mathematics of quantization and sparsity: fast forward and backward passes, and what is deployed.

`fake_quantize` is what training runs, `quantize` what is exported; both cover the methods ddt, ste, lsq and seq
for every width, scheme and group. `reference.py` holds the slow versions that the tests compare with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.ops import eager, reference
from qgraph.ops.codes import scale_is_mean
from qgraph.ops.compiled import one_call
from qgraph.ops.ddt import DDT
from qgraph.ops.groups import Groups
from qgraph.ops.lsq import LearnedStep, lsq_initial_step, required_step
from qgraph.ops.quantized import Quantized, quantize
from qgraph.ops.seq import StretchedElastic, seq_initial_size
from qgraph.ops.sharded import is_sharded, on_whole, whole
from qgraph.ops.sparsity import sparsify, sparsity_mask
from qgraph.ops.ste import AbsMean, StraightThrough

__all__ = [
    "Groups",
    "Quantized",
    "fake_quantize",
    "initial_step",
    "quantize",
    "scale_is_mean",
    "sparsify",
    "sparsity_mask",
]


@one_call(QuantSpec, Groups)
def fake_quantize(
    x: Tensor, spec: QuantSpec, groups: Groups, *, dense: Tensor | None = None, step: Tensor | None = None
) -> Tensor:
    """Values that `x` has after quantization, differentiable by the method of `spec`.

    Parameters
    ----------
    x : Tensor, float, any shape and memory layout
    spec : QuantSpec
    groups : Groups
        Which values share a scale.
    dense : Tensor of the shape of `x`, optional
        Where `x` is `sparsify(dense)`: the original values. Marks the zeros of `x` as pruned. DDT regresses
        `dense` on the codes of `x` and gives the whole gradient to `dense`, none to `x`, which it takes as
        `dense + constant`; ste and lsq give theirs to `x`, whose sparsifier passes it on. The gradient of the
        parameter is complete in each case.
    step : Tensor, shape `groups.shape(x.shape)` or broadcastable to it, optional
        The learned step of methods "lsq" and "seq"; `initial_step` gives a start.

    Returns
    -------
    Tensor
        Of the shape and dtype of `x`. A group that holds NaN or Inf gives NaN or Inf.

    Examples
    --------
    >>> weight = torch.randn(8, 16, requires_grad=True)
    >>> y = fake_quantize(weight, QuantSpec(1), Groups("channel"))
    >>> len(y[0].unique())
    2
    """
    if is_sharded(x):
        if spec.method == "ddt" and dense is not None:
            x = x.detach()  # it gets no gradient here, and none is not what backward of a gathering takes
        return on_whole(lambda t: fake_quantize(t, spec, groups, dense=whole(dense), step=whole(step)), x)
    if x.numel() == 0:
        return x.clone()
    if eager.has_tangent(x):  # forward-mode differentiation asks for what the fast versions have not
        return reference.fake_quantize(x, spec, groups, dense=dense, step=step)
    order = groups.memory_order(x)
    if order is not None:  # groups do not depend on the order of values: go by memory, without a copy
        there, back, moved = order
        aligned = None if dense is None else dense.permute(there)
        return fake_quantize(x.permute(there), spec, moved, dense=aligned, step=step).permute(back)
    pieces = groups.pieces(x)
    if spec.method == "ddt":
        if dense is None:
            results = [DDT.apply(piece, None, spec, None)[0] for piece in pieces]
        else:
            pairs = zip(groups.pieces(dense), pieces, strict=True)
            results = [DDT.apply(full, pruned, spec, None)[0] for full, pruned in pairs]
    elif spec.method == "seq":
        steps = groups.cut_scales(required_step(step, spec), x.shape)
        results = [
            StretchedElastic.apply(piece, s, spec, dense is not None, x.numel())
            for piece, s in zip(pieces, steps, strict=True)
        ]
    elif spec.method == "lsq":
        step = required_step(step, spec)
        steps = groups.cut_scales(step, x.shape)
        rows, count = groups.shape(x.shape)
        sharing = rows * count // step.numel()
        results = [
            LearnedStep.apply(piece, s, spec, dense is not None, sharing * piece.shape[-1])
            for piece, s in zip(pieces, steps, strict=True)
        ]
    else:
        function = StraightThrough if spec.scale == "minmax" else AbsMean
        results = [function.apply(piece, spec, dense is not None) for piece in pieces]
    return groups.join(results, x.shape)


@one_call(QuantSpec, Groups)
@torch.no_grad()
def initial_step(x: Tensor, spec: QuantSpec, groups: Groups) -> Tensor:
    """A start for the learned step of methods "lsq" and "seq", shape `groups.shape(x.shape)`, float32 or wider."""
    x = whole(x)
    if x.numel() == 0:
        return x.new_ones(groups.shape(x.shape))
    start = seq_initial_size if spec.method == "seq" else lsq_initial_step
    steps = [start(piece, spec) for piece in groups.pieces(x)]
    return torch.cat(steps, dim=1).squeeze(-1)
