"""What a lowering notes of each weight and each quantized activation: for the report, and for the verification."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from qgraph.exporters.packing import PackedWeight

DOMAIN = "qgraph"  # of the nodes that stand for a weight and an activation until they are lowered


@dataclass(slots=True)
class WeightRecord:
    """What became of one quantized weight."""

    site: str
    packed: PackedWeight
    shared_with: str | None = None  # the site under whose name the codes are stored
    ops: list[str] = field(default_factory=list)
    forms: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    format: str = ""
    nbytes: int = 0

    def __post_init__(self) -> None:
        self.format, self.nbytes = self.packed.format, self.packed.nbytes


@dataclass(slots=True)
class ActivationRecord:
    """What became of one quantized activation: the values before and after it in the file.

    Of a static one `after` are codes that stand for `scale * (code - zero_point)`; `before` is None where the file goes
    from codes to codes; `tie` is how near, in codes, to the middle between two of them either may be taken. Of a
    dynamic one that is multiplied in integers they stand for `factor * (code - zero_point) + offset`.
    """

    site: str
    before: ir.Value | None
    after: ir.Value
    scale: float | None = None
    zero_point: int = 0
    tie: float = 0.0
    factor: ir.Value | None = None
    offset: ir.Value | None = None

    @property
    def has_codes(self) -> bool:
        """Whether `after` are codes."""
        return self.scale is not None or self.factor is not None
