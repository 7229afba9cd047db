"""Quantized weights as few bytes, and the ONNX nodes that unpack them.

    p = pack(quantized)                  # the smallest format that is exact; unpack(p) gives `quantized` back
    w = emit_float(builder, p, "fc.weight")                                   # core operators, float32 weight
    B, scales = emit_nbits(builder, p, "fc.weight", nbits_for(p), 128)        # for com.microsoft::MatMulNBits
    y = emit_gather_rows(builder, p, "embedding.weight", indices)             # unpacks the rows asked for

Bits a weight on disk, without scales (32 a group) and zero points (32 a group, affine only):

| format         | what                                  | bits a weight              | the least possible |
| -------------- | ------------------------------------- | -------------------------- | ------------------ |
| bits1 .. bits8 | dense codes, in bit planes            | b                          | b                  |
| ternary        | dense -1, 0, +1, five a byte          | 1.6                        | 1.585              |
| 1:2 1:4 1:8    | binary, pattern numbers in bit planes | 1.0, 0.75, 0.5             | the same           |
| 2:4            | three patterns a byte, b bits a code  | 0.667 + b / 2              | 0.646 + b / 2      |
| 2:8 4:8        | binary, numbers of 5 and 7 bits       | 0.875, 1.375               | 0.851, 1.266       |
| 4:16 8:16      | binary, by table; by counting         | 0.938, 1.375               | 0.926, 1.353       |
| 4:32 16:32     | binary, by counting                   | 0.625, 1.438               | 0.598, 1.411       |
| mask           | a bit a weight + codes of the kept    | 1 + density * b            | H + density * b    |
| mask           | binary, runs of zeros cut out, pruned | 0.69, 0.49, 0.29           | 0.57, 0.34, 0.16   |
|                | to 90 %, 95 %, 98 %                   |                            |                    |
| mask4x4        | a bit a tile + codes of kept tiles    | 1/16 + density * b         | H/16 + density * b |
| float          | not quantized, behind any mask        | mask + 32 a kept weight    |                    |

H is the entropy of the density, 1 at one half. Sparse formats are called by mask and codes: `2:4+bits1`.
Kept codes are signs (1 bit) where all are -1 or +1, ternary where 0 is among them, else the bits of the
spec. All codes of a weight are one run of bits over the whole tensor, rows laid one after the other by
output channel; with `align_rows` each row begins on a byte. Everything that is emitted is folded by
onnxruntime when it loads the file.
"""

from .embedding import emit_gather_rows
from .emit import emit_codes, emit_float, emit_scale, emit_zero_point
from .nbits import emit_nbits, nbits_for, nbits_shift
from .packed import PackedWeight, Part, pack, restore, unpack
from .stack import rows_of, shares, stack, unstack

__all__ = [
    "PackedWeight",
    "Part",
    "emit_codes",
    "emit_float",
    "emit_gather_rows",
    "emit_nbits",
    "emit_scale",
    "emit_zero_point",
    "nbits_for",
    "nbits_shift",
    "pack",
    "restore",
    "rows_of",
    "shares",
    "stack",
    "unpack",
    "unstack",
]
