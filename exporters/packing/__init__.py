"""Quantized weights as few bytes, and the ONNX nodes that unpack them.

    p = pack(quantized)                  # the smallest format that is exact; unpack(p) gives `quantized` back
    w = emit_float(builder, p, "fc.weight")                                   # core operators, float32 weight
    B, scales = emit_nbits(builder, p, "fc.weight", nbits_for(p), 128)        # for com.microsoft::MatMulNBits
    y = emit_gather_rows(builder, p, "embedding.weight", indices)             # unpacks the rows asked for

Bits a weight on disk, without scales (32 a group) and zero points (32 a group, affine only):

| format         | what                                        | bits a weight      | the least possible     |
| -------------- | ------------------------------------------- | ------------------ | ---------------------- |
| bits1 .. bits8 | dense codes, in bit planes                  | b                  | b                      |
| ternary        | dense -1, 0, +1, five a byte                | 1.6                | log2(3) = 1.585        |
| 1:2+ 1:4+ 1:8+ | N:M mask + N codes a group, binary          | 1.0, 0.75, 0.5     | the same               |
| 2:4+           | three patterns a byte, binary / 4 bits      | 1.167 / 2.667      | 1.146 / 2.646          |
| 2:8+ 4:8+      | patterns of 5 and 7 bits, binary            | 0.875, 1.375       | 0.851, 1.266           |
| 4:16+ 8:16+    | a table of patterns; counted, binary        | 0.9375, 1.375      | 0.926, 1.353           |
| 4:32+ 16:32+   | counted, binary                             | 0.625, 1.4375      | 0.598, 1.411           |
| mask+          | a bit a weight + kept codes                 | 1 + density * b    | H(density) + density b |
|                | ... mask bytes of 0 left out, binary        | 0.79 at 90 %,      | 0.57, 0.34, 0.16       |
|                |                                             | 0.51 at 95, 0.29 at 98 % |                  |
| mask4x4+       | a bit a tile + the codes of kept tiles      | 1/16 + density * b | less by 1/16 at most   |
| float          | not quantized: 32-bit values behind any mask | 32 a kept weight  |                        |

Kept codes are signs (1 bit) where all are -1 or +1, ternary where 0 is among them, else the bits of the
spec. All codes of a weight are one run of bits over the whole tensor, rows laid one after the other by
output channel; with `align_rows` each row begins on a byte. Everything that is emitted is folded by
onnxruntime when it loads the file.
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
