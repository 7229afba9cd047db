"""What the recorder must know of torch's functions: which read sizes, which read data, which hide others."""

from __future__ import annotations

import functools
import importlib
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qgraph.capture.structure import Step
from qgraph.sites import SiteCall

SIZE_READS = frozenset({"size", "__len__", "numel", "nelement"})
PROPERTY_READS = frozenset({
    "dim", "is_floating_point", "is_complex", "is_contiguous", "stride", "is_signed", "element_size", "ndimension",
})  # fmt: skip
DATA_READS = frozenset({
    "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__complex__",
    "__contains__", "is_nonzero", "equal", "allclose", "data_ptr", "untyped_storage", "storage", "__reduce_ex__",
    "__deepcopy__", "backward", "register_hook", "__dlpack__", "tobytes", "isin_scalar",
})  # fmt: skip
HARMLESS = frozenset({"__repr__", "__format__", "__str__", "__hash__", "_is_view", "__dir__"})
# The size of what these return depends on the values of their input.
DATA_SHAPES = frozenset({
    "nonzero", "unique", "unique_consecutive", "masked_select", "argwhere", "bincount",
    "_unique2", "nonzero_static", "where_indices", "combinations", "histogram",
})  # fmt: skip
SIZED_LISTS = frozenset({"unbind", "split", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit", "split_with_sizes"})

_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "true_divide": operator.truediv,
    "div": operator.truediv, "__getitem__": operator.getitem, "__setitem__": operator.setitem,
    "floor_divide": operator.floordiv, "matmul": operator.matmul, "neg": operator.neg, "eq": operator.eq,
    "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip

# torch.compile takes grouped products in bfloat16 alone: their graphs call `qgraph.ops.grouped` instead.
EAGER_ONLY = frozenset({"grouped_mm", "_grouped_mm"})

# torch.compile leaves packed sequences to Python as a whole; of a graph that holds them it would make many.
LEFT_TO_PYTHON = frozenset({"_pack_padded_sequence", "_pad_packed_sequence"})

TRANSPARENT = frozenset({torch.nn.functional.multi_head_attention_forward})


@functools.cache
def see_through(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same Python function, without its own hand-over to the mode: the calls inside it are seen one by one."""
    visible = {**function.__globals__, "has_torch_function": _never}
    copy = types.FunctionType(function.__code__, visible, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def transformed() -> bool:
    """Whether a functorch transform (vmap, grad) is running: its tensors are not to be kept or looked into."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _never(*_: Any) -> bool:
    return False


def is_getter(function: Callable[..., Any]) -> bool:
    return getattr(function, "__name__", "") == "__get__"


def name_of(function: Any) -> str:
    """The bare name of a torch function, method or property."""
    if isinstance(function, str):
        return function
    if getattr(function, "__name__", "") in ("__get__", "__set__"):
        return getattr(function.__self__, "__name__", "attribute")
    name = getattr(function, "__name__", None) or type(function).__name__
    return name.split(".")[0] if isinstance(function, torch._ops.OpOverload) else name


def node_target(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, Any]:
    """How a graph calls it: methods by name, infix operators as such, everything else as a function."""
    name = name_of(function)
    if getattr(function, "__name__", "") == "__set__":
        return "call_function", Setter(name)
    is_method = getattr(Tensor, name, None) is function or getattr(torch._C.TensorBase, name, None) is function
    if not is_method:
        # Python wrappers of methods (`Tensor.__pow__`) are in no namespace: called by name.
        wrapper = getattr(function, "__module__", None) == "torch._tensor" and args and isinstance(args[0], Tensor)
        return ("call_method", name) if wrapper and hasattr(Tensor, name) else ("call_function", function)
    if name in _OPERATORS and len(args) == (3 if name == "__setitem__" else 1 if name == "neg" else 2):
        return "call_function", _OPERATORS[name]
    return "call_method", name


class Apply:
    """The `apply` of a torch.autograd.Function as a function of a graph; a site where its forward multiplies."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.site: SiteCall | None = None
        self.__name__ = f"{function.__name__}_apply"
        self.__module__ = __name__
        self.__qualname__ = self.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)


class Rebuild:
    """Make a plain object of a class anew from its attributes, as a function of a graph."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.__name__ = f"new_{kind.__name__}"
        self.__module__ = __name__
        self.__qualname__ = self.__name__

    def __call__(self, /, **attributes: Any) -> Any:
        made: Any = object.__new__(self.kind)
        made.__dict__.update(attributes)
        return made


class Constant:
    """A class, a function, or a tensor that stays the same, which a graph hands on, as a function of a graph."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.__name__ = f"the_{getattr(value, '__name__', 'constant')}"
        self.__module__ = __name__
        self.__qualname__ = self.__name__

    def __call__(self) -> Any:
        return self.value


class Global:
    """A tensor in the globals of one of Python's modules, read at each call, as a function of a graph."""

    def __init__(self, place: tuple[str, tuple[Step, ...]]) -> None:
        self.place = place
        self._home = importlib.import_module(place[0])
        self.__name__ = f"the_{place[1][-1].key}"
        self.__module__ = __name__
        self.__qualname__ = self.__name__

    def __call__(self) -> Any:
        value: Any = self._home
        for step in self.place[1]:
            value = step.get(value)
        return value


class Setter:
    """``tensor.name = value`` as a function of a graph."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.__name__ = f"set_{name}"
        self.__module__ = __name__
        self.__qualname__ = self.__name__

    def __call__(self, tensor: Tensor, value: Any) -> None:
        setattr(tensor, self.name, value)


def boolean_index(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call selects by a mask, or lists positions, so that its result's size depends on data."""
    name = name_of(function)
    if name == "where":
        return len(args) == 1
    if name == "repeat_interleave":  # by tensors of counts alone is its length data
        return isinstance(args[1] if len(args) > 1 else kwargs.get("repeats", *args), Tensor)
    if name != "__getitem__":
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
