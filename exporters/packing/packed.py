"""`PackedWeight`: a quantized or sparse weight as the bytes that land in a file; `pack` and `unpack`.

`pack` takes the smallest format that is exact for the weight at hand; the formats are in dense.py,
ternary.py, masks.py and nm.py. Nothing of ONNX lives here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import comb, log2

import numpy as np
import torch
from numpy.typing import DTypeLike

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.ops.groups import Groups
from qgraph.ops.quantized import Quantized

from .dense import Bits, Floats
from .masks import TileMask
from .nm import LARGEST_GROUP, NMMask
from .streams import Stream, padded
from .ternary import Ternary

Mask = TileMask | NMMask
TILES = (4, 8, 16, 32, 64)  # square tiles looked for when nobody says how the weight was pruned


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Where a weight is in a stack of several, whose rows lie one under the other and which is packed as one."""

    name: str
    whole: PackedWeight
    rows: tuple[int, ...]
    index: int


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight in storage form.

    Parameters
    ----------
    shape : tuple of int
        Of the weight itself.
    groups, spec, sparse
        As in `Quantized`.
    arrays : dict of str to ndarray
        What a file holds: "packed", uint8 (lead, bytes), lead being the rows if each begins on a byte, else
        1 (float32 values if spec is None); "mask", uint8, for sparse formats; "scale" and "zero_point",
        (rows, groups).
    stream : Stream
        How "packed" holds the levels, or the kept levels of a sparse format.
    mask : Mask, optional
        How "mask" says which are kept; None for dense formats.
    part : Part, optional
        The stack that a file holds in place of the arrays.
    """

    shape: tuple[int, ...]
    groups: Groups
    spec: QuantSpec | None
    sparse: bool
    arrays: dict[str, np.ndarray]
    stream: Stream
    mask: Mask | None = None
    part: Part | None = None

    @property
    def format(self) -> str:
        """`bits1` .. `bits8`, `ternary`, `float`; behind `2:4+`, `mask+` or `mask4x4+` when sparse."""
        return self.stream.name if self.mask is None else f"{self.mask.name}+{self.stream.name}"

    @property
    def code_offset(self) -> int:
        """level = code_step * stored code + code_offset."""
        return self.stream.offset

    @property
    def code_step(self) -> int:
        """level = code_step * stored code + code_offset."""
        return self.stream.step

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def code_nbytes(self) -> int:
        """Bytes of the codes and the mask, without scales and zero points."""
        return sum(self.arrays[key].nbytes for key in ("packed", "mask") if key in self.arrays)

    @property
    def bits_per_weight(self) -> float:
        """Everything in the file, scales included, per weight."""
        return 8 * self.nbytes / max(1, self.numel)

    @property
    def rows(self) -> tuple[int, int]:
        """(rows, row length) of the layout that is stored: one row an output channel."""
        return row_shape(self.groups, self.shape)

    @property
    def lead(self) -> int:
        """Rows of "packed" that begin on a byte: all of them, or 1 for one run over the whole weight."""
        return self.arrays["packed"].shape[0] if "packed" in self.arrays else 1

    @property
    def aligned(self) -> bool:
        """Whether single rows can be taken out: each begins on a byte."""
        return self.lead == self.rows[0] and not isinstance(self.mask, TileMask)

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest level that may occur."""
        if self.spec is None:
            raise ValueError("a weight that is sparse but not quantized has no levels; use its float values")
        low, high = self.spec.levels
        return (min(low, 0), high) if self.sparse else (low, high)


