"""Rounding ties of a static activation: as `ties.py`, with the scale known beforehand.

Where the file goes from codes to codes (QLinearConv), the value before rounding is torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.exporters.ties import Explained
from qgraph.modules import ActivationForm


def explain_static(x: Tensor, y: Tensor, own: Tensor, form: ActivationForm, tie: float) -> Explained:
    """Compare a runtime's quantized activation with the formula.

    Parameters
    ----------
    x, y : Tensor
        Values before and after the quantizer.
    own : Tensor
        torch's values before the quantizer; flips are counted against its codes.
    form : ActivationForm
        Of a static range.
    tie : float
        How near, in codes, a value must be to the middle between two codes for either to be right.
    """
    assert form.fixed is not None
    if x.numel() == 0:
        return Explained(0, 0, 0.0)
    low, high = (level - form.fixed.zero_point for level in form.spec.levels)
    f = x.double() / form.fixed.step
    mine = (own.double() / form.fixed.step).round().clamp(low, high)
    taken = (y.double() / form.fixed.scale).round()
    on_tie = ((f - f.floor() - 0.5).abs() < tie) & (f > low - 1) & (f < high + 1)
    right = f.round().clamp(low, high)
    legal = (taken == right) | (on_tie & ((taken - right).abs() <= 1) & (taken >= low) & (taken <= high))
    wrong = (y.double() - taken * form.fixed.scale).abs().masked_fill(~legal, float("inf"))
    wrong = torch.where(torch.isnan(f), float("inf"), wrong)  # codes hold no NaN
    largest = float(x.abs().max())
    rest = float(wrong.max())
    return Explained(int((taken != mine).sum()), int(on_tie.sum()), rest / largest if largest else rest)
