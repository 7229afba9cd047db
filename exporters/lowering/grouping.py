"""Groups of an activation in ONNX: reductions over each group, and the reshapes that make groups out of any
tensor.

`qgraph.ops.groups` is the same in torch. A length that is dynamic is cut into blocks by padding and a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qgraph.errors import ExportError
from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.ops import Groups

HUGE = float(np.finfo(np.float32).max)
SHORT = 512  # values
LONG = 1024


class GroupMath:
    """Arithmetic nodes under one name prefix; reductions go over `axes`, and skip what `mask` says is
    padding.
    """

    def __init__(
        self,
        b: GraphBuilder,
        name: str,
        axes: Sequence[int],
        mask: tuple[ir.Value, ir.Value] | None = None,
        length: int = 0,
        shape: Sequence[object] = (),
    ) -> None:
        self.b = b
        self.name = name
        self.axes = list(axes)
        self.mask = mask  # (bool: is a value, float: how many values in each group)
        self.length = length  # of a group that is a run of the last dimension; 0 where it is not, or not known
        self.shape = shape  # of what is grouped

    def op(self, op_type: str, *inputs: ir.Value, **attrs: object) -> ir.Value:
        """One node."""
        return self.b.op(op_type, inputs, attrs, name=f"{self.name}/{op_type}")

    def scalar(self, value: float) -> ir.Value:
        """A shared float32 constant."""
        return self.b.constant(np.asarray(value, np.float32), "scalar")

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """`x + y`."""
        return self.op("Add", x, y)

    def sub(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """`x - y`."""
        return self.op("Sub", x, y)

    def mul(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """`x * y`."""
        return self.op("Mul", x, y)

    def div(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """`x / y`."""
        return self.op("Div", x, y)

    def abs(self, x: ir.Value) -> ir.Value:
        """`|x|`."""
        return self.op("Abs", x)

    def round(self, x: ir.Value) -> ir.Value:
        """Half to even."""
        return self.op("Round", x)

    def clip(self, x: ir.Value, low: float, high: float) -> ir.Value:
        """`min(max(x, low), high)`."""
        return self.op("Clip", x, self.scalar(low), self.scalar(high))

    def where(self, condition: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        """`x` where the condition holds, else `y`."""
        return self.op("Where", condition, x, y)

    def mean(self, x: ir.Value) -> ir.Value:
        """Mean over each group."""
        if self.mask is None:
            return self._mean_of_means(x) if self._is_long() else self._reduce("ReduceMean", x)
        valid, count = self.mask
        return self.div(self._reduce("ReduceSum", self.where(valid, x, self.scalar(0))), count)

    def _is_long(self) -> bool:
        """Whether one ReduceMean would round too much: onnxruntime adds up in a few lanes, value by value, where each
        of many equal values (the zeros behind a ReLU) is rounded the same way.
        """
        sizes = [self.shape[axis] for axis in self.axes] if self.shape else []
        return any(not isinstance(size, int) for size in sizes) or math.prod(map(_known, sizes)) > LONG

    def _mean_of_means(self, x: ir.Value) -> ir.Value:
        """The mean along some dimensions after the others, a long row cut into runs."""
        if len(self.axes) > 1:
            for axes in self._stages():
                x = self.b.op("ReduceMean", [x, self.b.ints(axes)], {"keepdims": 1}, name=f"{self.name}/ReduceMean")
            return x
        run = max((n for n in range(1, math.isqrt(self.length) + 1) if self.length % n == 0), default=1)
        if run == 1:  # of no known length, or a prime number
            return self._reduce("ReduceMean", x)
        cut = self.op("Reshape", x, self.b.ints([0] * (len(self.shape) - 1) + [run, self.length // run]))
        means = self.b.op("ReduceMean", [cut, self.b.ints([-1])], {"keepdims": 0}, name=f"{self.name}/ReduceMean")
        return self._reduce("ReduceMean", means)

    def _stages(self) -> list[list[int]]:
        """The axes, the last first: as many at once as hold few values."""
        stages: list[list[int]] = [[]]
        for axis in reversed(self.axes):
            sizes = [self.shape[i] for i in (axis, *stages[-1])]
            few = all(isinstance(size, int) for size in sizes) and math.prod(map(_known, sizes)) <= SHORT
            if stages[-1] and not few:
                stages.append([])
            stages[-1].insert(0, axis)
        return stages

    def min(self, x: ir.Value) -> ir.Value:
        """Least value of each group."""
        return self._reduce("ReduceMin", self._padded_with(x, HUGE))

    def max(self, x: ir.Value) -> ir.Value:
        """Largest value of each group."""
        return self._reduce("ReduceMax", self._padded_with(x, -HUGE))

    @property
    def is_short_row(self) -> bool:
        """Whether `normalized` takes the groups.

        onnxruntime's LayerNormalization adds up a row value by value: over thousands of them it rounds ten times as
        much as ReduceMean does.
        """
        return 0 < self.length <= SHORT

    def normalized(self, x: ir.Value, ridge: float) -> ir.Value:
        """`(x - mean x) / sqrt(variance + ridge)`, one node."""
        key = ("ones", self.length)
        ones = self.b.once(key, lambda: self.op("Expand", self.scalar(1), self.b.ints([self.length])))
        return self.op("LayerNormalization", x, ones, epsilon=ridge)

    def _padded_with(self, x: ir.Value, value: float) -> ir.Value:
        return x if self.mask is None else self.where(self.mask[0], x, self.scalar(value))

    def _reduce(self, op_type: str, x: ir.Value) -> ir.Value:
        return self.b.op(op_type, [x, self.b.ints(self.axes)], {"keepdims": 1}, name=f"{self.name}/{op_type}")


Recipe = Callable[[GroupMath, ir.Value], ir.Value]


def on_groups(b: GraphBuilder, x: ir.Value, groups: Groups, name: str, recipe: Recipe) -> ir.Value:
    """Apply an elementwise-with-reductions recipe to every group of `x`.

    Raises
    ------
    ExportError
        When the rank of `x` is unknown.
    """
    if x.shape is None:
        raise ExportError(
            f"{name}: the rank of this activation is unknown; expected a tensor of fixed rank; report the model"
        )
    rank, shape = len(x.shape), list(x.shape)
    if rank == 0 or (groups.kind == "channel" and rank == 1):
        return recipe(GroupMath(b, name, [-1], length=_known(x.shape[0]), shape=shape), x) if rank else x
    axis = groups.axis % rank
    if groups.kind == "tensor":
        return recipe(GroupMath(b, name, range(rank), shape=shape), x)
    if groups.kind == "token":
        return _blocks(b, x, shape, groups.block, name, recipe)
    if groups.block is None:
        return recipe(GroupMath(b, name, [i for i in range(rank) if i != axis], shape=shape), x)
    return _channel_blocks(b, x, axis, groups.block, name, recipe)


def _channel_blocks(b: GraphBuilder, x: ir.Value, axis: int, block: int, name: str, recipe: Recipe) -> ir.Value:
    """Rows are the indices along `axis`: bring it to the front, flatten the rest, and back."""
    assert x.shape is not None
    order = [axis, *(i for i in range(len(x.shape)) if i != axis)]
    moved = x if axis == 0 else b.op("Transpose", [x], {"perm": order}, name=f"{name}/rows")
    sizes = [x.shape[i] for i in order[1:]]
    length = int(np.prod(sizes)) if all(isinstance(size, int) for size in sizes) else None
    flat = b.op("Flatten", [moved], {"axis": 1}, name=f"{name}/flat")
    y = _blocks(b, flat, [None, length], block, name, recipe)
    y = b.op("Reshape", [y, b.op("Shape", [moved], name=f"{name}/shape")], name=f"{name}/unflat")
    return y if axis == 0 else b.op("Transpose", [y], {"perm": np.argsort(order).tolist()}, name=f"{name}/unrows")


def _blocks(
    b: GraphBuilder, x: ir.Value, shape: list[object], block: int | None, name: str, recipe: Recipe
) -> ir.Value:
    """Groups are runs of `block` along the last dimension; None is the whole dimension."""
    length = shape[-1]
    if block is None or (isinstance(length, int) and length <= block):
        return recipe(GroupMath(b, name, [-1], length=_known(length), shape=shape), x)
    if not isinstance(length, int):
        return _dynamic_blocks(b, x, len(shape), block, name, recipe)
    full = length // block * block
    parts = [x]
    if full < length:
        parts = [
            b.slice(x, [0], [full], [-1], name=f"{name}/full"),
            b.slice(x, [full], [length], [-1], name=f"{name}/tail"),
        ]
    # 0 copies a dimension, so that batch and sequence stay dynamic
    cut = b.op("Reshape", [parts[0], b.ints([0] * (len(shape) - 1) + [full // block, block])], name=f"{name}/blocks")
    y = recipe(GroupMath(b, name, [-1], length=block), cut)
    y = b.op("Reshape", [y, b.ints([0] * (len(shape) - 1) + [full])], name=f"{name}/joined")
    if full == length:
        return y
    tail = recipe(GroupMath(b, f"{name}/ragged", [-1], length=length - full), parts[1])
    return b.op("Concat", [y, tail], {"axis": -1}, name=f"{name}/concat")


def _known(size: object) -> int:
    return size if isinstance(size, int) else 0


def _dynamic_blocks(b: GraphBuilder, x: ir.Value, rank: int, block: int, name: str, recipe: Recipe) -> ir.Value:
    """Pad with zeros to whole blocks, and leave the padding out of every reduction."""

    def op(kind: str, *inputs: ir.Value, **attrs: object) -> ir.Value:
        return b.op(kind, inputs, attrs, name=f"{name}/{kind}")

    size = b.ints([block])
    length = op("Gather", op("Shape", x), b.ints([-1]), axis=0)  # shape (1,)
    blocks = op("Div", op("Add", length, b.ints([block - 1])), size)
    total = op("Mul", blocks, size)
    pads = op("Concat", b.ints([0] * (2 * rank - 1)), op("Sub", total, length), axis=0)
    cut = op("Reshape", op("Pad", x, pads), b.ints([0] * (rank - 1) + [-1, block]))
    zero, one = (b.constant(np.asarray(value, np.int64), "int") for value in (0, 1))
    places = op("Range", zero, op("Squeeze", total, b.ints([0])), one)
    valid = op("Reshape", op("Less", places, length), b.ints([-1, block]))
    count = b.op(
        "ReduceSum",
        [b.cast(valid, ir.DataType.FLOAT, name=f"{name}/count"), b.ints([-1])],
        {"keepdims": 1},
        name=f"{name}/count",
    )
    y = recipe(GroupMath(b, name, [-1], (valid, count)), cut)
    whole = op("Reshape", y, b.ints([0] * (rank - 1) + [-1]))
    return op("Slice", whole, b.ints([0]), length, b.ints([-1]))
