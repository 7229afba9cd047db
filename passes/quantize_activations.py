"""Insert an activation quantizer before every site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qgraph.graph import find_sites, is_quantizer
from qgraph.pipeline import Note, Pass, PassContext, PassResult


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Quantize the input operands of each site as the module's config says.

    Before::

        linear = F.linear(x, weight, bias)

    After::

        input_q = self.qgraph.input(x);  linear = F.linear(input_q, weight, bias)

    1. The quantizer stands right before the site, so that nothing happens to the tensor in between.
    2. Integer inputs (the ids of an embedding) have none; a recurrent layer's quantizer is on the layer's input, its
       hidden state stays float.
    3. An operand that already is quantized is left as it is.
    """

    name: ClassVar[str] = "quantize-activations"

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        notes: list[Note] = []
        modified = False
        for found in list(find_sites(graph, context.owner)):
            for placed in found.site.inputs:
                x = found.operand_node(placed)
                if not isinstance(x, fx.Node) or is_quantizer(x):
                    continue
                quantizer = context.owner.activation(placed, found.site.call)
                if quantizer is None:
                    continue
                with graph.inserting_before(found.node):
                    target = f"qgraph.{placed.key.replace('.', '__')}"
                    new = graph.create_node("call_module", target, (x,), name=f"{placed.key.replace('.', '_')}_q")
                new.meta.update({key: x.meta[key] for key in ("shape", "dtype") if key in x.meta})
                new.meta["where"] = found.node.meta.get("where", "")
                new.meta["qgraph"] = {"site": placed.site, "spec": str(quantizer.spec)}
                node = found.node
                node.args, node.kwargs = placed.operand.put(node.args, dict(node.kwargs), new)
                modified = True
                notes.append(Note(self.name, placed.site, str(quantizer.spec)))
        return PassResult(modified, tuple(notes))
