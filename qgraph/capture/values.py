"""Sizes that remember where they came from: the ints a forward reads off its tensors while it is recorded.

A `TracedInt` is the example's own number to Python, and an expression over the graph's inputs to the recorder.
Whatever Python decides by it (a branch, a range, an index) becomes a guard; arithmetic stays symbolic.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from qgraph.capture.structure import is_namedtuple

if TYPE_CHECKING:
    from qgraph.capture.recorder import Recorder

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "truediv": "/", "pow": "**",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}  # fmt: skip
_NUMBERS = (int, float)
_ROUNDING = frozenset({math.floor, math.ceil, math.trunc})


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A property of one value of the graph: ``size`` with a dimension, ``dtype``, ..., or the value itself (``""``)."""

    node: fx.Node
    name: str
    argument: int | None = None

    def emit(self, graph: fx.Graph) -> fx.Node:
        if not self.name:
            return self.node
        if self.name in METHODS:
            extra = () if self.argument is None else (self.argument,)
            return graph.call_method(self.name, (self.node, *extra))
        return graph.call_function(getattr, (self.node, self.name))

    def source(self) -> str | None:
        """Python text over the forward's own arguments, or None where the value is made inside the forward."""
        root = self.node.meta.get("source")
        if root is None or not self.name:
            return root
        if self.name in METHODS:
            return f"{root}.{self.name}({'' if self.argument is None else self.argument})"
        return f"{root}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """Arithmetic on sizes."""

    function: Callable[..., Any]
    operands: tuple[Any, ...]

    def emit(self, graph: fx.Graph) -> fx.Node:
        return graph.call_function(self.function, tuple(emit(o, graph) for o in self.operands))

    def source(self) -> str | None:
        texts = [o.source() if isinstance(o, (Leaf, Operation)) else repr(o) for o in self.operands]
        if any(t is None for t in texts) or self.function in _ROUNDING:  # a guard's text knows no `math`
            return None
        if len(texts) == 1:
            return f"(-{texts[0]})"
        return f"({texts[0]} {_INFIX[self.function.__name__.strip('_')]} {texts[1]})"


Expression = Leaf | Operation
METHODS = frozenset({
    "size", "dim", "numel", "is_floating_point", "is_complex", "is_contiguous", "stride", "is_signed", "element_size",
})  # fmt: skip


def emit(value: Any, graph: fx.Graph) -> Any:
    return value.emit(graph) if isinstance(value, (Leaf, Operation)) else value


class _Traced:
    """What traced ints and floats share: arithmetic that stays symbolic, and everything else that becomes a guard."""

    value: Any
    expression: Expression
    recorder: Recorder

    def _calculate(self, function: Callable[..., Any], *operands: Any) -> Any:
        if any(isinstance(o, Tensor) for o in operands):
            return NotImplemented  # its own operator takes this number, and is seen
        value = function(*(plain(o) for o in operands))
        if type(value) not in _NUMBERS or not all(isinstance(o, _NUMBERS) for o in operands):
            self._specialize()  # an array, a complex number: they tell of nothing
            return value
        if not self.recorder.tracing:
            return value
        expressions = tuple(o.expression if isinstance(o, _Traced) else o for o in operands)
        return traced(value, Operation(function, expressions), self.recorder)

    def _decide(self, function: Callable[..., Any], other: Any) -> Any:
        if not isinstance(other, _NUMBERS):
            return NotImplemented
        value = function(self.value, plain(other))
        right = other.expression if isinstance(other, _Traced) else other
        self.recorder.guard(Operation(function, (self.expression, right)), value)
        return value

    def _specialize(self) -> Any:
        self.recorder.guard(self.expression, self.value)
        return self.value

    def __add__(self, other): return self._calculate(operator.add, self, other)  # fmt: skip

    def __radd__(self, other): return self._calculate(operator.add, other, self)  # fmt: skip

    def __sub__(self, other): return self._calculate(operator.sub, self, other)  # fmt: skip

    def __rsub__(self, other): return self._calculate(operator.sub, other, self)  # fmt: skip

    def __mul__(self, other): return self._product(self, other)  # fmt: skip

    def __rmul__(self, other): return self._product(other, self)  # fmt: skip

    def __floordiv__(self, other): return self._calculate(operator.floordiv, self, other)  # fmt: skip

    def __rfloordiv__(self, other): return self._calculate(operator.floordiv, other, self)  # fmt: skip

    def __mod__(self, other): return self._calculate(operator.mod, self, other)  # fmt: skip

    def __rmod__(self, other):
        return other % self._specialize() if isinstance(other, str) else self._calculate(operator.mod, other, self)

    def __truediv__(self, other): return self._calculate(operator.truediv, self, other)  # fmt: skip

    def __rtruediv__(self, other): return self._calculate(operator.truediv, other, self)  # fmt: skip

    def __pow__(self, other): return self._calculate(operator.pow, self, other)  # fmt: skip

    def __rpow__(self, other): return self._calculate(operator.pow, other, self)  # fmt: skip

    def __neg__(self): return self._calculate(operator.neg, self)  # fmt: skip

    def __pos__(self): return self  # fmt: skip

    def __lt__(self, other): return self._decide(operator.lt, other)  # fmt: skip

    def __le__(self, other): return self._decide(operator.le, other)  # fmt: skip

    def __gt__(self, other): return self._decide(operator.gt, other)  # fmt: skip

    def __ge__(self, other): return self._decide(operator.ge, other)  # fmt: skip

    def __eq__(self, other): return self._decide(operator.eq, other)  # fmt: skip

    def __ne__(self, other): return self._decide(operator.ne, other)  # fmt: skip

    def __bool__(self): return bool(self._decide(operator.ne, 0))  # fmt: skip

    def __hash__(self) -> int:
        if not self.recorder.through:  # also where the graph has been given up
            self.recorder.globals.memos.asked(sys._getframe(1))
        return hash(self._specialize())

    def __int__(self): return int(self._specialize())  # fmt: skip

    def __float__(self): return float(self._specialize())  # fmt: skip

    def __round__(self, digits=None): return round(self._specialize(), digits)  # fmt: skip

    def __abs__(self): return abs(self._specialize())  # fmt: skip

    def __floor__(self): return self._calculate(math.floor, self)  # fmt: skip

    def __ceil__(self): return self._calculate(math.ceil, self)  # fmt: skip

    def __trunc__(self): return self._calculate(math.trunc, self)  # fmt: skip

    def __divmod__(self, other): return self // other, self % other  # fmt: skip

    def __array__(self, dtype=None, copy=None): return np.asarray(self._specialize(), dtype)  # fmt: skip

    def __repr__(self): return repr(self.value)  # fmt: skip

    def __str__(self): return str(self.value)  # fmt: skip

    def __format__(self, spec): return format(self.value, spec)  # fmt: skip

    def __reduce__(self): return type(self.value), (self.value,)  # fmt: skip

    def __deepcopy__(self, memo): return self.value  # fmt: skip

    def _product(self, left: Any, right: Any) -> Any:
        other = right if left is self else left
        if isinstance(other, (list, tuple, str, bytes)):
            return other * self._specialize()
        return self._calculate(operator.mul, left, right)


class _Constant:
    """What torch's C++ asks of a SymInt's node where a traced int reaches it past the recorder: the number, at once."""

    def __init__(self, value: int) -> None:
        self.value = value

    def guard_int(self, file: str, line: int) -> int: return self.value  # fmt: skip

    def int_(self) -> int: return self.value  # fmt: skip

    def maybe_as_int(self) -> int: return self.value  # fmt: skip

    def constant_int(self) -> int: return self.value  # fmt: skip

    def is_int(self) -> bool: return True  # fmt: skip

    def is_float(self) -> bool: return False  # fmt: skip

    def is_bool(self) -> bool: return False  # fmt: skip

    def is_constant(self) -> bool: return True  # fmt: skip

    def is_symbolic(self) -> bool: return False  # fmt: skip

    def is_nested_int(self) -> bool: return False  # fmt: skip

    def nested_int(self) -> None: return None  # fmt: skip

    def has_hint(self) -> bool: return True  # fmt: skip


class TracedInt(_Traced, torch.SymInt):
    """An int of the example with its expression. A SymInt to torch's argument parser, an int to `isinstance`."""

    __class__ = property(lambda self: int)

    def __init__(self, value: int, expression: Expression, recorder: Recorder) -> None:
        self.value, self.expression, self.recorder = value, expression, recorder

    @property
    def node(self) -> _Constant:
        return _Constant(self._specialize())

    def __index__(self): return self._specialize()  # fmt: skip

    def __and__(self, other): return self._specialize() & plain(other)  # fmt: skip

    def __or__(self, other): return self._specialize() | plain(other)  # fmt: skip

    def __xor__(self, other): return self._specialize() ^ plain(other)  # fmt: skip

    def __lshift__(self, other): return self._specialize() << plain(other)  # fmt: skip

    def __rshift__(self, other): return self._specialize() >> plain(other)  # fmt: skip

    def __rand__(self, other): return other & self._specialize()  # fmt: skip

    def __ror__(self, other): return other | self._specialize()  # fmt: skip

    def __rlshift__(self, other): return other << self._specialize()  # fmt: skip

    def __rrshift__(self, other): return other >> self._specialize()  # fmt: skip

    def __invert__(self): return ~self._specialize()  # fmt: skip

    def bit_length(self): return self._specialize().bit_length()  # fmt: skip

    def is_integer(self): return True  # fmt: skip

    @property
    def real(self) -> int:
        return self._specialize()


