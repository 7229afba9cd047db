"""The operations once more: one group at a time, plain autograd, slow and obviously right.

The tests hold the fast versions to these; nothing else uses them. Each function follows the text of its paper
line by line, with its noise detached, and shares no code with the fast versions but `Groups`', the specs'
fields and the factors of mean-magnitude scales.

Source: arXiv 2409.09245 (ddt), arXiv 1902.08153 (lsq), arXiv 2502.02631 (seq), arXiv 1603.05279 and 2402.17764
(mean-magnitude scales).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.ops.codes import AFFINE_FACTORS, LINEAR_FACTORS
from qgraph.ops.groups import Groups


def fake_quantize(
    x: Tensor, spec: QuantSpec, groups: Groups, *, dense: Tensor | None = None, step: Tensor | None = None
) -> Tensor:
    """What `qgraph.ops.fake_quantize` computes, values and gradients."""
    rows = rows_of(x, groups)
    dense_rows = None if dense is None else rows_of(dense, groups)
    steps = None if step is None else step.expand(groups.shape(x.shape))
    block = groups.block or max(rows.shape[1], 1)
    done = []
    for i, row in enumerate(rows):
        parts = []
        for j, group in enumerate(row.split(block)):
            full = None if dense_rows is None else dense_rows[i].split(block)[j]
            if spec.method == "ddt":
                parts.append(ddt(group, spec, full))
            elif spec.method == "seq":
                assert steps is not None
                parts.append(seq(group, steps[i, j], spec, full is not None, x.numel()))
            elif spec.method == "lsq":
                assert step is not None and steps is not None
                shared = group.numel() * (steps.numel() // step.numel())
                parts.append(lsq(group, steps[i, j], spec, full is not None, shared))
            else:
                parts.append(ste(group, spec, full is not None))
        done.append(torch.cat(parts))
    return rows_back(torch.stack(done), x.shape, groups)


def ddt(x_s: Tensor, spec: QuantSpec, dense: Tensor | None = None) -> Tensor:
    """Denoise one group, a vector: ddt.md's forward pass, steps 1 to 3."""
    x = x_s if dense is None else dense
    sparse = dense is not None
    noisy = x + (x_s - x).detach()  # x_S = x + d_S
    b, s = (t.detach() for t in offset_and_step(x_s, spec, sparse))
    f = window((noisy - b) / _or_one(s), spec)
    q = f + (round_to_levels(f, spec, sparse) - f).detach()  # q = f + d_Q
    if spec.scheme == "affine":
        centred = q - q.mean()
        variance = (centred * centred).mean() + spec.lam
        slope = ((x - x.mean()) * centred).mean() / _or_one(variance)
        return slope * centred + x.mean()
    energy = (q * q).mean() + spec.lam
    return (x * q).mean() / _or_one(energy) * q


def _or_one(divisor: Tensor) -> Tensor:
    return torch.where(divisor > 0, divisor, 1)  # no branch: a vmap has no single value


def ste(x: Tensor, spec: QuantSpec, sparse: bool = False) -> Tensor:
    """Straight-through quantization of one group; only a mean-magnitude scale is differentiated."""
    b, s = offset_and_step(x, spec, sparse)
    if spec.scale != "minmax":
        if s == 0:  # a constant group (linear: of zeros) is exact
            return x
        f = window((x - b) / s, spec)
        return s * (f + (round_to_levels(f, spec, sparse) - f).detach()) + b
    b, s = b.detach(), s.detach()
    y = s * round_to_levels((x - b) / _or_one(s), spec, sparse) + b
    return x + (y - x).detach()


def lsq(x: Tensor, step: Tensor, spec: QuantSpec, sparse: bool = False, shared: int | None = None) -> Tensor:
    """Learned step quantization of one group; the gradient of the step is scaled as the paper scales it."""
    low, high = spec.levels
    g = ((x.numel() if shared is None else shared) * high) ** -0.5
    s = step * g + (step - step * g).detach()
    b = x.min().detach() if spec.scheme == "affine" else torch.zeros_like(x[0])
    f = ((x - b) / s).clamp(low, high)
    return s * (f + (round_to_levels(f, spec, sparse) - f).detach()) + b


def seq(x: Tensor, size: Tensor, spec: QuantSpec, sparse: bool, count: int) -> Tensor:
    """ParetoQ's quantizers of one group; the gradient of the range is scaled by 1 / sqrt of the tensor's size."""
    g = count**-0.5
    a = size * g + (size - size * g).detach()
    if spec.bits == 1:
        sign = torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, 0.0 if sparse else 1.0)).to(x.dtype)
        passed = x * (x.abs() <= size.abs()).detach()
        return a * sign + passed - passed.detach()
    clipped = (x / a).clamp(-0.99, 0.99)
    if spec.bits == 1.58:
        rounded, shift = (clipped * 1.5).round() / 1.5, 2 / 3
    else:
        rounded, shift = ((clipped * 2 - 0.5).round() + 0.5) / 2, 3 / 4
    inside = (x / a).abs() <= 0.99
    position = (
        torch.where(inside, x / a, shift * x.sign()).detach()
        + torch.where(inside, x / a, 0)
        - torch.where(inside, x / a, 0).detach()
    )
    return a * (position + (rounded - position).detach())