def pack(
    q: Quantized,
    *,
    sparsity: SparsitySpec | None = None,
    scale_dtype: DTypeLike = np.float32,
    align_rows: bool = False,
) -> PackedWeight:
    """Pack a weight into the smallest format that holds it exactly.

    Parameters
    ----------
    q : Quantized
    sparsity : SparsitySpec, optional
        How a sparse weight was pruned. Left out, the pattern is looked for in the zeros.
    scale_dtype : float32 or float16
        In which type scales are stored; float16 rounds them.
    align_rows : bool
        Begin each row on a byte, so that single rows can be gathered (embeddings); of the sparse formats
        only N:M can. Rows that fill whole bytes anyway are stored so in any case.

    Returns
    -------
    PackedWeight
    """
    source = q.values if q.codes is None else q.codes
    if source is None:
        raise ValueError("pack: the Quantized has neither codes nor values; expected one of them")
    shape = tuple(source.shape)
    rows = q.groups.sparsity_rows().to_rows(source.detach().cpu()).numpy()
    rows = rows.reshape(row_shape(q.groups, shape))
    if rows.size == 0:
        align_rows = True
    arrays: dict[str, np.ndarray] = {}
    if q.scale is not None:
        arrays["scale"] = q.scale.detach().cpu().numpy().astype(scale_dtype)
    if q.zero_point is not None:
        arrays["zero_point"] = q.zero_point.detach().cpu().numpy().astype(np.float32)
    best = _dense(rows, q.spec, align_rows)
    symmetric = q.spec is None or q.spec.scheme == "linear"
    if q.sparse and symmetric and rows.size:
        best = min([best, *_sparse(rows, q.spec, sparsity, align_rows)], key=_cost)
    codes, stream, mask = best
    return PackedWeight(shape, q.groups, q.spec, q.sparse, codes | arrays, stream, mask)


