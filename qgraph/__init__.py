"""Low-bit and sparse quantization-aware training for any torch model."""

from qgraph.version import __version__

__all__ = ["__version__"]
