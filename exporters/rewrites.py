"""What torch's exporter cannot take as it is, written in operations that it can: in the traced copy only.

`ALWAYS` has no translation at all; `ATTENTION` fails for some models alone and is written out for those.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode

from qgraph.exporters.decompositions import DECOMPOSITIONS
from qgraph.exporters.symbolic import SYMBOLIC


class Rewrites(TorchFunctionMode):
    """While active, calls of the table's functions become what it says; `used` collects what was written out."""

    def __init__(self, table: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table
        self.used: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        result = NotImplemented
        if name in self.table:
            with self:
                result = self.table[name](*args, **(kwargs or {}))
        if result is NotImplemented:  # it need not be written out
            return func(*args, **(kwargs or {}))
        self.used[name] = None
        return result

    @property
    def notes(self) -> list[str]:
        """One line for each function that was written out."""
        return [f"{name} was written out as {_line(self.table[name])}" for name in self.used]


@contextlib.contextmanager
def modules_as_they_are() -> Iterator[None]:
    """While active, a module moved to where it is (``self.head.to(x.dtype)``) is left alone: its parameters are traced,
    and torch can swap no traced ones.
    """
    original = nn.Module._apply

    def apply(module: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        tensors = [*module.parameters(recurse), *module.buffers(recurse)]
        return module if all(fn(tensor) is tensor for tensor in tensors) else original(module, fn, recurse)

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


@contextlib.contextmanager
def values_unread() -> Iterator[None]:
    """While active, torch's own modules do not look into values, which a trace has not: the stacks of nn.Transformer
    take the causal mask as any other, and distributions do not check their arguments.
    """
    detect, validate = transformer._detect_is_causal_mask, Distribution._validate_args

    def as_given(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return bool(is_causal)

    transformer._detect_is_causal_mask = as_given
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect
        Distribution.set_default_validate_args(validate)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """matmul and softmax.

    Source:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if not isinstance(is_causal, bool) or is_causal:  # a symbolic bool: one query token attends to all keys either way
        length, total = query.shape[-2], key.shape[-2]
        causal = torch.ones(length, total, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if boolean else scores + attn_mask
    return torch.softmax(scores, -1) @ value


def grouped_product(x: Tensor, weights: Tensor, offs: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    """products with all groups, of which each row takes its own.

    Parameters
    ----------
    x : Tensor, shape (rows, n), float
    weights : Tensor, shape (groups, n, m), float
    offs : Tensor, shape (groups,), int
        Where the rows of each group end; rows after the last are left to the last group (torch leaves them undefined).
    """
    rows = torch.arange(x.shape[0], device=x.device)
    group = (rows[:, None] >= offs[None, :]).sum(1).clamp(max=weights.shape[0] - 1)
    every = x @ weights  # (groups, rows, m)
    return every.gather(0, group[None, :, None].expand(1, x.shape[0], weights.shape[2])).squeeze(0)


def subtracted_from(x: Tensor, other: Any, alpha: float = 1) -> Any:
    """a sum, in the type of the result: the exporter's type promotion stops at a number less a tensor.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.sub.html (``other - alpha * x``)
    """
    kind = torch.result_type(x, other)
    if x.dtype == kind:
        return NotImplemented
    x = x.to(kind)
    return (-x if alpha == 1 else x * -alpha) + other


def unmasked_attention(*args: Any, **kwargs: Any) -> Any:
    """matmul and softmax, a third of the nodes that torch writes.

    With a mask torch's own form stays: it says what becomes of a row without any key.
    """
    masked = kwargs.get("attn_mask") is not None or (len(args) > 3 and args[3] is not None)
    return NotImplemented if masked else attention(*args, **kwargs)


def detached(x: Tensor) -> Tensor:
    """detach: the tracer loses what `.data` gives."""
    return x.detach()


def overwritten(x: Tensor, value: Tensor) -> Any:
    """a copy into the tensor: the tracer loses an assignment."""
    if x.shape != value.shape or x.dtype != value.dtype:
        return NotImplemented
    x.detach().copy_(value)
    return None


def squeezed(x: Tensor, dim: Any = None) -> Any:
    """a squeeze of the dimensions that have one entry: ONNX has none of others, which torch leaves alone."""
    if dim is None or not x.dim():
        return NotImplemented
    dims = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
    ones = tuple(d for d in dims if x.shape[d] == 1)
    if len(ones) == len(dims):
        return NotImplemented
    return x.squeeze(ones) if ones else x.view_as(x)


ALWAYS: Mapping[str, Callable[..., Any]] = {
    **DECOMPOSITIONS,
    **SYMBOLIC,
    F.scaled_dot_product_attention.__name__: unmasked_attention,
    "grouped_mm": grouped_product,
    "_grouped_mm": grouped_product,
    "grouped_mm_fallback": grouped_product,
    "rsub": subtracted_from,
    "__rsub__": subtracted_from,
    ".data": detached,
    ".data =": overwritten,
    "squeeze": squeezed,
}
ATTENTION: Mapping[str, Callable[..., Any]] = {F.scaled_dot_product_attention.__name__: attention}


def _name(func: Any) -> str:
    if getattr(func, "__self__", None) is _DATA:
        return ".data" if func.__name__ == "__get__" else ".data ="
    return str(getattr(func, "__name__", "")).split(".")[0]  # an operator's is `name.overload`


_DATA: Any = Tensor.data


def _line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").splitlines()[0].rstrip(".")
