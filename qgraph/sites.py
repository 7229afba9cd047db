"""The site table: which torch functions multiply by a weight, where their operands stand, and along which axis.

One table for graphs and for Python that runs under the recorder, so both quantize the same operands. What an operand
derives from is told by `Source`, which both compute by the same rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qgraph.ops import Groups

Role = Literal["input", "weight", "either", "attended"]


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of a call: where it stands, what it is, and its output-channel axis when it is a weight.

    Of a product of equals each is "either" weight or input; what is "attended" to is a weight or stays as it is.

    `axis` None: the whole operand makes one output channel. `swapped`: the axis of the same channels with the last two
    dimensions exchanged, for operands of more than two.
    """

    position: int
    keyword: str
    role: Role
    axis: int | None = 0
    index: int | None = None
    swapped: int | None = None

    def get(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        value = args[self.position] if self.position < len(args) else kwargs.get(self.keyword)
        return value if self.index is None or value is None else value[self.index]

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], new: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with this operand replaced."""
        if self.index is not None:
            old = args[self.position] if self.position < len(args) else kwargs[self.keyword]
            new = type(old)([new if i == self.index else v for i, v in enumerate(old)])
        if self.position < len(args):
            return (*args[: self.position], new, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, self.keyword: new}

    def transposed(self) -> Operand:
        """The operand before its last two dimensions were exchanged."""
        if self.axis is None:
            return self
        swapped = {0: 1, 1: 0, -1: 0, -2: 1}[self.axis] if self.swapped is None else self.swapped
        return replace(self, axis=swapped, swapped=None if self.swapped is None else self.axis)


@dataclass(frozen=True, slots=True)
class SiteCall:
    """A call of a function of the site table. `conv`: its activations are grouped by sample."""

    op: str
    operands: tuple[Operand, ...]
    conv: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """What a value derives from.

    ``parameter``: from parameters alone, named in `names` (paths from the root); `exact` when it is the one parameter
    itself, up to a transpose of its last two dimensions. ``data``: from the model's inputs. ``constant``: neither.
    `unfit`: the dtype of an operand that no quantizer takes, complex numbers or integers; else "".
    """

    kind: Literal["parameter", "data", "constant"]
    names: tuple[str, ...] = ()
    exact: bool = False
    transposed: bool = False
    unfit: str = ""

    def of(self, dtype: Any) -> Source:
        """The source of an operand of this torch dtype (None: not known)."""
        fits = dtype is None or dtype.is_floating_point
        return self if fits else replace(self, unfit=str(dtype).removeprefix("torch."))


DATA = Source("data")
CONSTANT = Source("constant")
_TRANSPOSES = frozenset({"t", "T", "mT", "transpose", "swapaxes", "swapdims", "adjoint", "numpy_T"})
_SAME = frozenset({"contiguous", "detach", "clone", "requires_grad_", "alias", "_make_dual"})


def combine(name: str, sources: Iterable[Source], transposes_last_two: bool = False) -> Source:
    """The source of the result of the function `name` on operands of these sources."""
    found = list(sources)
    if any(s.kind == "data" for s in found):
        return DATA
    parameters = [s for s in found if s.kind == "parameter"]
    if not parameters:
        return CONSTANT
    if len(found) == 1 and parameters[0].exact:
        if keeps_values(name):
            return parameters[0]
        if name in _TRANSPOSES and transposes_last_two:
            return Source("parameter", parameters[0].names, True, not parameters[0].transposed)
    names = dict.fromkeys(n for s in parameters for n in s.names)
    return Source("parameter", tuple(names))


def keeps_values(name: str) -> bool:
    """Whether the function gives its operand again, element by element."""
    return name in _SAME


_IN_PLACE = frozenset({"setitem", "__setitem__", "set_data"}) | {
    f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}  # fmt: skip


def written(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a call of the function `name` writes into: a tensor, several, or None."""
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
    return args[0] if in_place and args else kwargs.get("out")


def after_write(before: Source, source: Source) -> Source:
    """The source of a tensor that a call has written into, whose result has this source: a parameter stays itself."""
    return before if before.exact or before.kind == "data" else combine("", (before, source))