def unpack(p: PackedWeight) -> Quantized:
    """The inverse of `pack`, in numpy: what the ONNX nodes that decode `p` compute."""
    rows, columns = p.rows
    if p.mask is None:
        levels = p.stream.decode(p.arrays["packed"], rows * columns // max(1, p.lead) if rows else 0)
        levels = levels.reshape(rows, columns)
    else:
        count = p.mask.count(rows, columns)
        kind = np.float32 if p.spec is None else np.int16
        kept = np.zeros((1, 0), kind)
        if "packed" in p.arrays:
            kept = p.stream.decode(p.arrays["packed"], count // p.lead)
        levels = p.mask.decode(p.arrays["mask"], kept, rows, columns)
    tensor = torch.from_numpy(np.ascontiguousarray(levels))
    tensor = p.groups.sparsity_rows().from_rows(tensor, p.shape).contiguous()
    if p.spec is None:
        return Quantized(None, None, None, p.groups, None, p.sparse, tensor.float())
    scale = torch.from_numpy(p.arrays["scale"].astype(np.float32))
    zero = torch.from_numpy(p.arrays["zero_point"].copy()) if "zero_point" in p.arrays else None
    return Quantized(tensor.to(torch.int16), scale, zero, p.groups, p.spec, p.sparse)


def restore(
    shape: tuple[int, ...],
    groups: Groups,
    spec: QuantSpec | None,
    sparse: bool,
    format: str,
    arrays: dict[str, np.ndarray],
) -> PackedWeight:
    """The weight whose `format`, `arrays` and so on these are.

    Raises
    ------
    ValueError
        When they do not go together: nothing is unpacked that the bytes at hand do not hold.
    """
    mask_name, _, stream_name = format.rpartition("+")
    rows, columns = row_shape(groups, shape)
    mask: Mask | None = None
    if mask_name:
        data = arrays["mask"]
        if rows * columns > 64 * data.size:  # the densest: a bit for each 8 weights
            raise ValueError(f"{data.size} bytes of mask are too few for {rows} x {columns} weights")
        kind = NMMask if ":" in mask_name else TileMask
        mask = kind.restore(mask_name, data, rows, columns)
    stream = _stream_called(stream_name, spec)
    count = rows * columns if mask is None else mask.count(rows, columns)
    packed = arrays.get("packed")
    if packed is None or packed.ndim != 2 or not packed.shape[0]:
        if count or (packed is not None and packed.size):
            raise ValueError(f"no codes for {count} weights")
    elif packed.nbytes != packed.shape[0] * stream.size(count // packed.shape[0]) or count % packed.shape[0]:
        raise ValueError(f"codes of shape {packed.shape} do not hold {count} weights as {stream_name}")
    if spec is not None:
        _check_scales(shape, groups, spec, arrays)
    return PackedWeight(shape, groups, spec, sparse, arrays, stream, mask)


def _stream_called(name: str, spec: QuantSpec | None) -> Stream:
    if name == "float":
        return Floats()
    if name == "ternary":
        return Ternary()
    found = re.fullmatch("bits([1-8])", name)
    if found is None or spec is None:
        raise ValueError(f"{name!r} is no format of codes")
    return Bits.affine(int(found[1])) if spec.scheme == "affine" else Bits.linear(int(found[1]))


def _check_scales(shape: tuple[int, ...], groups: Groups, spec: QuantSpec, arrays: dict[str, np.ndarray]) -> None:
    expected = groups.shape(shape)
    for name in ("scale", "zero_point") if spec.scheme == "affine" else ("scale",):
        if name not in arrays or arrays[name].shape != expected:
            raise ValueError(f"{name}: found {arrays[name].shape if name in arrays else None}; expected {expected}")


def row_shape(groups: Groups, shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, row length) of a weight laid out by output channel, whatever shares a scale."""
    if not shape:
        return 1, 1
    axis = len(shape) - 1 if groups.kind == "token" else groups.axis % len(shape)
    length = int(np.prod(shape, dtype=np.int64)) // shape[axis] if shape[axis] else _product_without(shape, axis)
    if groups.kind == "token":
        return _product_without(shape, axis), shape[axis]
    return shape[axis], length


def _product_without(shape: tuple[int, ...], axis: int) -> int:
    return int(np.prod([size for i, size in enumerate(shape) if i != axis], dtype=np.int64))


_Coded = tuple[dict[str, np.ndarray], Stream, Mask | None]


def _cost(coded: _Coded) -> int:
    arrays, _, mask = coded
    return sum(array.nbytes for array in arrays.values()) + (mask.table_bytes if mask else 0)


def _dense(rows: np.ndarray, spec: QuantSpec | None, align_rows: bool) -> _Coded:
    stream = _stream_for(rows, spec)
    aligned = align_rows or stream.size(rows.shape[1]) * rows.shape[0] == stream.size(rows.size)
    return {"packed": stream.encode(rows if aligned else rows.reshape(1, -1))}, stream, None


def _stream_for(levels: np.ndarray, spec: QuantSpec | None) -> Stream:
    """The smallest alphabet that holds these levels: signs, trits, or the bits of the spec."""
    if spec is None:
        return Floats()
    if spec.scheme == "affine":
        return Bits.affine(int(spec.bits))
    largest = int(np.abs(levels).max(initial=0))
    if largest <= 1:
        return Bits.linear(1) if levels.size and bool((levels != 0).all()) else Ternary()
    return Bits.linear(max(2, int(spec.bits)))


def _sparse(rows: np.ndarray, spec: QuantSpec | None, sparsity: SparsitySpec | None, align_rows: bool) -> list[_Coded]:
    pattern = _pattern_of(rows, sparsity)
    found = NMMask.encode(rows, *pattern, align_rows) if pattern is not None else None
    result = [] if found is None else [_with_kept(*found, spec)]
    if align_rows:
        return result
    tile = _tile_of(rows, sparsity)
    tiles = [(1, 1)] if tile is None else [(1, 1), tile]
    return result + [_with_kept(*TileMask.encode(rows, *tile), spec) for tile in tiles]


def _with_kept(mask: Mask, data: np.ndarray, kept: np.ndarray, spec: QuantSpec | None) -> _Coded:
    stream = _stream_for(kept, spec)
    arrays = {"packed": stream.encode(kept)} if kept.size else {}
    return arrays | {"mask": data}, stream, mask


def _tile_of(rows: np.ndarray, sparsity: SparsitySpec | None) -> tuple[int, int] | None:
    """The tile that the weight was pruned in: as said, else the square one that leaves the fewest bytes."""
    if sparsity is not None:
        return sparsity.block_shape
    best, least = None, float((rows != 0).sum()) + rows.size
    for side in TILES:
        whole = padded(padded(rows != 0, side, 0), side, 1)
        tall, wide = whole.shape[0] // side, whole.shape[1] // side
        kept = int(whole.reshape(tall, side, wide, side).any(axis=(1, 3)).sum())
        cost = kept * side * side + tall * wide
        if cost < least:
            best, least = (side, side), cost
    return best


def _pattern_of(rows: np.ndarray, sparsity: SparsitySpec | None) -> tuple[int, int] | None:
    """The N:M that the weight was pruned to: as said, else the one of fewest bits among those that hold."""
    if sparsity is not None:
        return (sparsity.n, sparsity.m) if sparsity.n and sparsity.m else None
    used = rows != 0
    best, least = None, float("inf")
    for m in range(2, LARGEST_GROUP + 1):
        n = int(padded(used, m, 1).reshape(-1, m).sum(axis=1).max(initial=0))
        cost = (log2(comb(m, n)) + 2 * n) / m if 0 < n < m else float("inf")
        if cost < least:
            best, least = (n, m), cost
    return best
