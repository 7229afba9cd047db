"""How the values of a weight are spread before and after quantization, and where its levels lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgraph.frozen import FrozenWeight
from qgraph.graph import SiteRecord
from qgraph.inspection.prepared import site_values
from qgraph.ops import Groups, quantize, sparsify

__all__ = ["Histogram", "Level", "file_histograms", "histogram", "model_histograms", "prepared_histograms"]

BINS = 64
MOST_LEVELS = 32  # more are a comb that nobody can read
SPREAD = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True)
class Level:
    """One code, and the values that it stands for: the 10 %, 50 % and 90 % quantiles over groups."""

    code: int
    low: float
    middle: float
    high: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of a weight's values in equal bins from `low` to `high`.

    Parameters
    ----------
    low, high : float
    before, after : tuple of int, or None
        Of the float weight and of what it is rounded to; None where it is not known or not quantized.
    levels : tuple of Level
        Empty for more than 32 levels.
    """

    low: float
    high: float
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None
    levels: tuple[Level, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "low": _short(self.low),
            "high": _short(self.high),
            "before": None if self.before is None else list(self.before),
            "after": None if self.after is None else list(self.after),
            "levels": [
                {"code": x.code, "low": _short(x.low), "middle": _short(x.middle), "high": _short(x.high)}
                for x in self.levels
            ],
        }


def model_histograms(model: nn.Module) -> dict[str, Histogram]:
    """Name of each parameter of two dimensions or more of an eager model -> its histogram."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not nn.parameter.is_lazy(parameter):
            made = histogram(parameter.detach(), None)
            if made is not None:
                found[name] = made
    return found


def prepared_histograms(model: nn.Module) -> dict[str, Histogram]:
    """Weight name -> its histogram, for every weight of a prepared or frozen model whose values are known."""
    found: dict[str, Histogram] = {}
    for record, value in site_values(model):
        if record.name not in found or (record.reason is None and found[record.name].after is None):
            made = _of_record(record, value)
            if made is not None:
                found[record.name] = made
    for module in model.modules():
        if isinstance(module, FrozenWeight):
            form = module.quantized()
            levels = _levels(module.spec, form.scale, form.zero_point) if form.scale is not None else ()
            made = histogram(None, form.dequantize(), levels)
            if made is not None:
                found.setdefault(module.site, made)
    return found


def file_histograms(path: Path) -> dict[str, Histogram]:
    """Weight name -> what a file of ours computes with; for any other file its float initializers."""
    import numpy as np
    import onnx

    from qgraph.errors import InspectError
    from qgraph.exporters.unpack import unpack
    from qgraph.inspection.onnx_file import load

    found: dict[str, Histogram] = {}
    model = load(path)
    if any(entry.key == "qgraph.layers" for entry in model.metadata_props):
        try:
            unpacked = unpack(path)
        except (InspectError, OSError):  # its data may be elsewhere
            return {}
        for name, item in unpacked.items():
            levels: tuple[Level, ...] = ()
            if item.spec is not None and item.scale is not None:
                zero = None if item.zero_point is None else torch.from_numpy(np.array(item.zero_point))
                levels = _levels(item.spec, torch.from_numpy(np.array(item.scale)), zero)
            after = torch.from_numpy(np.array(item.weight))
            made = histogram(None, after, levels)
            if made is not None:
                found[name] = made
        return found
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1 and tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            try:
                array = onnx.numpy_helper.to_array(tensor, str(path.parent))
            except (OSError, ValueError, onnx.checker.ValidationError):  # external data that is not there
                continue
            made = histogram(torch.from_numpy(np.array(array, np.float32)), None)
            if made is not None:
                found[tensor.name] = made
    return found


@torch.no_grad()
def histogram(before: Tensor | None, after: Tensor | None, levels: tuple[Level, ...] = ()) -> Histogram | None:
    """Count values before and after in the same bins; None where there are none, or none that is finite."""
    sides = [None if side is None else side.detach().float().flatten() for side in (before, after)]
    finite = [side[side.isfinite()] for side in sides if side is not None]
    values = [side for side in finite if side.numel()]
    if not values:
        return None
    low = min(float(side.min()) for side in values)
    high = max(float(side.max()) for side in values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = [
        None if side is None else tuple(torch.histc(side, BINS, low, high).int().tolist()) for side in sides
    ]  # histc leaves out what is not in the range, NaN included
    return Histogram(low, high, counts[0], counts[1], levels)


def _of_record(record: SiteRecord, value: Tensor) -> Histogram | None:
    if value.is_meta:
        return None
    if record.groups is None:
        return histogram(value, None)
    groups: Groups = record.groups
    sparse = value if record.sparsity is None else sparsify(value, record.sparsity, groups)
    step = record.quantizer.step if record.quantizer is not None else None
    dense = None if record.sparsity is None else value
    form = quantize(sparse, record.weight, groups, dense=dense, step=step)
    levels: tuple[Level, ...] = ()
    if record.weight is not None and form.scale is not None:
        levels = _levels(record.weight, form.scale, form.zero_point)
    return histogram(value, form.dequantize(), levels)


def _levels(spec: Any, scale: Tensor, zero: Tensor | None) -> tuple[Level, ...]:
    """Where each code lies; scales differ from group to group, so a level is a range."""
    low, high = spec.levels
    codes = [-1, 1] if spec.bits == 1 and spec.scheme == "linear" else list(range(low, high + 1))
    if len(codes) > MOST_LEVELS or not scale.numel():
        return ()
    scale = scale.detach().double().flatten()
    offset = torch.zeros_like(scale) if zero is None else zero.detach().double().flatten()
    keep = scale.isfinite() & offset.isfinite()
    scale, offset = scale[keep], offset[keep]
    if not scale.numel():
        return ()
    at = [round(share * (scale.numel() - 1)) for share in SPREAD]
    found = []
    for code in codes:
        ordered = (scale * (code - offset)).sort().values
        low_value, middle, high_value = (float(ordered[i]) for i in at)
        found.append(Level(code, low_value, middle, high_value))
    return tuple(found)


def _short(value: float) -> float:
    return float(f"{value:.5g}")