def swaps_last_two(name: str, args: Sequence[Any], ndim: int) -> bool:
    """Whether a call of one of the transposing functions exchanges exactly the last two dimensions."""
    if name not in _TRANSPOSES or ndim < 2:
        return False
    if name in ("t", "T", "mT", "adjoint"):
        return ndim == 2 or name in ("mT", "adjoint")
    dims = [a % ndim for a in args[1:3] if isinstance(a, int)]
    return sorted(dims) == [ndim - 2, ndim - 1]


def site_call(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall | None:
    """Read one call of a torch function by its name; None where it is not in the table."""
    reader = _TABLE.get(name)
    return reader(name, args, kwargs, ndim) if reader is not None else None


def groups_for_weight(spec: Any, operand: Operand) -> Groups:
    """Groups of a weight operand: its channels as the table says, one group where it makes one output."""
    if operand.axis is None:
        block = spec.group_size if spec is not None and spec.granularity == "block" else None
        return Groups("tensor", 0, block)
    return Groups.for_weight(spec, operand.axis)


def _layer(axis: int, conv: bool, first: str = "input") -> Callable[..., SiteCall]:
    def read(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
        return SiteCall(name, (Operand(0, first, "input"), Operand(1, "weight", "weight", axis)), conv)

    return read


def _embedding(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
    return SiteCall(name, (Operand(1, "weight", "weight", 0),))


def _bilinear(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
    inputs = (Operand(0, "input1", "input"), Operand(1, "input2", "input"))
    return SiteCall(name, (*inputs, Operand(2, "weight", "weight", 0)))


def _matmul(left: int, keywords: tuple[str, str]) -> Callable[..., SiteCall]:
    def read(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
        rows, columns = Operand(left, keywords[0], "either", 0), Operand(left + 1, keywords[1], "either", -1)
        pair = tuple(_of_rank(o, ndim(o.get(args, kwargs))) for o in (rows, columns))
        return SiteCall("matmul" if name.startswith("__") else name, pair)

    return read


def _of_rank(operand: Operand, ndim: int) -> Operand:
    """A factor of a product: a vector is one channel; in a batch of matrices the rows or the columns of each are."""
    if ndim < 2:
        return replace(operand, axis=None)
    if ndim == 2:
        return operand
    return replace(operand, axis=-2, swapped=-1) if operand.axis == 0 else replace(operand, axis=-1, swapped=-2)


def _attention(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
    """Queries and keys are contracted along their last dimension, values along the one before."""
    rows = (Operand(0, "query", "attended", -2, swapped=-1), Operand(1, "key", "attended", -2, swapped=-1))
    return SiteCall(name, (*rows, Operand(2, "value", "attended", -1, swapped=-2)))


def _grouped(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
    first = "input" if name == "grouped_mm_fallback" else "mat_a" if name == "grouped_mm" else "self"
    second = "weight" if name == "grouped_mm_fallback" else "mat_b" if name == "grouped_mm" else "mat2"
    weight = Operand(1, second, "weight", -1)
    return SiteCall("grouped_mm", (Operand(0, first, "input"), _of_rank(weight, ndim(weight.get(args, kwargs)))))


def _reflected_matmul(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
    return SiteCall("matmul", (Operand(1, "other", "either", 0), Operand(0, "self", "either", -1)))


def _einsum(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall | None:
    if not args or not isinstance(args[0], str):
        return None
    listed = len(args) == 2 and isinstance(args[1], (list, tuple))
    inputs, _, output = args[0].replace(" ", "").partition("->")
    terms = inputs.split(",")
    output = output or "".join(sorted({c for c in inputs if inputs.count(c) == 1 and c.isalpha()}))
    if len(terms) < 2:
        return None
    operands = []
    for i, term in enumerate(terms):
        others = "".join(terms[:i] + terms[i + 1 :])
        kept = [k for k, c in enumerate(term) if c in output and c not in others]
        axis = kept[0] if kept and "." not in term else None
        if listed:
            operands.append(Operand(1, "operands", "either", axis, i))
        else:
            operands.append(Operand(1 + i, "operands", "either", axis))
    return SiteCall("einsum", tuple(operands))


def _tensordot(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
    """As many of the last dimensions of the first with the first of the second, or lists of the dimensions of each."""
    dims = args[2] if len(args) > 2 else kwargs.get("dims", 2)
    operands = []
    for i, operand in enumerate((Operand(0, "a", "either", None), Operand(1, "b", "either", None))):
        rank = ndim(operand.get(args, kwargs))
        if isinstance(dims, int):
            summed = set(range(rank)[-dims:] if i == 0 else range(rank)[:dims]) if dims else set()
        else:
            summed = {d % rank for d in dims[i]} if isinstance(dims, (tuple, list)) and rank else set(range(rank))
        kept = [d for d in range(rank) if d not in summed]
        operands.append(replace(operand, axis=kept[0] if kept else None))
    return SiteCall(name, tuple(operands))


def _chain(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
    """A product of a list of matrices, whose first and last may be vectors."""
    factors = args[0] if args else kwargs["tensors"]
    chain = [Operand(0, "tensors", "either", 0 if i == 0 else -1, i) for i in range(len(factors))]
    return SiteCall(name, tuple(_of_rank(operand, ndim(operand.get(args, kwargs))) for operand in chain))


def _convolution(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
    """The one function below all convolutions, which is told whether it is a transposed one."""
    transposed = args[6] if len(args) > 6 else kwargs.get("transposed", False)
    return SiteCall(name, (Operand(0, "input", "input"), Operand(1, "weight", "weight", 1 if transposed else 0)), True)


def _dot(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
    """A sum of products along one dimension: of vectors, each a channel, or of rows of vectors."""
    first, second = ("x", "y") if name.endswith("vecdot") else ("input", "other" if name == "vdot" else "tensor")
    pair = (Operand(0, first, "either", 0), Operand(1, second, "either", 0))
    return SiteCall(name, tuple(_of_rank(o, ndim(o.get(args, kwargs))) for o in pair))


def _matrices(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
    """A product of a chain of matrices, each an argument."""
    chain = [Operand(i, "matrices", "either", 0 if i == 0 else -1) for i in range(len(args))]
    return SiteCall(name, tuple(chain))


def _recurrent(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall | None:
    # Padded: (input, hx, params, ...); packed: (data, batch_sizes, hx, params, ...). hx is a pair for an LSTM.
    at = 2 if isinstance(args[2], (list, tuple)) and isinstance(args[3], bool) else 3
    weights = [i for i, p in enumerate(args[at]) if ndim(p) == 2]
    return SiteCall(name, (Operand(0, "input", "input"), *(Operand(at, "params", "weight", 0, i) for i in weights)))


def _cell(name: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: Callable[[Any], int]) -> SiteCall:
    hidden = (Operand(1, "hx", "input", index=0),) if name.startswith("lstm") else (Operand(1, "hx", "input"),)
    weights = (Operand(2, "w_ih", "weight", 0), Operand(3, "w_hh", "weight", 0))
    return SiteCall(name, (Operand(0, "input", "input"), *hidden, *weights))


_PRODUCTS = ("matmul", "linalg_matmul", "__matmul__", "mm", "bmm", "mv", "inner")
_TABLE: dict[str, Callable[..., SiteCall | None]] = {
    "linear": _layer(0, conv=False),
    **{f"conv{d}d": _layer(0, conv=True) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _layer(1, conv=True) for d in (1, 2, 3)},
    "convolution": _convolution,
    "conv_tbc": _layer(-1, conv=True),
    "embedding": _embedding,
    "embedding_bag": _embedding,
    "bilinear": _bilinear,
    **{name: _matmul(0, ("input", "other")) for name in _PRODUCTS},
    **dict.fromkeys(("dot", "vdot", "vecdot", "linalg_vecdot"), _dot),
    "chain_matmul": _matrices,
    "__rmatmul__": _reflected_matmul,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
    **{name: _matmul(1, ("mat1", "mat2")) for name in ("addmm", "baddbmm", "addmv", "addbmm")},
    "einsum": _einsum,
    "tensordot": _tensordot,
    **dict.fromkeys(("multi_dot", "linalg_multi_dot"), _chain),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **{f"{name}_cell": _cell for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}
FUNCTIONS = frozenset(_TABLE) | {"multi_head_attention_forward"}
