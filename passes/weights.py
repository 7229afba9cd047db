"""What the weight passes share: where a weight operand enters its site, and the value it has."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qgraph.graph import GraphSite, find_sites, is_quantizer, nodes_written, over_same_memory, unquantized
from qgraph.pipeline import Note, PassContext
from qgraph.placement import Placed


@dataclass(frozen=True, slots=True)
class Entry:
    """The edge on which a weight's quantizer belongs: from `weight` (as yet rewritten) into `user`.

    For a parameter used transposed it lies before the transpose, so that tied weights share their groups.
    """

    site: GraphSite
    placed: Placed
    user: fx.Node
    weight: fx.Node

    @property
    def dense(self) -> fx.Node:
        """The weight before any quantizer or sparsifier."""
        return unquantized(self.weight)

    @property
    def writes(self) -> list[fx.Node]:
        """What writes into the weight's memory before it is used."""
        earlier = itertools.takewhile(lambda node: node is not self.user, self.user.graph.nodes)
        return [n for n in earlier if any(over_same_memory(self.weight, target) for target in nodes_written(n))]

    def example(self, module: nn.Module) -> Callable[[], Tensor]:
        """Computes the present value of the dense weight."""
        node: Any = self.dense
        while self.placed.source.exact and node.op != "get_attr":
            node = node.args[0]
        return value_of(node, module, [] if self.placed.source.exact else self.writes)

    def reroute(self, new: fx.Node) -> None:
        """Let the site take `new` for its weight."""
        if self.user is self.site.node:
            node = self.user
            node.args, node.kwargs = self.placed.operand.put(node.args, dict(node.kwargs), new)
        else:
            self.user.replace_input_with(self.weight, new)


def entries(graph: fx.Graph, context: PassContext) -> list[Entry]:
    """Every weight operand of every site of a graph."""
    return [_entry(site, placed) for site in find_sites(graph, context.owner) for placed in site.site.weights]


def _entry(site: GraphSite, placed: Placed) -> Entry:
    user, node = site.node, site.operand_node(placed)
    while placed.source.exact and node.op != "get_attr" and not is_quantizer(node) and not nodes_written(node):
        user, node = node, node.args[0]
    return Entry(site, placed, user, node)


def insert_module(graph: fx.Graph, entry: Entry, key: str, args: tuple[Any, ...], meta: dict[str, Any]) -> fx.Node:
    """Call the module `qgraph.<key>` after a weight; the call that is already there is used again. A weight that has
    been written into is taken as it is where it is used.
    """
    target = f"qgraph.{key.replace('.', '__')}"
    written = bool(entry.writes)
    for node in graph.nodes:
        if not written and node.op == "call_module" and node.target == target and node.args == args:
            return node
    with graph.inserting_before(entry.user) if written else graph.inserting_after(entry.weight):
        node = graph.create_node("call_module", target, args, name=f"{key.replace('.', '_')}_q")
    node.meta.update(meta)
    return node


def weight_meta(entry: Entry, spec: Any) -> dict[str, Any]:
    kept: dict[str, Any] = {key: entry.dense.meta[key] for key in ("shape", "dtype") if key in entry.dense.meta}
    return {
        **kept,
        "where": entry.site.node.meta.get("where", ""),
        "qgraph": {"site": entry.placed.site, "spec": str(spec)},
    }


def value_of(node: fx.Node, module: nn.Module, writes: Sequence[fx.Node] = ()) -> Callable[[], Tensor]:
    """Computes the present value of a node that depends on parameters alone, and on recorded sizes; `writes`: nodes
    that write into it, which is done to a copy.
    """

    def run() -> Tensor:
        found: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for each in _needed(node, *writes):
                value = _compute(each, module, found)
                found[each] = value.clone() if writes and each.op == "get_attr" else value
        return found[node]

    return run


def _needed(*nodes: fx.Node) -> list[fx.Node]:
    """The nodes that values depend on, in order; sizes are known, so what they are sizes of is left out."""
    wanted, stack = set(nodes), list(nodes)
    while stack:
        for each in _inputs(stack.pop()):
            if each not in wanted:
                wanted.add(each)
                stack.append(each)
    return [each for each in nodes[0].graph.nodes if each in wanted]


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [] if _known_size(node) is not None else node.all_input_nodes


def _known_size(node: fx.Node) -> Any:
    """What a `size` call gave when the graph was recorded, else None."""
    if node.op != "call_method" or node.target != "size" or not isinstance(node.args[0], fx.Node):
        return None
    shape = node.args[0].meta.get("shape")
    return None if shape is None else (shape[node.args[1]] if len(node.args) > 1 else shape)


def _compute(node: fx.Node, module: nn.Module, found: dict[fx.Node, Any]) -> Any:
    size = _known_size(node)
    if size is not None:
        return size
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(module)
    args = fx.node.map_arg(node.args, found.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, found.__getitem__)
    if node.op == "call_module":
        return module.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def note(name: str, entry: Entry, text: str) -> Note:
    return Note(name, entry.placed.site, text)
