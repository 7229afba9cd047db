"""Insert a sparsifier before every site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qgraph.passes.weights import entries, insert_module, note, weight_meta
from qgraph.pipeline import Note, Pass, PassContext, PassResult


@dataclass(frozen=True)
class SparsifyWeights(Pass):
    """Prune the weight operand of each site as the module's config says.

    Before::

        weight = self.weight;  linear = F.linear(x, weight, bias)

    After::

        weight_sparsifier_q = self.qgraph.weight__sparsifier(weight);  linear = F.linear(x, weight_sparsifier_q, bias)

    1. Pruning runs along the contracted dimension of the operand.
    2. It stands before any quantizer, so this pass comes first; an operand already rewritten is left as it is.
    """

    name: ClassVar[str] = "sparsify-weights"

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        notes: list[Note] = []
        modified = False
        for entry in entries(graph, context):
            if entry.weight is not entry.dense:
                continue
            sparsifier, _ = context.owner.weight(entry.placed, entry.example(context.module))
            if sparsifier is None:
                continue
            key = f"{entry.placed.key}.sparsifier"
            meta = weight_meta(entry, sparsifier.sparsity)
            entry.reroute(insert_module(graph, entry, key, (entry.weight,), meta))
            modified = True
            notes.append(note(self.name, entry, str(sparsifier.sparsity)))
        return PassResult(modified, tuple(notes))
