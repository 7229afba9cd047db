"""Low-bit and sparse quantization-aware training for any torch model."""

import importlib
from typing import TYPE_CHECKING, Any

from qgraph.caching import cached_bytes, clear_cache, set_cache_limit
from qgraph.calibrate import calibrate
from qgraph.checkpoint import load, save
from qgraph.config import QConfig, QuantSpec, Rule, SparsitySpec
from qgraph.distillation import Distilled, distill
from qgraph.errors import (
    CalibrationError,
    CaptureError,
    CheckpointError,
    ConfigError,
    ExportError,
    InspectError,
    PassError,
    QGraphError,
)
from qgraph.freeze import freeze
from qgraph.inspection import Inspection, inspect
from qgraph.pipeline import Pass, PassContext, PassResult, Pipeline
from qgraph.prepare import disabled, prepare, set_enabled
from qgraph.schedules import FreezeMasks, ProgressiveBits, QuantizationStart, Schedule, SparsityRamp
from qgraph.version import __version__

if TYPE_CHECKING:
    from qgraph.analysis.allocate import Allocation, allocate, allocation
    from qgraph.analysis.compare import ModelComparison, compare
    from qgraph.analysis.divergence import Divergence, divergence
    from qgraph.analysis.monitor import Monitor, monitor
    from qgraph.analysis.sensitivity import SensitivityReport, sensitivity
    from qgraph.exporters.onnx import export
    from qgraph.exporters.report import ExportReport
    from qgraph.exporters.unpack import unpack
    from qgraph.inspection.explorer import explore
    from qgraph.runtime import verify

__all__ = [
    "Allocation",
    "CalibrationError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "Distilled",
    "Divergence",
    "ExportError",
    "ExportReport",
    "FreezeMasks",
    "InspectError",
    "Inspection",
    "ModelComparison",
    "Monitor",
    "Pass",
    "PassContext",
    "PassError",
    "PassResult",
    "Pipeline",
    "ProgressiveBits",
    "QConfig",
    "QGraphError",
    "QuantSpec",
    "QuantizationStart",
    "Rule",
    "Schedule",
    "SensitivityReport",
    "SparsityRamp",
    "SparsitySpec",
    "__version__",
    "allocate",
    "allocation",
    "cached_bytes",
    "calibrate",
    "clear_cache",
    "compare",
    "disabled",
    "distill",
    "divergence",
    "explore",
    "export",
    "freeze",
    "inspect",
    "load",
    "monitor",
    "prepare",
    "save",
    "sensitivity",
    "set_cache_limit",
    "set_enabled",
    "unpack",
    "verify",
]

# These bring onnx and onnxruntime, or rich: imported when first asked for.
_LAZY = {
    "Allocation": "qgraph.analysis.allocate",
    "Divergence": "qgraph.analysis.divergence",
    "ExportReport": "qgraph.exporters.report",
    "ModelComparison": "qgraph.analysis.compare",
    "Monitor": "qgraph.analysis.monitor",
    "SensitivityReport": "qgraph.analysis.sensitivity",
    "allocate": "qgraph.analysis.allocate",
    "allocation": "qgraph.analysis.allocate",
    "compare": "qgraph.analysis.compare",
    "divergence": "qgraph.analysis.divergence",
    "explore": "qgraph.inspection.explorer",
    "export": "qgraph.exporters.onnx",
    "monitor": "qgraph.analysis.monitor",
    "sensitivity": "qgraph.analysis.sensitivity",
    "unpack": "qgraph.exporters.unpack",
    "verify": "qgraph.runtime",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qgraph' has no attribute {name!r}")
