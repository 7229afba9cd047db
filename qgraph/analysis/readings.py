"""What can be read off a quantized weight between two steps of training, from the weight and its gradient alone.

Nothing is hooked into the model, so that compiled and sharded models, and evaluations, run as they are.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.inspection.sizes import ratio_db
from qgraph.ops import Groups, Quantized, quantize
from qgraph.ops.codes import outside, work_dtype
from qgraph.ops.ddt import centred_codes

MIN_SLOPE = 1e-3  # of the regression: below it a group passes nothing straight through that could be told apart
MIN_SPREAD = 1e-3  # of codes, which are integers: two that differ have at least 0.5


@dataclass(frozen=True, slots=True)
class WeightReading:
    """One quantized weight at one step; None is "not known".

    Parameters
    ----------
    site, path : str
        The weight, and the module that uses it.
    spec : str
    step : int
    problem : str or None
        What is not finite.
    usage : float
        Of the levels, how many are in effect used: 2 to the entropy of all codes, over the number of levels, or of
        weights where they are fewer.
    dead : float
        Share of the groups all of whose codes are equal.
    snr_db : float
        Weight to quantization noise in dB; inf where nothing is lost. Pruned weights do not count.
    scale : float
        Median over the groups.
    drift : float or None
        Median of abs(log2) of what the scales have grown or shrunk by since the measurement before.
    flips, returned : float or None
        Share of the codes that changed in one step, and of all codes those that changed and went back in the next.
    corrective : float or None
        Method "ddt": what part of the gradient is beyond the straight-through one, c / (c + s) of both norms.
    """

    site: str
    path: str
    spec: str
    step: int
    problem: str | None = None
    usage: float = math.nan
    dead: float = math.nan
    snr_db: float = math.nan
    scale: float = math.nan
    drift: float | None = None
    flips: float | None = None
    returned: float | None = None
    corrective: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; None for what no JSON number is."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    def numbers(self) -> dict[str, float]:
        """What is logged: the measured numbers by name."""
        return {name: value for name in NUMBERS if (value := getattr(self, name)) is not None}


NUMBERS = ("usage", "dead", "snr_db", "scale", "drift", "flips", "returned", "corrective")


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """A weight as its quantizer meets it, with what it is quantized by.

    `pruned` is the weight with zeros where it is pruned, or None; `grad` that of the weight.
    """

    weight: Tensor
    pruned: Tensor | None
    grad: Tensor | None
    spec: QuantSpec
    groups: Groups
    step: Tensor | None

    def quantized(self) -> Quantized:
        """Codes and scales now."""
        dense = None if self.pruned is None else self.weight
        return quantize(
            self.weight if self.pruned is None else self.pruned, self.spec, self.groups, dense=dense, step=self.step
        )


def small_codes(found: Quantized) -> Tensor:
    """Codes in a byte each, to be told apart later: levels of at most 8 bits stay distinct."""
    assert found.codes is not None
    return found.codes.to(torch.uint8)


def problem_of(operand: Operand, found: Quantized) -> str | None:
    """What is not finite: weight, learned step, scale or gradient, the first that is so."""
    named = (
        ("the weight", operand.weight),
        ("the learned step", operand.step),
        ("the scale", found.scale),
        ("the gradient", operand.grad),
    )
    for name, tensor in named:
        if tensor is not None and not _all_finite(tensor):
            bad = int((~torch.isfinite(tensor.detach())).sum())
            return f"{bad:,} of {tensor.numel():,} values of {name} are not finite"
    return None


def usage_and_dead(operand: Operand, found: Quantized) -> tuple[float, float]:
    """Levels in use, and the share of dead groups: see `WeightReading`."""
    assert found.codes is not None
    low, high = operand.spec.levels
    codes = found.codes.to(torch.int32)
    kept = codes if operand.pruned is None else codes[operand.pruned != 0]
    counts = torch.bincount((kept - low).flatten().clamp_(min=0), minlength=high - low + 1).double()
    shares = counts[counts > 0] / max(1, kept.numel())
    levels = min(
        2 if operand.spec.bits == 1 else high - low + 1, max(1, kept.numel())
    )  # no more than there are weights
    usage = 2 ** float(-(shares * shares.log2()).sum()) / levels
    pieces = operand.groups.pieces(found.codes)
    dead = sum(int((piece.amax(-1) == piece.amin(-1)).sum()) for piece in pieces)
    return usage, dead / max(1, sum(piece.shape[0] * piece.shape[1] for piece in pieces))


def snr_of(operand: Operand, found: Quantized) -> float:
    """Signal to quantization noise in dB over the weights that are kept."""
    weight = operand.weight.float()
    noise = found.dequantize() - weight
    if operand.pruned is not None:
        kept = operand.pruned != 0
        weight, noise = weight * kept, noise * kept
    return ratio_db(weight, noise)


def drift_of(now: Tensor, before: Tensor | None) -> float | None:
    """Median over the groups of abs(log2(now / before))."""
    if before is None or before.shape != now.shape:
        return None
    ratio = (now.abs() / before.abs()).log2().abs()
    ratio = ratio[torch.isfinite(ratio)]
    return float(ratio.median()) if ratio.numel() else None


def corrective_share(operand: Operand) -> float | None:
    """Part of the gradient of a DDT weight that is beyond the straight-through one.

    The closed-form gradient g is linear in the upstream gradient h and, in the notation of `qgraph.ops.ddt`, keeps
    ``mean(g) = mean(h)`` and ``mean(g qc) = m (a + (2 k mean(qc^2) + mean(e qc)) / V)``, so that h, which a
    straight-through quantizer would have passed on, comes out of g. With scale "windowed" a straight-through quantizer
    passes nothing on outside the window, where g is ``mean(h) + (m / V) qc``: a line that gives both. Groups that do
    not tell are left out. None for other methods, and without a gradient.
    """
    spec, grad = operand.spec, operand.grad
    if grad is None or spec.method != "ddt":
        return None
    dense = operand.groups.pieces(operand.weight)
    pruned = [None] * len(dense) if operand.pruned is None else operand.groups.pieces(operand.pruned)
    straight = corrective = 0.0
    for x, sparse, g in zip(dense, pruned, operand.groups.pieces(grad), strict=True):
        wide = g.to(work_dtype(x.dtype))
        h, usable = _straight_through(x, sparse, wide, spec)
        straight += float((h * usable).square().sum(dtype=torch.float64))
        corrective += float(((wide - h) * usable).square().sum(dtype=torch.float64))
    if not straight + corrective > 0:
        return None
    beyond, through = math.sqrt(corrective), math.sqrt(straight)
    return beyond / (beyond + through)


def _straight_through(x: Tensor, sparse: Tensor | None, g: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """h, 0 outside the window, and the groups that it could be told for, shape (rows, groups, 1)."""
    qc, stats = centred_codes(x, sparse, spec)
    step, offset, _, mean_f, slope, ridge = stats.split(1, dim=-1)
    affine = spec.scheme == "affine"
    rest = 1 - slope
    energy = qc.square().mean(-1, keepdim=True)
    factor = slope + (2 * rest * energy + slope * ridge - energy) / ridge
    told = factor.abs() > MIN_SLOPE
    push = (g * qc).mean(-1, keepdim=True) / ridge / torch.where(told, factor, 1.0)
    level = g.mean(-1, keepdim=True) if affine else torch.zeros_like(push)
    position = (x.to(step.dtype) - offset) / step
    far = outside(position if sparse is None else (sparse.to(step.dtype) - offset) / step, spec)
    if far is not None:
        far_push, far_level, known = _line(qc, g, far.to(g.dtype), affine)
        none = ~far.any(-1, keepdim=True)
        push, level = torch.where(none, push, far_push), torch.where(none, level, far_level)
        told = torch.where(none, told, known)
    usable = told & (slope.abs() > MIN_SLOPE)
    h = g - push * (2 * rest * qc + position - mean_f - qc) - rest * level
    h = torch.where(usable, h / torch.where(usable, slope, 1.0), 0.0)
    return h if far is None else h.masked_fill(far, 0.0), usable


def _line(qc: Tensor, g: Tensor, far: Tensor, affine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Slope and level of g over qc where `far` is 1, through 0 unless affine, and whether there is such a line."""
    count = far.sum(-1, keepdim=True).clamp_(min=1)
    centre_q = (qc * far).sum(-1, keepdim=True) / count if affine else torch.zeros_like(count)
    centre_g = (g * far).sum(-1, keepdim=True) / count if affine else torch.zeros_like(count)
    spread = ((qc - centre_q).square() * far).sum(-1, keepdim=True)
    known = spread > MIN_SPREAD
    slope = ((qc - centre_q) * (g - centre_g) * far).sum(-1, keepdim=True) / torch.where(known, spread, 1.0)
    return slope, centre_g - slope * centre_q, known


def _all_finite(tensor: Tensor) -> bool:
    # The sum is finite only where every value is, but for an overflow of finite ones: one read, no mask of its size.
    detached = tensor.detach()
    return bool(torch.isfinite(detached.sum())) or bool(torch.isfinite(detached).all())
