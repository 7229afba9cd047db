"""Quantize a tensor that feeds several sites once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qgraph.graph import is_quantizer, nodes_written
from qgraph.modules import ActivationQuantizer
from qgraph.pipeline import Note, Pass, PassContext, PassResult

_PURE_OPS = frozenset({"get_attr", "placeholder", "output"})


@dataclass(frozen=True)
class ShareQuantizers(Pass):
    """Let sites of one graph that quantize the same tensor alike share the first quantizer.

    Before::

        a_q = self.qgraph.w1__input(x);  b_q = self.qgraph.w2__input(x)

    After::

        a_q = self.qgraph.w1__input(x)

    1. Only quantizers of the same spec and groups, with no state of their own (a learned step, a static range), are
       alike.
    2. Nothing between the two calls may change a tensor in place.
    """

    name: ClassVar[str] = "share-quantizers"

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        notes: list[Note] = []
        first: dict[object, fx.Node] = {}
        for node in list(graph.nodes):
            if _may_change_tensors(node, context):
                first.clear()
            module = context.module.get_submodule(str(node.target)) if is_quantizer(node) else None
            if not isinstance(module, ActivationQuantizer) or module.step is not None or module.range is not None:
                continue
            key = (node.args, module.spec, module.groups)
            kept = first.setdefault(key, node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)
                notes.append(Note(self.name, module.site, f"shares {kept.meta['qgraph']['site']}"))
        return PassResult(bool(notes), tuple(notes))


def _may_change_tensors(node: fx.Node, context: PassContext) -> bool:
    if node.op in _PURE_OPS or is_quantizer(node):
        return False
    if node.op == "call_module":
        return True
    return bool(nodes_written(node))
