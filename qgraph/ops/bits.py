"""Codes in the fewest bits that fill a byte: 1, 2, 4 or 8 of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod

import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.ops.quantized import Quantized

WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Layout:
    """How levels are told apart in memory: level = stride * code + low, each code in `width` bits."""

    low: int
    stride: int
    width: int

    @classmethod
    def of(cls, spec: QuantSpec, sparse: bool) -> Layout:
        """Of the levels of a spec; `sparse` ones have 0 among them."""
        low, high = spec.levels
        # Binary levels are -1 and +1, with 0 between them only where a weight is pruned.
        stride = 2 if spec.bits == 1 and spec.scheme == "linear" and not sparse else 1
        count = (high - low) // stride + 1
        return cls(low, stride, next(width for width in WIDTHS if count <= 2**width))

    def pack(self, levels: Tensor) -> Tensor:
        """Levels, any shape, as bytes: uint8, (ceil(n width / 8),), the first code in the lowest bits."""
        codes = (levels.flatten() - self.low).to(torch.uint8)
        return pack_bits(codes if self.stride == 1 else codes // self.stride, self.width)

    def unpack(self, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The inverse of `pack`."""
        return (unpack_bits(data, self.width, prod(shape)).to(dtype) * self.stride + self.low).view(shape)


@dataclass(frozen=True, slots=True, eq=False)
class Compact:
    """A `Quantized` that takes a few bits a code while it waits: `expand` gives it back."""

    rest: Quantized  # without codes
    data: Tensor | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, quantized: Quantized) -> Compact:
        """Pack the codes, where there are any."""
        if quantized.codes is None or quantized.spec is None:
            return cls(quantized, None, ())
        data = Layout.of(quantized.spec, quantized.sparse).pack(quantized.codes)
        return cls(replace(quantized, codes=None), data, tuple(quantized.codes.shape))

    def equals(self, other: Compact) -> bool:
        """Whether two deploy the same codes and scales."""
        mine, theirs = ((c.data, *(getattr(c.rest, f.name) for f in fields(c.rest))) for c in (self, other))
        return self.shape == other.shape and all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b
            for a, b in zip(mine, theirs, strict=True)
        )

    def expand(self) -> Quantized:
        """The same as was given."""
        if self.data is None or self.rest.spec is None:
            return self.rest
        layout = Layout.of(self.rest.spec, self.rest.sparse)
        return replace(self.rest, codes=layout.unpack(self.data, self.shape, torch.int16))


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Integers below 2^width, shape (n,), as bytes: uint8, shape (ceil(n width / 8),)."""
    per = 8 // width
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[0] % per)).view(-1, per)
    packed = padded[:, 0].clone()
    for place in range(1, per):
        packed |= padded[:, place] << place * width
    return packed


def unpack_bits(data: Tensor, width: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: uint8, shape (count,)."""
    if width == 8:
        return data[:count]
    shifts = torch.arange(0, 8, width, device=data.device, dtype=torch.uint8)
    return ((data.unsqueeze(1) >> shifts) & (2**width - 1)).flatten()[:count]
