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
from qgraph.ops.bits import Layout


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
        self.layout = Layout.of(self.spec, self.sparse)
        self.register_buffer("codes", self.layout.pack(quantized.codes))
        self.register_buffer("scale", quantized.scale.clone())
        self.register_buffer("zero_point", None if quantized.zero_point is None else quantized.zero_point.clone())

    def forward(self, weight: Tensor | None = None, dense: Tensor | None = None) -> Tensor:
        run = run_state()
        if run.exporting:
            run.emitted.add(self.site)
            stand_in = self.scale.new_zeros(self.shape, dtype=self.dtype)  # the exporter asks for its shape alone
            return torch.ops.qgraph.weight(stand_in, self.site)
        if run.collected is not None:
            run.collected.add_weight(self.site, self.quantized())
        return self.dequantize()

    def quantized(self) -> Quantized:
        """What is deployed, with codes as level integers."""
        return self._quantized(torch.int16)

    def dequantize(self) -> Tensor:
        """The float weight, `scale * (code - zero_point)`."""
        return self._quantized(torch.float32).dequantize().to(self.dtype)

    def _quantized(self, dtype: torch.dtype) -> Quantized:
        levels = self.layout.unpack(self.codes, self.shape, dtype)
        zero = None if self.zero_point is None else self.zero_point.float()
        found = Quantized(levels, self.scale.float(), zero, self.groups, self.spec, self.sparse)
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
                left = Quantized(None, None, None, self.groups, None, True, self.values.float())
                run.collected.add_weight(self.site, left)
        return self.values
