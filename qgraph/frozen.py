"""The modules of a frozen model: weights as packed integer codes, in the places of their quantizers.

`qgraph.freeze` puts them there. They keep the interface of what they replace, so that graphs, exports and inspection
need not tell them apart; the float weight that a graph hands them is None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qgraph.errors import CaptureError
from qgraph.modules import Sparsifier, WeightQuantizer, run_state
from qgraph.ops import Quantized

WIDTHS = (1, 2, 4, 8)  # bits a code takes in memory: those that fill a byte


class AlwaysOn:
    """A switch that cannot be turned off: there is no float weight to pass on."""

    site: str

    @property
    def enabled(self) -> bool:
        """True."""
        return True

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if not value:
            raise CaptureError(
                f"site '{self.site}': a frozen weight has codes alone and cannot be switched off; expected its "
                f"quantizer on. Switch it off in the prepared model, or name the activations alone."
            )


class FrozenWeight(AlwaysOn, WeightQuantizer):
    """One weight as codes, scales and zero points; gives the float weight.

    Buffers: ``codes``, uint8, packed, the first code in the lowest bits; ``scale`` and ``zero_point`` (affine only),
    float32, as in `Quantized`. `like` is the quantizer that it stands for.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, like: WeightQuantizer, quantized: Quantized, dtype: torch.dtype) -> None:
        super().__init__(like.spec, like.groups, like.site)
        assert quantized.codes is not None and quantized.scale is not None
        self.shape = tuple(quantized.codes.shape)
        self.sparse = quantized.sparse
        self.dtype = dtype
        low, high = self.spec.levels
        # Binary levels are -1 and +1, with 0 between them only where a weight is pruned.
        self.stride = 2 if self.spec.bits == 1 and self.spec.scheme == "linear" and not self.sparse else 1
        self.low = low
        count = (high - low) // self.stride + 1
        self.width = next(width for width in WIDTHS if count <= 2**width)
        self.register_buffer("codes", pack_bits((quantized.codes.flatten() - low) // self.stride, self.width))
        self.register_buffer("scale", quantized.scale.clone())
        self.register_buffer("zero_point", None if quantized.zero_point is None else quantized.zero_point.clone())

    def forward(self, weight: Tensor | None = None, dense: Tensor | None = None) -> Tensor:
        run = run_state()
        if run.exporting:
            run.emitted.add(self.site)
            stand_in = self.scale.new_zeros(self.shape, dtype=self.dtype)  # the exporter asks for its shape alone
            return torch.ops.qgraph.weight(stand_in, self.site)
        if run.collected is not None:
            run.collected.weights[self.site] = self.quantized()
        return self.dequantize()

    def quantized(self) -> Quantized:
        """What is deployed, with codes as level integers."""
        return self._quantized(torch.int16)

    def dequantize(self) -> Tensor:
        """The float weight, `scale * (code - zero_point)`."""
        return self._quantized(torch.float32).dequantize().to(self.dtype)

    def _quantized(self, dtype: torch.dtype) -> Quantized:
        count = 1
        for size in self.shape:
            count *= size
        levels = unpack_bits(self.codes, self.width, count).to(dtype) * self.stride + self.low
        zero = None if self.zero_point is None else self.zero_point.float()
        found = Quantized(levels.view(self.shape), self.scale.float(), zero, self.groups, self.spec, self.sparse)
        return found.with_scales_of(self.scale_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(self.scale.new_empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'x'.join(map(str, self.shape))} in {self.codes.numel()} bytes"


class FrozenSparsifier(AlwaysOn, Sparsifier):
    """What is left of a sparsifier: nothing before a frozen quantizer, else the pruned values, buffer ``values``."""

    values: Tensor | None

    def __init__(self, like: Sparsifier, pruned: Tensor | None) -> None:
        super().__init__(like.sparsity, like.groups, like.site, like.alone)
        self.register_buffer("values", pruned)

    def forward(self, weight: Tensor | None = None) -> Tensor | None:  # type: ignore[override]
        run = run_state()
        if run.exporting and self.values is not None:
            run.emitted.add(self.site)
            return torch.ops.qgraph.weight(self.values, self.site)
        if run.collected is not None:
            if self.sparsity is not None:
                run.collected.sparsity[self.site] = self.sparsity
            if self.values is not None:
                run.collected.weights[self.site] = Quantized(
                    None, None, None, self.groups, None, True, self.values.float()
                )
        return self.values


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Integers below 2^width, shape (n,), as bytes: uint8, shape (ceil(n width / 8),)."""
    per = 8 // width
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, -codes.shape[0] % per)).view(-1, per)
    shifts = torch.arange(0, 8, width, device=codes.device, dtype=torch.int32)
    return (padded << shifts).sum(1).to(torch.uint8)


def unpack_bits(data: Tensor, width: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: uint8, shape (count,)."""
    if width == 8:
        return data[:count]
    shifts = torch.arange(0, 8, width, device=data.device, dtype=torch.uint8)
    return ((data.unsqueeze(1) >> shifts) & (2**width - 1)).flatten()[:count]
