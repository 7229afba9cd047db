"""Several weights as one: rows under rows, packed and unpacked together, then cut apart.

The names, tensors and unpacking nodes of a small weight take more bytes than its codes; a stack has them once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import Tensor

from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.ops.quantized import Quantized

from .packed import PackedWeight


def stack(weights: Sequence[Quantized]) -> Quantized:
    """Weights of one kind, whose rows are their first dimension, as one."""
    return replace(
        weights[0],
        codes=_joined([weight.codes for weight in weights]),
        scale=_joined([weight.scale for weight in weights]),
        zero_point=_joined([weight.zero_point for weight in weights]),
        values=_joined([weight.values for weight in weights]),
    )


def unstack(whole: Quantized, rows: Sequence[int]) -> list[Quantized]:
    """The inverse of `stack`."""

    def cut(tensor: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(rows) if tensor is None else tensor.split(list(rows))

    parts = zip(*map(cut, (whole.codes, whole.scale, whole.zero_point, whole.values)), strict=True)
    return [
        replace(whole, codes=codes, scale=scale, zero_point=zero_point, values=values)
        for codes, scale, zero_point, values in parts
    ]


def shares(total: int, rows: Sequence[int]) -> list[int]:
    """Bytes of a stack by its rows, whole numbers that add up to `total`."""
    ends = [total * sum(rows[:i]) // max(1, sum(rows)) for i in range(len(rows) + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def rows_of(
    b: GraphBuilder,
    p: PackedWeight,
    name: str,
    kind: Hashable,
    emit: Callable[[PackedWeight, str], Sequence[ir.Value]],
) -> list[ir.Value]:
    """What `emit` makes of a weight and its name, values whose first dimension are its rows.

    Of a weight in a stack they are cut out of what `emit` makes of the whole, once for each `kind`.
    """
    if p.part is None:
        return list(emit(p, name))
    part = p.part

    def cut() -> list[Sequence[ir.Value]]:
        node, rows = f"{part.name}.unpack", b.ints(part.rows)
        values = emit(part.whole, part.name)
        return [b.ops("Split", [value, rows], outputs=len(part.rows), name=node) for value in values]

    return [pieces[part.index] for pieces in b.once((part.name, kind), cut)]


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(given) if given else None
