"""Functions that torch's exporter has no translation for, written in operations that it has.

Each computes what torch does, to float rounding; those that compare all pairs along a dimension take memory in its
square. A function that returns NotImplemented leaves the call as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_MM_ROWS = 25  # from here on torch takes the product for Euclidean distances


def distances(
    x: Tensor, y: Tensor, p: float = 2.0, compute_mode: str | None = "use_mm_for_euclid_dist_if_necessary"
) -> Tensor:
    """differences of all pairs, or a matrix product where torch takes one.

    Parameters
    ----------
    x, y : Tensor, shapes (..., n, features) and (..., m, features), float

    Returns
    -------
    Tensor, shape (..., n, m)

    Source: https://docs.pytorch.org/docs/stable/generated/torch.cdist.html
    """
    rows = [n for n in (x.shape[-2], y.shape[-2]) if isinstance(n, int)]
    product = compute_mode == "use_mm_for_euclid_dist" or (
        compute_mode in (None, "use_mm_for_euclid_dist_if_necessary") and any(n > _MM_ROWS for n in rows)
    )
    if p == 2 and product:
        squares = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
        ones = torch.ones_like(squares[0]), torch.ones_like(squares[1])
        left, right = torch.cat([-2 * x, squares[0], ones[0]], -1), torch.cat([y, ones[1], squares[1]], -1)
        return (left @ right.mT).clamp(min=0).sqrt()
    difference = (x.unsqueeze(-2) - y.unsqueeze(-3)).abs()
    if p == 0:
        return (difference != 0).to(x.dtype).sum(-1)
    if p == 1:
        return difference.sum(-1)
    if p == 2:
        return difference.square().sum(-1).sqrt()
    return difference.amax(-1) if math.isinf(p) else difference.pow(p).sum(-1).pow(1 / p)


def positions(
    sorted_sequence: Tensor,
    input: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """a count of the smaller values.

    Parameters
    ----------
    sorted_sequence : Tensor, shape (n,) or (..., n)
    input : Tensor, any shape or (..., m), or a number

    Source: https://docs.pytorch.org/docs/stable/generated/torch.searchsorted.html
    """
    ordered = sorted_sequence if sorter is None else sorted_sequence.gather(-1, sorter)
    values = input if isinstance(input, Tensor) else torch.tensor(input, device=ordered.device)
    if ordered.dim() > 1:
        ordered = ordered.unsqueeze(-2)
    before = ordered <= values.unsqueeze(-1) if right or side == "right" else ordered < values.unsqueeze(-1)
    return before.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def largest_so_far(input: Tensor, dim: int) -> Any:
    """the largest of all values up to each.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.cummax.html
    """
    if not input.is_floating_point():
        return NotImplemented
    pairs, earlier = _up_to_each(input, dim)
    last = pairs.shape[-1] - 1
    known = pairs.masked_fill(~earlier, -math.inf)
    values, indices = known.amax(-1), last - known.flip(-1).argmax(-1)  # of equal values torch takes the last
    return torch.return_types.cummax((values.movedim(-1, dim), indices.movedim(-1, dim)))


def smallest_so_far(input: Tensor, dim: int) -> Any:
    """the largest of all negated values up to each.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.cummin.html
    """
    if not input.is_floating_point():
        return NotImplemented
    values, indices = largest_so_far(-input, dim)
    return torch.return_types.cummin((-values, indices))


def product_so_far(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """the product of all values up to each.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.cumprod.html
    """
    integers = not (input.is_floating_point() or input.is_complex())
    x = input.to(dtype or (torch.int64 if integers else input.dtype))
    pairs, earlier = _up_to_each(x, dim)
    return pairs.masked_fill(~earlier, 1).prod(-1).movedim(-1, dim)


def median(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """the middle of the sorted values.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.median.html
    """
    if dim is None:
        flat = input.flatten()
        return flat.sort().values[(flat.shape[0] - 1) // 2]
    return torch.return_types.median(_kth(input, (input.shape[dim] + 1) // 2, dim, keepdim))


def kth_value(input: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    """a place among the sorted values.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.kthvalue.html
    """
    return torch.return_types.kthvalue(_kth(input, k, dim, keepdim))


def scattered(input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    """a sum divided by a count, for means; the exporter's own leaves the division out.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.Tensor.scatter_reduce_.html
    """
    if reduce != "mean" or not input.is_floating_point():
        return NotImplemented
    src = src[tuple(slice(0, size) for size in index.shape)]
    added = torch.zeros_like(input).scatter_add(dim, index, src)
    count = torch.zeros_like(input).scatter_add(dim, index, torch.ones_like(src))
    if include_self:
        return (input + added) / (count + 1)
    return torch.where(count > 0, added / count.clamp(min=1), input)


def smoothed_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """the sum over the classes; the exporter's own leaves the smoothing out, and takes no probabilities.

    Parameters
    ----------
    input : Tensor, shape (classes,) or (n, classes, ...)
    target : Tensor, shape () or (n, ...) of int, or probabilities of the shape of `input`

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
    """
    probabilities = target.is_floating_point()
    if size_average is not None or reduce is not None or not (label_smoothing or probabilities):
        return NotImplemented
    at = min(1, input.dim() - 1)
    logs, classes = input.log_softmax(at), input.shape[at]
    weights = torch.ones(classes, dtype=input.dtype, device=input.device) if weight is None else weight
    shape = [classes if dim == at else 1 for dim in range(input.dim())]
    weighted = logs * weights.reshape(shape)
    if probabilities:
        share = target * (1 - label_smoothing) + label_smoothing / classes
        losses, total = -(weighted * share).sum(at), None
    else:
        kept = target != ignore_index
        chosen = torch.where(kept, target, 0)
        total = torch.where(kept, weights[chosen], 0.0)
        named = -weighted.gather(at, chosen.unsqueeze(at)).squeeze(at)
        losses = (1 - label_smoothing) * named - label_smoothing / classes * weighted.sum(at)
        losses = torch.where(kept, losses, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if total is None else losses.sum() / total.sum()


def _up_to_each(input: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """All values for each place along `dim`, shape (..., n, n), and which of them come no later."""
    last = input.movedim(dim, -1)
    places = torch.arange(last.shape[-1], device=input.device)
    pairs = last.unsqueeze(-2).expand(*last.shape, last.shape[-1])
    return pairs, places <= places.unsqueeze(-1)


def _kth(input: Tensor, k: Any, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    values, indices = (part.narrow(dim, k - 1, 1) for part in input.sort(dim))
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


DECOMPOSITIONS: Mapping[str, Callable[..., Any]] = {
    "cdist": distances,
    "searchsorted": positions,
    "cummax": largest_so_far,
    "cummin": smallest_so_far,
    "cumprod": product_so_far,
    "median": median,
    "kthvalue": kth_value,
    "scatter_reduce": scattered,
    "cross_entropy": smoothed_cross_entropy,
}
