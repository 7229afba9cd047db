"""Nodes that only lay values out anew: a run of them as one Reshape and one Transpose, and none around a product.

An attention in torch has a dozen of them. Dimensions are taken apart into factors, the named ones too, and put together
again; what was dynamic stays so.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.lowering.records import DOMAIN
from qgraph.exporters.lowering.uses import Use, as_product
from qgraph.modules import ActivationForm

MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze")
ROW_WISE = ("token", "tensor")  # groups that rows have, however they are counted
Branch = tuple[ir.Node, list[ir.Node]]  # a Gather, and the run behind it


def gather_moves(graph: ir.Graph, follow: dict[str, ir.Value]) -> None:
    """Replace runs of `MOVES` by fewer nodes, in place.

    A run may end in Gathers of its first dimension, as of queries, keys and values: what goes on alike behind each of
    them then goes before them.

    Parameters
    ----------
    follow : dict of values
        They stay; the last of a run may be replaced by another, which is put in its place.
    """
    b = GraphBuilder(graph)
    kept = {*follow.values(), *graph.outputs}
    for node in list(graph):
        if node.graph is graph and _moves(node):
            run = _run(node, kept)
            branches = _branches(run[-1].outputs[0], kept)
            if not any(_replaced(b, run, branches, n, follow) for n in range(_alike(branches), 0, -1)):
                any(_replaced(b, run[:n], [], 0, follow) for n in range(len(run), 1, -1))


def keep_rows(graph: ir.Graph, follow: dict[str, ir.Value], forms: Mapping[str, ActivationForm]) -> None:
    """Rows that are flattened for a Gemm, and then laid out as they were, go through a MatMul and an Add as they are.

    The quantizer of the Gemm's input may stand between. See `gather_moves` for `follow`.

    Parameters
    ----------
    forms : mapping
        Of the quantizers, by site.
    """
    b = GraphBuilder(graph)
    quantizers = {node.outputs[0] for node in graph if node.domain == DOMAIN}  # these are seen by their sites
    kept = {*follow.values(), *graph.outputs} - quantizers
    for gemm in [node for node in graph if node.op_type == "Gemm"]:
        between = [node for node in (_maker(gemm, kept),) if node is not None and _is_row_wise(node, forms)]
        first, last = _maker((between or [gemm])[0], kept), _user(gemm, kept)
        weight = gemm.inputs[1]
        product = None if weight is None else as_product(Use(weight, gemm, 1), (0, 0))
        if first is None or last is None or product is None or {first.op_type, last.op_type} != {"Reshape"}:
            continue
        if (bias := product[3]) is not None and (bias.shape is None or len(bias.shape) != 1):
            continue
        try:
            layout = _Layout(first.inputs[0])
            layout.follow(first)
            layout.unflatten(last.outputs[0])
            shape, order = layout.steps()
        except _Unclear:
            continue
        if order is None:
            _kept(b, first, between, product, last, shape, follow)


def _maker(node: ir.Node, kept: set[ir.Value]) -> ir.Node | None:
    """The node whose result a node takes first, where nothing else does."""
    x = node.inputs[0]
    return None if x is None or x in kept or len(x.uses()) != 1 else x.producer()


def _user(node: ir.Node, kept: set[ir.Value]) -> ir.Node | None:
    """The node that alone takes the result of a node, as what it lays out."""
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and uses[0].idx == 0 and node.outputs[0] not in kept else None


def _is_row_wise(node: ir.Node, forms: Mapping[str, ActivationForm]) -> bool:
    if node.domain != DOMAIN or node.op_type != "Activation":
        return False
    form = forms.get(node.attributes["site"].as_string())
    return form is not None and form.groups.kind in ROW_WISE


def _kept(
    b: GraphBuilder,
    first: ir.Node,
    between: Sequence[ir.Node],
    product: tuple[ir.Node, ir.Value, int, ir.Value | None],
    last: ir.Node,
    shape: list[int] | None,
    follow: dict[str, ir.Value],
) -> None:
    gemm, _, axis, bias = product
    x, y, weight = first.inputs[0], last.outputs[0], gemm.inputs[1]
    assert x is not None and y.shape is not None and first.outputs[0].shape is not None
    width = first.outputs[0].shape[-1]
    if shape is not None:
        with b.before(first):
            x = b.op("Reshape", [x, b.ints(shape)], name=first.name, dtype=x.dtype)
        x.shape = ir.Shape([*y.shape[:-1], width])
    for node in between:
        node.replace_input_with(0, x)
        node.outputs[0].shape, x = x.shape, node.outputs[0]
    with b.before(gemm):
        if axis == 0:
            weight = b.op("Transpose", [weight], {"perm": [1, 0]}, name=gemm.name)
        new = b.op("MatMul", [x, weight], name=gemm.name)
        if bias is not None:
            new.shape, new.type = y.shape, y.type
            new = b.op("Add", [new, bias], name=gemm.name)
    _replace([gemm, last], new, follow)
    _remove([first])


def _moves(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in MOVES


def _run(node: ir.Node, kept: set[ir.Value]) -> list[ir.Node]:
    """A node and those behind it that lay out anew what it computes, and that nothing else uses."""
    run = [node]
    while run[-1].outputs[0] not in kept:
        uses = list(run[-1].outputs[0].uses())
        if len(uses) != 1 or uses[0].idx or not _moves(uses[0].node) or uses[0].node.graph is not node.graph:
            break
        run.append(uses[0].node)
    return run


def _branches(value: ir.Value, kept: set[ir.Value]) -> list[Branch]:
    """The Gathers that use a value, where nothing else does and each takes one index of its first dimension."""
    uses = list(value.uses())
    if value in kept or any(index or not _takes_one(node) for node, index in uses):
        return []
    return [(node, _run(node, kept)[1:]) for node, _ in uses]


def _takes_one(node: ir.Node) -> bool:
    if node.op_type != "Gather" or ("axis" in node.attributes and node.attributes["axis"].as_int()):
        return False
    index = node.inputs[1]
    return index is not None and index.shape is not None and len(index.shape) == 0


def _alike(branches: Sequence[Branch]) -> int:
    """How many nodes the runs behind Gathers have in common."""
    runs = [[_told(node) for node in run] for _, run in branches]
    count = 0
    while runs and all(run[count : count + 1] == runs[0][count : count + 1] != [] for run in runs):
        count += 1
    return count


def _told(node: ir.Node) -> tuple[object, ...]:
    """What a node does with what it lays out."""
    return node.op_type, *(_order(node) if node.op_type == "Transpose" else node.inputs[1:])


def _order(node: ir.Node) -> Sequence[int]:
    given = node.attributes.get("perm")
    return range(len(_sizes(node.outputs[0])))[::-1] if given is None else given.as_ints()


def _replaced(
    b: GraphBuilder, run: Sequence[ir.Node], branches: Sequence[Branch], behind: int, follow: dict[str, ir.Value]
) -> bool:
    """Put fewer nodes in the place of a run and of the next `behind` of its branches; False where that cannot be."""
    common = branches[0][1][:behind] if branches else []
    try:
        layout = _Layout(run[0].inputs[0])
        for node in run:
            layout.follow(node)
        for node in common:
            layout.follow(node, ahead=1)
        shape, order = layout.steps()
    except _Unclear:
        return False
    if (shape is not None) + (order is not None) >= len(run) + len(common) * len(branches):
        return False
    y, name = run[0].inputs[0], (common or run)[-1].name
    with b.before(run[0]):
        if shape is not None:
            y = b.op("Reshape", [y, b.ints(shape)], name=name)
        if order is not None:
            y = b.op("Transpose", [y], {"perm": list(order)}, name=name)
    assert y is not None
    if not branches:
        _replace(run, y, follow)
    for gather, moves in branches:
        gather.replace_input_with(0, y)
        _replace(moves[:behind], gather.outputs[0], follow)
    if branches:
        _remove(run)
    return True


def _replace(run: Sequence[ir.Node], new: ir.Value, follow: dict[str, ir.Value]) -> None:
    old = run[-1].outputs[0]
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new)
    follow |= {key: new for key, value in follow.items() if value is old}
    _remove(run)


def _remove(run: Sequence[ir.Node]) -> None:
    for node in reversed(run):
        assert node.graph is not None
        node.graph.remove(node, safe=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Factor:
    """A part of a dimension: a number times names of sizes."""

    number: int
    names: tuple[str, ...] = ()


class _Unclear(Exception):
    """Sizes that do not tell what goes where."""


class _Layout:
    """How a value lies in another one that it is made of: for each dimension the factors of the other's in it."""

    def __init__(self, other: ir.Value | None) -> None:
        self.other = _sizes(other)
        self.dims = [list(factors) for factors in self.other]

    def follow(self, node: ir.Node, ahead: int = 0) -> None:
        """Go on through a node, which does not see the first `ahead` dimensions."""
        seen = self.dims[ahead:]
        if node.op_type == "Transpose":
            self.dims[ahead:] = [seen[i] for i in _order(node)]
        else:
            self.dims[ahead:] = self._cut(list(itertools.chain(*seen)), _sizes(node.outputs[0]))

    def unflatten(self, value: ir.Value) -> None:
        """Lay rows out as those of another value."""
        self.dims[:-1] = self._cut(list(itertools.chain(*self.dims[:-1])), _sizes(value)[:-1])

    def _cut(self, flat: list[_Factor], sizes: Sequence[list[_Factor]]) -> list[list[_Factor]]:
        """Factors in their order, cut into dimensions of the given sizes."""
        dims: list[list[_Factor]] = [[] for _ in sizes]
        for dim, size in zip(dims, sizes, strict=True):
            number, names = math.prod(f.number for f in size), Counter(name for f in size for name in f.names)
            while number != 1 or names:
                first = flat[0] if flat else _Factor(0)
                if first.number and number % first.number == 0 and Counter(first.names) <= names:
                    number, names = number // first.number, names - Counter(first.names)
                    dim.append(flat.pop(0))
                elif not names and not first.names and first.number and first.number % number == 0:
                    flat[:1] = self._split(first, number)
                else:
                    raise _Unclear
        if flat:
            raise _Unclear
        return dims

    def _split(self, factor: _Factor, number: int) -> list[_Factor]:
        parts = [_Factor(number), _Factor(factor.number // number)]
        for group in (*self.other, *self.dims):
            if factor in group:
                group[group.index(factor) : group.index(factor) + 1] = parts
        return parts

    def steps(self) -> tuple[list[int] | None, list[int] | None]:
        """The shape, 0 for a size that stays, and the order by which the other value becomes this one.

        None where there is nothing to do.
        """
        place = {factor: i for i, factor in enumerate(itertools.chain(*self.other))}
        blocks = sorted(self.dims, key=lambda dim: place[dim[0]] if dim else len(place))
        if any(place[after] != place[factor] + 1 for dim in blocks for factor, after in itertools.pairwise(dim)):
            raise _Unclear  # a dimension of what does not lie together: it takes one more Reshape
        order = sorted(range(len(blocks)), key=lambda i: next(k for k, dim in enumerate(self.dims) if dim is blocks[i]))
        shape = None if blocks == self.other else [self._told(i, dim) for i, dim in enumerate(blocks)]
        return shape, None if order == sorted(order) else order

    def _told(self, i: int, dim: list[_Factor]) -> int:
        """What a Reshape is told of a dimension."""
        if all(not factor.names for factor in dim):
            return math.prod(factor.number for factor in dim)
        if dim in self.other[i : i + 1]:
            return 0
        raise _Unclear


def _sizes(value: ir.Value | None) -> list[list[_Factor]]:
    """The factors of each dimension: none of a 1, else one."""
    if value is None or value.shape is None:
        raise _Unclear
    return [_factors(dim) for dim in value.shape]


def _factors(dim: int | ir.SymbolicDim) -> list[_Factor]:
    if isinstance(dim, int):
        if dim == 0:
            raise _Unclear
        return [] if dim == 1 else [_Factor(dim)]
    parts = [part.strip() for part in (dim.value or "").split("*")]
    names = tuple(part for part in parts if not part.isdigit())
    if not all(name.isidentifier() for name in names):
        raise _Unclear
    return [_Factor(math.prod(int(part) for part in parts if part.isdigit()), names)]
