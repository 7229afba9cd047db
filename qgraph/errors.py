"""Every error that qgraph raises on purpose, by what the user must change. Nothing else lives here."""

__all__ = [
    "CalibrationError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "InspectError",
    "PassError",
    "QGraphError",
]


class QGraphError(Exception):
    """Base of all errors raised on purpose: the message says where, what was found, and what to do."""


class ConfigError(QGraphError, ValueError):
    """A config, a spec or a rule that means nothing, or contradicts itself."""


class CalibrationError(QGraphError):
    """A static activation range that is not known yet, or batches that give none."""


class CaptureError(QGraphError):
    """A model, or a part of one, that cannot be captured although the caller asked for it."""


class PassError(QGraphError):
    """A rewrite pass that failed, or left a graph that breaks its own promise."""


class ExportError(QGraphError):
    """A model that cannot be exported as asked, or a file that does not compute what the model does."""


class CheckpointError(QGraphError):
    """A checkpoint that is not one, is damaged, or belongs to another config or model."""


class InspectError(QGraphError):
    """Something that cannot be inspected or compared."""
