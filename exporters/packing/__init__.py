"""Quantized weights as few bytes, and the ONNX nodes that unpack them.

TABLE
"""

from .embedding import emit_gather_rows
from .emit import emit_codes, emit_float, emit_scale, emit_zero_point
from .nbits import emit_nbits, nbits_for, nbits_shift
from .packed import PackedWeight, pack, unpack

__all__ = [
    "PackedWeight",
    "emit_codes",
    "emit_float",
    "emit_gather_rows",
    "emit_nbits",
    "emit_scale",
    "emit_zero_point",
    "nbits_for",
    "nbits_shift",
    "pack",
    "unpack",
]
