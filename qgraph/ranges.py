"""The state of a static activation range: running averages, as batch norm keeps its statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qgraph.config import QuantSpec
from qgraph.errors import CalibrationError
from qgraph.ops.sharded import whole
from qgraph.ops.static import FixedScale, fake_quantize_static, static_codes, static_gain, static_scale

MOMENTUM = 0.01  # of a new batch, once there were 1 / MOMENTUM of them: up to then a plain average


class RunningRange(nn.Module):
    """Averages over batches of the least value, the largest and, for the denoising transform, the gain.

    In training a quantizer uses the batch's own range and updates the averages; in eval it uses those. A batch with
    NaN or Inf is left out of them. Buffers ``low``, ``high``, ``gain`` (float32) and ``batches`` (int64), all scalars;
    ``batches`` is 0 until there is a range.
    """

    low: Tensor
    high: Tensor
    gain: Tensor
    batches: Tensor

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self._seen = False  # whether `batches` was found above 0: it cannot fall, and reading it waits for a GPU

    @property
    def known(self) -> bool:
        """Whether there is a range."""
        if not self._seen:
            self._seen = bool(self.batches > 0)
        return self._seen

    def quantize(self, x: Tensor, site: str) -> Tensor:
        """Quantize with the range of `x` itself in training, which also updates the averages; else with those.

        Raises
        ------
        CalibrationError
            In eval, while there is no range. Compiled code gives NaN in its place.
        """
        if x.numel() == 0:
            return x.clone()
        if self.training:
            return self._quantize_and_learn(x)
        if not torch.compiler.is_compiling():
            self.require(site)
        step, zero = self.scale()
        return fake_quantize_static(x, self.spec, step=step, zero=zero, gain=self.gain.float())

    def _quantize_and_learn(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            wide = whole(x.detach())
            wide = wide.float() if wide.dtype != torch.float64 else wide
            low, high = (value.float() for value in torch.aminmax(wide))
            step, zero = static_scale(low, high, self.spec)
            gain = self.gain.new_ones(())
            if self.spec.method == "ddt":
                gain = static_gain(wide, static_codes(wide, step, zero, self.spec), step, self.spec.lam).float()
            self._average(low, high, gain)
        known = None if self.spec.method == "ddt" else gain
        return fake_quantize_static(x, self.spec, step=step, zero=zero, gain=known)

    def _average(self, low: Tensor, high: Tensor, gain: Tensor) -> None:
        finite = torch.isfinite(low) & torch.isfinite(high)
        rate = (1 / (self.batches + 1)).clamp(min=MOMENTUM)
        for buffer, new in ((self.low, low), (self.high, high), (self.gain, gain)):
            buffer.copy_(torch.where(finite, buffer + rate * (new - buffer), buffer))
        self.batches.add_(finite)

    def scale(self) -> tuple[Tensor, Tensor]:
        """Step and zero point of the averages, float32 scalars; NaN while there is no range."""
        low = torch.where(self.batches > 0, self.low.float(), torch.nan)
        return static_scale(low, self.high.float(), self.spec)

    def fixed(self) -> FixedScale:
        """The range as numbers."""
        step, zero = self.scale()
        return FixedScale(float(step), int(zero), float(self.gain.float()))

    def set(self, low: float, high: float, gain: float, batches: int) -> None:
        """Take a range that was found over so many batches."""
        with torch.no_grad():
            self.low.fill_(low)
            self.high.fill_(high)
            self.gain.fill_(gain)
            self.batches.fill_(batches)
        self._seen = batches > 0

    def require(self, site: str) -> None:
        """Raise CalibrationError while there is no range."""
        if not self.known:
            raise CalibrationError(
                f"site '{site}': its activation has no static range yet; expected one before eval. Call "
                f"qgraph.calibrate(prepared, batches), or run some batches in train mode."
            )

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen = False

    def extra_repr(self) -> str:
        return f"{float(self.low):g} to {float(self.high):g}" if self.known else "no range yet"
