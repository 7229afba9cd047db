"""The passes of `ddt.py` on a CPU, eager: the same formulas in as few passes over memory as torch's kernels allow.

Groups are the rows of a matrix, worked off in chunks that stay in cache: codes are written where the result will be,
everything else goes to buffers of a chunk. What a chunk holds does not change the result, no group is cut.
Compiled, traced, on other devices and in float64 `ddt.py` does the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.ops import eager
from qgraph.ops.codes import clips, is_binary, middle, nonzero_scale, step_and_offset, window

# Values a chunk and thread: large enough to hide the calls, small enough for a buffer to be in cache and reused.
CHUNK = 1 << 19
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def applies(dense: Tensor, sparse: Tensor | None) -> bool:
    """Whether the functions here may be used; else those of `ddt.py` are."""
    if sparse is None:
        return dense.dtype in NARROW and eager.on_cpu(dense)
    return dense.dtype == sparse.dtype and dense.dtype in NARROW and eager.on_cpu(dense, sparse)


def forward(dense: Tensor, sparse: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Denoised values and the statistics of `ddt.centred_codes`, shape (rows, groups, 6)."""
    rows, pruned = _rows(dense), None if sparse is None else _rows(sparse)
    y = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    narrow = y.dtype != torch.float32
    positions, codes = _buffer(rows), _buffer(rows) if narrow else y
    stats = []
    for part in _chunks(rows):
        x, kept = rows[part].float(), None if pruned is None else pruned[part].float()
        count = x.shape[0]
        q = codes[:count] if narrow else y[part]
        stats.append(_forward_chunk(x, kept, spec, positions[:count], q))
        if narrow:
            y[part] = q
    return y.view(dense.shape), torch.cat(stats).view(*dense.shape[:2], 6)


def gradient(h: Tensor, dense: Tensor, sparse: Tensor | None, stats: Tensor, spec: QuantSpec) -> Tensor:
    """`ddt.gradient`, with `f` and `q` in the place of `e` and `qc`, which saves two passes."""
    rows, pruned, upstream = _rows(dense), None if sparse is None else _rows(sparse), _rows(h)
    grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    narrow = grad.dtype != torch.float32
    positions, codes, wide = _buffer(rows), _buffer(rows), _buffer(rows) if narrow else grad
    per_group = stats.reshape(-1, 6)
    for part in _chunks(rows):
        x, kept = rows[part].float(), None if pruned is None else pruned[part].float()
        count = x.shape[0]
        out = wide[:count] if narrow else grad[part]
        _gradient_chunk(upstream[part].float(), x, kept, per_group[part], spec, positions[:count], codes[:count], out)
        if narrow:
            grad[part] = out
    return grad.view(dense.shape)


def _forward_chunk(x: Tensor, pruned: Tensor | None, spec: QuantSpec, f: Tensor, q: Tensor) -> Tensor:
    """Values to `q`; returns the statistics, (rows, 6). Overwrites `f`."""
    n = x.shape[1]
    source = x if pruned is None else pruned
    affine = spec.scheme == "affine"
    step, offset = step_and_offset(source, spec, pruned is not None)
    if offset is not None:
        _codes(x, pruned, step, offset, spec, f, q)
        mean_q = q.mean(1, keepdim=True)
        mean_f = f.sub_(q).mean(1, keepdim=True).add_(mean_q)
        q.sub_(mean_q)
    else:
        step = nonzero_scale(step)
        mean_q = mean_f = torch.zeros_like(step)
        _codes(x, pruned, step, None, spec, f, q)
    variance = torch.linalg.vector_norm(q, dim=1, keepdim=True).square_().div_(n)
    ridge = variance + spec.lam
    if spec.lam == 0:
        ridge.masked_fill_(ridge == 0, 1)
    slope = f.mul_(q).mean(1, keepdim=True)  # affine: f is e by now, whose small products lose no digits
    if affine:
        slope.add_(variance)
    slope.div_(ridge)
    q.mul_(slope * step)
    if offset is None:
        offset = mean_q
    else:
        q.add_(torch.addcmul(offset, mean_f, step))
    return torch.cat([step, offset, mean_q, mean_f, slope, ridge], dim=1)


def _gradient_chunk(
    h: Tensor, x: Tensor, pruned: Tensor | None, stats: Tensor, spec: QuantSpec, f: Tensor, q: Tensor, out: Tensor
) -> None:
    """`a h + (m / V) (f + (2 k - 1) q) + constant` to `out`; overwrites `f` and `q`."""
    step, offset, mean_q, mean_f, slope, ridge = stats.t().contiguous().unsqueeze(-1).unbind()
    n = x.shape[1]
    affine = spec.scheme == "affine"
    _codes(x, pruned, step, offset if affine else None, spec, f, q)
    push = torch.mul(h, q, out=out).sum(1, keepdim=True)
    if affine:
        mean_h = h.mean(1, keepdim=True)
        push.addcmul_(mean_q, mean_h, value=-n)
    push.div_(ridge).div_(n)
    of_codes = (1 - 2 * slope).mul_(push)
    torch.mul(h, slope, out=out).addcmul_(q, of_codes).addcmul_(f, push)
    if affine:
        out.add_((1 - slope).mul_(mean_h).addcmul_(push, mean_f, value=-1).addcmul_(of_codes, mean_q, value=-1))
    reach = window(spec)
    if reach is None:
        return
    q.mul_(push)  # what a constant code leaves
    if affine:
        q.add_(mean_h.addcmul_(push, mean_q, value=-1))
    if pruned is not None:
        _positions(pruned, step, offset if affine else None, f)
    f.sub_(middle(spec)).abs_().gt_(reach)
    out.lerp_(q, f)  # 1 where a code is constant, else 0; faster than torch.where, which takes a bool


def _codes(
    x: Tensor, pruned: Tensor | None, step: Tensor, offset: Tensor | None, spec: QuantSpec, f: Tensor, q: Tensor
) -> None:
    """Positions of the dense values to `f`, codes to `q`."""
    if pruned is not None:
        _positions(pruned, step, offset, f)
        if is_binary(spec):
            torch.sign(f, out=q)
        else:
            torch.round(f, out=q)
            if clips(spec):
                q.clamp_(*spec.levels)
        _positions(x, step, offset, f)
        return
    _positions(x, step, offset, f)
    if is_binary(spec):
        torch.ge(f, 0, out=q)
        torch.add(f.new_full((1, 1), -1.0), q, alpha=2, out=q)
        return
    torch.round(f, out=q)
    if clips(spec):  # else |f| does not exceed the levels by more than a rounding
        q.clamp_(*spec.levels)


def _positions(x: Tensor, step: Tensor, offset: Tensor | None, out: Tensor) -> None:
    if offset is None:
        torch.div(x, step, out=out)
    else:
        torch.sub(x, offset, out=out).div_(step)


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def _buffer(rows: Tensor) -> Tensor:
    return torch.empty(min(_rows_a_chunk(rows), rows.shape[0]), rows.shape[1], dtype=torch.float32, device=rows.device)


def _rows_a_chunk(rows: Tensor) -> int:
    return max(1, CHUNK * torch.get_num_threads() // rows.shape[1])


def _chunks(rows: Tensor) -> Iterator[slice]:
    size = _rows_a_chunk(rows)
    for start in range(0, rows.shape[0], size):
        yield slice(start, min(start + size, rows.shape[0]))
