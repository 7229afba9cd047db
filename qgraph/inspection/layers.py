"""The plain values an inspection is made of: one row a weight, one entry a float tensor, and their sums."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qgraph.config import QConfig, QuantSpec, SparsitySpec


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight of one site.

    Parameters
    ----------
    path : str
        The module whose forward uses the weight; "" is the model itself.
    name : str
        The weight, from the model's root; for a tied weight its first name.
    op : str
        What is done with it: ``linear``, ``conv2d``, ``matmul``, ``lstm``, ...
    shape : tuple of int
    dtype : str
        Of the weight before quantization, such as ``float32``.
    spec : str
        In the notation of configs, ``float`` where nothing is done.
    weight, activation, sparsity
        What `spec` stands for; None each where there is none.
    groups : str
        ``count x size``: how many scales there are, and how many weights share one.
    bits_per_weight : float
        Codes, patterns, scales and zero points by weight.
    bytes_before, bytes_after : int
        Of the float weight, and of codes, scales and zero points; 0 both where `tied_to` counts them.
    error_db : float or None
        10 log10(|w|^2 / |w - q(w)|^2), inf where nothing is lost; None where it is not measured (`tied_to`,
        a weight that only running Python makes, a file).
    reason : str or None
        Why it is float; None where it is quantized or pruned.
    where : str
        File and line of the operation in the user's code; "" where unknown.
    captured : bool
        In a graph; else quantized while its module's own Python runs.
    tied_to : str or None
        The `site` of the row that stores this weight.
    form : str
        How a file holds it; "" for a model.
    """

    path: str
    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    weight: QuantSpec | None
    activation: QuantSpec | None
    sparsity: SparsitySpec | None
    groups: str
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    error_db: float | None = None
    reason: str | None = None
    where: str = ""
    captured: bool = True
    tied_to: str | None = None
    form: str = ""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def quantized(self) -> bool:
        """Whether the weight is quantized or pruned."""
        return self.reason is None

    @property
    def site(self) -> str:
        """The name that this row goes by: the weight's own, or for a tied one the place of its use."""
        inside = not self.path or self.name.startswith(f"{self.path}.")
        return self.name if self.tied_to is None or inside else f"{self.path}.{self.name.rpartition('.')[2]}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; an error of inf is None with ``exact`` True."""
        exact = self.error_db is not None and math.isinf(self.error_db) and self.error_db > 0
        finite = self.error_db if self.error_db is not None and math.isfinite(self.error_db) else None
        return {
            "site": self.site,
            "path": self.path,
            "name": self.name,
            "op": self.op,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "spec": self.spec,
            "weight": self.weight.to_dict() if self.weight else None,
            "activation": self.activation.to_dict() if self.activation else None,
            "sparsity": str(self.sparsity) if self.sparsity else None,
            "groups": self.groups,
            "bits_per_weight": self.bits_per_weight,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "error_db": finite,
            "exact": exact,
            "reason": self.reason,
            "where": self.where,
            "captured": self.captured,
            "tied_to": self.tied_to,
            "form": self.form,
        }


@dataclass(frozen=True, slots=True)
class FloatTensor:
    """A parameter (in a file: an initializer) that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "bytes": self.bytes,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a model: each weight once."""

    layers: int
    layers_quantized: int
    weights: int
    weights_quantized: int
    bytes_before: int
    bytes_after: int
    float_bytes: int
    model_bytes_before: int
    model_bytes_after: int
    bits_per_weight: float | None

    @staticmethod
    def of(layers: Iterable[Layer], floats: Iterable[FloatTensor], parameter_bytes: int | None = None) -> Totals:
        """Add up; `bits_per_weight` is over quantized weights, None where there are none.

        `parameter_bytes` is what the parameters take before; None: what rows and float tensors add up to.
        (A parameter that is cut in pieces in one graph and used whole in another has a row for each.)
        """
        rows = list(layers)
        own = [row for row in rows if row.tied_to is None]
        quantized = [row for row in own if row.quantized]
        numel = sum(row.numel for row in quantized)
        bits = sum(row.bits_per_weight * row.numel for row in quantized)
        before, after = (sum(getattr(row, name) for row in quantized) for name in ("bytes_before", "bytes_after"))
        left = sum(item.bytes for item in floats) + sum(row.bytes_after for row in own if not row.quantized)
        return Totals(
            layers=len(rows),
            layers_quantized=sum(row.quantized for row in rows),
            weights=sum(row.numel for row in own),
            weights_quantized=numel,
            bytes_before=before,
            bytes_after=after,
            float_bytes=left,
            model_bytes_before=before + left if parameter_bytes is None else parameter_bytes,
            model_bytes_after=after + left,
            bits_per_weight=bits / numel if numel else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


def notation(weight: QuantSpec | None, activation: QuantSpec | None, sparsity: SparsitySpec | None) -> str:
    """A site's specs in the notation of configs, or by their parts where it has no word for them."""
    if weight is None and activation is None and sparsity is None:
        return "float"
    text = QConfig(weight, activation, sparsity).notation
    if text is not None:
        return text
    parts = [f"{letter}{_part(spec)}" for letter, spec in (("A", activation), ("W", weight)) if spec]
    return " ".join([*parts, *([str(sparsity)] if sparsity else [])])


def _part(spec: QuantSpec) -> str:
    group = spec.group_size if spec.granularity == "block" else spec.granularity
    method = "" if spec.method == "ddt" else f"-{spec.method}"
    return f"{spec.bits:g}@{group}{method}"
