"""Rounding ties: may a difference between two quantized activations be a code on a tie that was rounded the
other way?

The codes that a runtime chose are recovered from its output, which is an affine function of them in every
group. Where they differ from torch's, the value before rounding must be on a tie, and the output must follow
from them by the method's formula; anything else is left unexplained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.modules import ActivationForm
from qgraph.ops import quantize, scale_is_mean
from qgraph.ops.codes import absmean_factor, middle
from qgraph.ops.seq import levels_a_side

TIE = 1e-4  # in code steps: float32 computes a position in 0..255 to about 3e-5
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Explained:
    """Codes that went the other way, values on a tie, and what is left, relative to the largest value."""

    flips: int
    ties: int
    unexplained: float


def explain(x: Tensor, y: Tensor, own: Tensor, form: ActivationForm) -> Explained:
    """Compare a runtime's quantized activation with the formula.

    Parameters
    ----------
    x, y : Tensor
        The runtime's values before and after the quantizer.
    own : Tensor
        torch's values before the quantizer, equal to `x` up to float rounding; flips are counted against its
        codes.
    form : ActivationForm

    Returns
    -------
    Explained
    """
    if x.numel() == 0:
        return Explained(0, 0, 0.0)
    groups = form.groups
    sizes = (
        [None] * 2 if form.step is None else [form.step.detach().double().abs().clamp_min(TINY).reshape(1, 1, 1)] * 2
    )
    flips = ties = 0
    rest = 0.0
    codes = quantize(own, form.spec, groups, step=form.step).codes
    assert codes is not None
    cut = (groups.pieces(tensor.double()) for tensor in (x, y, codes))
    for (before, after, mine), size in zip(zip(*cut, strict=True), sizes, strict=False):
        part = _piece(before, after, mine, form.spec, size)
        flips, ties, rest = flips + part.flips, ties + part.ties, max(rest, part.unexplained)
    largest = float(x.abs().max())
    return Explained(flips, ties, rest / largest if largest else rest)


def _piece(x: Tensor, y: Tensor, own_codes: Tensor, spec: QuantSpec, size: Tensor | None) -> Explained:
    f, step, low = _positions(x, spec, size)
    q = _codes(f, spec)
    tie = _on_tie(f, spec)
    taken = _codes_taken(y, q, tie, spec)
    legal = (taken == q) | (tie & ((taken - q).abs() <= (2 if _binary(spec) else 1)))
    expected = _dequantize(x, taken, step, low, spec)
    wrong = (y - expected).abs().masked_fill(~legal, float("inf"))
    flips = int((taken != own_codes).sum())
    wrong = torch.where(
        torch.isnan(wrong), torch.where(torch.isnan(y) & torch.isnan(expected), 0.0, float("inf")), wrong
    )
    return Explained(flips, int(tie.sum()), float(wrong.max()))


def _positions(x: Tensor, spec: QuantSpec, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    low = x.amin(-1, keepdim=True) if spec.scheme == "affine" else torch.zeros_like(x[..., :1])
    if size is not None:
        step = size
        if spec.method == "seq":
            step = size / levels_a_side(spec)
            low = -middle(spec) * step
    elif spec.scale != "minmax":
        centre = x.mean(-1, keepdim=True) if spec.scheme == "affine" else low
        step = (x - centre).abs().mean(-1, keepdim=True) * absmean_factor(spec)
        low = centre - middle(spec) * step
    elif spec.scheme == "affine":
        step = (x.amax(-1, keepdim=True) - low) / spec.levels[1]
    else:
        size = x.abs()
        step = size.mean(-1, keepdim=True) if scale_is_mean(spec) else size.amax(-1, keepdim=True) / spec.levels[1]
    return (x - low) / torch.where(step < TINY, 1.0, step), step, low


def _codes(f: Tensor, spec: QuantSpec) -> Tensor:
    if _binary(spec):
        return torch.where(f >= 0, 1.0, -1.0).double()
    return f.round().clamp(*spec.levels)


def _on_tie(f: Tensor, spec: QuantSpec) -> Tensor:
    if _binary(spec):
        return f.abs() < TIE
    return ((f - f.floor() - 0.5).abs() < TIE) & (f > spec.levels[0] - 1) & (f < spec.levels[1] + 1)


def _binary(spec: QuantSpec) -> bool:
    return spec.bits == 1 and spec.scheme == "linear"


def _codes_taken(y: Tensor, q: Tensor, tie: Tensor, spec: QuantSpec) -> Tensor:
    """Codes behind `y`: the line y = gain q + offset is fitted where q is certain, and read backwards where
    it is not.
    """
    sure = (~tie).double()
    count = sure.sum(-1, keepdim=True).clamp_min(1)
    if spec.scheme == "affine":
        mean_q, mean_y = ((v * sure).sum(-1, keepdim=True) / count for v in (q, y))
    else:
        mean_q = mean_y = torch.zeros_like(count)
    qc, yc = (q - mean_q) * sure, (y - mean_y) * sure
    spread = (qc * qc).sum(-1, keepdim=True)
    gain = (qc * yc).sum(-1, keepdim=True) / spread
    read = (y - mean_y) / gain + mean_q
    read = torch.where(read >= 0, 1.0, -1.0).double() if _binary(spec) else read.round().clamp(*spec.levels)
    # A group without spread has one code, whatever its gain; codes that are certain stay what they are.
    return torch.where(tie & (spread > 0) & (gain != 0), read, q)


def _dequantize(x: Tensor, q: Tensor, step: Tensor, low: Tensor, spec: QuantSpec) -> Tensor:
    if spec.method != "ddt":
        return low + step * q
    affine = spec.scheme == "affine"
    mean_q, mean_x = (v.mean(-1, keepdim=True) if affine else torch.zeros_like(step) for v in (q, x))
    qc = q - mean_q
    ridge = (qc * qc).mean(-1, keepdim=True) + spec.lam
    gain = ((x - mean_x) * qc).mean(-1, keepdim=True) / torch.where(ridge == 0, 1.0, ridge)
    return mean_x + gain * qc