def offset_and_step(x: Tensor, spec: QuantSpec, sparse: bool) -> tuple[Tensor, Tensor]:
    """Offset and step, differentiable: of a min/max scale, or of the mean magnitude about the mean (linear: 0)."""
    if spec.scale == "minmax":
        if spec.scheme == "affine":
            return x.min(), (x.max() - x.min()) / spec.levels[1]
        return torch.zeros_like(x[0]), linear_step(x, spec, sparse)
    if spec.scheme == "affine":
        step = AFFINE_FACTORS[int(spec.bits)] * (x - x.mean()).abs().mean()
        return x.mean() - spec.levels[1] / 2 * step, step
    if spec.method == "ddt":
        factor = LINEAR_FACTORS[spec.bits]
    else:
        factor = 1.0 if spec.bits in (1, 1.58) else 2 / spec.levels[1] ** 0.5
    return torch.zeros_like(x[0]), factor * mean_magnitude(x, sparse)


def window(f: Tensor, spec: QuantSpec) -> Tensor:
    """`f`, but constant where it lies more than half a spacing beyond the outer levels."""
    if spec.scale != "windowed":
        return f
    half = 1.0 if spec.bits == 1 and spec.scheme == "linear" else 0.5
    low, high = spec.levels
    return torch.where((f < low - half) | (f > high + half), f.detach(), f)


def linear_step(x: Tensor, spec: QuantSpec, sparse: bool) -> Tensor:
    """max|x| / qmax; where the largest level is 1 mean|x|, over the kept values of a sparse group."""
    if spec.levels[1] == 1:
        return mean_magnitude(x, sparse)
    return x.abs().max() / spec.levels[1]


def mean_magnitude(x: Tensor, sparse: bool) -> Tensor:
    """Mean of |x|, over the nonzero values of a sparse group."""
    count = max(int((x != 0).sum()), 1) if sparse else x.numel()
    return x.abs().sum() / count


def round_to_levels(f: Tensor, spec: QuantSpec, sparse: bool) -> Tensor:
    """The nearest level of each position; binary: the sign, 0 where a sparse tensor is 0."""
    if spec.bits == 1 and spec.scheme == "linear":
        return torch.where(f > 0, 1.0, torch.where(f < 0, -1.0, 0.0 if sparse else 1.0)).to(f.dtype)
    return f.round().clamp(*spec.levels)


def sparsity_mask(w: Tensor, sparsity: SparsitySpec, groups: Groups) -> Tensor:
    """Which values stay, by sorting in Python; ties go to the lower index."""
    along = Groups("token" if groups.kind == "token" else "channel", groups.axis)
    rows = rows_of(w.detach(), along).abs()
    keep = torch.zeros_like(rows, dtype=torch.bool)
    if sparsity.kind == "n:m":
        assert sparsity.n is not None and sparsity.m is not None
        for i in range(rows.shape[0]):
            for start in range(0, rows.shape[1], sparsity.m):
                run = rows[i, start : start + sparsity.m].tolist()
                for j in _best(run, sparsity.n):
                    keep[i, start + j] = True
        return rows_back(keep, w.shape, along)
    assert sparsity.ratio is not None
    if sparsity.kind == "unstructured":
        values = w.detach().abs().flatten().tolist()
        flat = torch.zeros(len(values), dtype=torch.bool)
        flat[_best(values, max(1, len(values) - round(sparsity.ratio * len(values))))] = True
        return flat.view(w.shape)
    assert sparsity.block_shape is not None
    high, wide = sparsity.block_shape
    corners = [(i, j) for i in range(0, rows.shape[0], high) for j in range(0, rows.shape[1], wide)]
    scores = [rows[i : i + high, j : j + wide].double().mean().item() for i, j in corners]
    for best in _best(scores, max(1, len(scores) - round(sparsity.ratio * len(scores)))):
        i, j = corners[best]
        keep[i : i + high, j : j + wide] = True
    return rows_back(keep, w.shape, along)


def rows_of(x: Tensor, groups: Groups) -> Tensor:
    """`Groups.to_rows`, one row after the other."""
    if groups.kind == "tensor" or x.dim() == 0:
        return x.reshape(1, -1)
    if groups.kind == "token":
        return x.reshape(-1, x.shape[-1])
    return torch.stack([x.select(groups.axis, i).reshape(-1) for i in range(x.shape[groups.axis])])


def rows_back(rows: Tensor, shape: torch.Size, groups: Groups) -> Tensor:
    """Inverse of `rows_of`."""
    if groups.kind != "channel" or len(shape) < 2:
        return rows.reshape(shape)
    axis = groups.axis % len(shape)
    rest = shape[:axis] + shape[axis + 1 :]
    return torch.stack([row.reshape(rest) for row in rows], dim=axis)


def _best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