class TracedFloat(_Traced, torch.SymFloat):
    """A float computed from sizes."""

    __class__ = property(lambda self: float)

    def __init__(self, value: float, expression: Expression, recorder: Recorder) -> None:
        self.value, self.expression, self.recorder = value, expression, recorder

    def is_integer(self): return self._specialize().is_integer()  # fmt: skip


def traced(value: Any, expression: Expression, recorder: Recorder) -> Any:
    """`value` with its expression; a bool or any other type stays as it is."""
    if type(value) is int:
        return TracedInt(value, expression, recorder)
    if type(value) is float:
        return TracedFloat(value, expression, recorder)
    return value


def is_traced(value: Any) -> bool:
    return issubclass(type(value), _Traced)


def plain(value: Any) -> Any:
    """The same value with every traced number in plain containers replaced by the number itself."""
    kind = type(value)
    if issubclass(kind, _Traced):
        return value.value
    if kind in (tuple, list, torch.Size):
        items = [plain(v) for v in value]
        return value if _unchanged(items, value) else kind(items)
    if issubclass(kind, tuple) and is_namedtuple(value):
        items = [plain(v) for v in value]
        return value if _unchanged(items, value) else kind(*items)
    if kind is dict:
        items = [plain(v) for v in value.values()]
        return value if _unchanged(items, value.values()) else dict(zip(value, items, strict=True))
    if kind is slice:
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value


def _unchanged(new: Any, old: Any) -> bool:
    """Whether nothing was replaced: then the container itself is passed on, since callees may change it in place."""
    return all(a is b for a, b in zip(new, old, strict=True))
