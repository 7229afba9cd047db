"""SR-STE: pruned weights are pulled to 0, so that the mask settles; the baseline for N:M sparsity.

Stands on `sparsify`, whose gradient is the identity (straight-through), and adds `decay * w` for the weights that are
pruned now.

Source: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch", arXiv 2102.04010,
section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qgraph.ops.vmapped import vmapped


@vmapped
class SparseRefined(torch.autograd.Function):
    """`SparseRefined.apply(pruned, w, decay)` is `pruned`; gradients are `h` of it and `decay (w - pruned)` of `w`."""

    @staticmethod
    def forward(pruned: Tensor, w: Tensor, decay: float) -> Tensor:
        return pruned.view_as(pruned)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pruned, w, ctx.decay = inputs
        ctx.save_for_backward(pruned, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pruned, w = (saved.detach() for saved in ctx.saved_tensors)
        return grads[0], (w - pruned) * ctx.decay, None
