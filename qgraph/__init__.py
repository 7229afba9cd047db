"""Low-bit and sparse quantization-aware training for any torch model."""

from qgraph.config import QConfig, QuantSpec, Rule, SparsitySpec
from qgraph.errors import (
    CaptureError,
    CheckpointError,
    ConfigError,
    ExportError,
    InspectError,
    PassError,
    QGraphError,
)
from qgraph.inspection import Inspection, inspect
from qgraph.pipeline import Pass, PassContext, PassResult, Pipeline
from qgraph.prepare import disabled, prepare, set_enabled
from qgraph.version import __version__

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "InspectError",
    "Inspection",
    "Pass",
    "PassContext",
    "PassError",
    "PassResult",
    "Pipeline",
    "QConfig",
    "QGraphError",
    "QuantSpec",
    "Rule",
    "SparsitySpec",
    "__version__",
    "disabled",
    "inspect",
    "prepare",
    "set_enabled",
]
