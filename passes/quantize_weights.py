"""Insert a weight quantizer before every site."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qgraph.modules import Sparsifier, WeightQuantizer
from qgraph.passes.weights import entries, insert_module, note, weight_meta
from qgraph.pipeline import Note, Pass, PassContext, PassResult


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize the weight operand of each site as the module's config says.

    Before::

        weight = self.weight;  linear = F.linear(x, weight, bias)

    After::

        weight_q = self.qgraph.weight(weight);  linear = F.linear(x, weight_q, bias)

    1. The operand derives from parameters alone; its groups follow the site table's channel axis.
    2. After a sparsifier the quantizer also takes the dense weight: ``self.qgraph.weight(sparse, weight)``.
    3. A parameter used transposed is quantized before the transpose; tied weights share one quantizer.
    4. An operand that already is quantized is left as it is.
    5. A weight that has been written into is quantized right before its site, at each of them: as it is there, with the
       gradients that are on there.
    """

    name: ClassVar[str] = "quantize-weights"

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        notes: list[Note] = []
        modified = False
        for entry in entries(graph, context):
            dense = entry.dense
            _, quantizer = context.owner.weight(entry.placed, entry.example(context.module))
            if quantizer is None:
                notes.append(note(self.name, entry, "left float"))
                continue
            sparse = entry.weight is not dense
            if sparse and not _is_sparsifier(entry.weight, context):
                continue
            args = (entry.weight, dense) if sparse else (entry.weight,)
            new = insert_module(graph, entry, entry.placed.key, args, weight_meta(entry, quantizer.spec))
            entry.reroute(new)
            modified = True
            notes.append(note(self.name, entry, _told(quantizer, dense)))
        return PassResult(modified, tuple(notes))

    def ensures(self, graph: fx.Graph, context: PassContext) -> str | None:
        config = context.owner.config
        if config is None or config.weight is None:
            return None
        fit = [e for e in entries(graph, context) if not e.placed.source.unfit]
        open_sites = [e.placed.site for e in fit if e.weight is e.dense]
        return f"not quantized: {', '.join(open_sites)}" if open_sites else None


def _told(quantizer: WeightQuantizer, dense: fx.Node) -> str:
    """The spec, and what becomes of a block that is longer than a row."""
    block, shape = quantizer.groups.block, dense.meta.get("shape")
    if block is None or shape is None or quantizer.groups.shape(shape)[1] > 1:
        return str(quantizer.spec)
    rows = quantizer.groups.shape(shape)[0]
    length = math.prod(shape) // max(rows, 1)
    return f"{quantizer.spec}; a row has {length} values, so its one block is the whole row"


def _is_sparsifier(node: fx.Node, context: PassContext) -> bool:
    return isinstance(context.module.get_submodule(str(node.target)), Sparsifier)
