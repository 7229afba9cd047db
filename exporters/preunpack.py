"""Weights stored as a runtime holds them: what unpacks them is computed now, not whenever the file is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection

import onnx_ir as ir

from qgraph.exporters.lowering.graph import remove_unused
from qgraph.exporters.naming import unique
from qgraph.exporters.probe import session_of
from qgraph.exporters.report import PARTS, UNPACKED

DRAWS = re.compile("Random|Bernoulli|Multinomial")  # the same operator gives other values at each run


def preunpack(model: ir.Model, sites: Collection[str]) -> None:
    """Replace every value that is computed from packed weights alone by an initializer ``<site>.unpacked``, in place.

    Parameters
    ----------
    model : ir.Model
        A lowered one, whose initializers are still called ``<site>.<part>``.
    sites : collection of str
        The weights that it stores.
    """
    graph = model.graph
    owners = {f"{site}.{part}": site for site in sites for part in PARTS}
    source = {value: owners.get(name) for name, value in graph.initializers.items()}
    for node in graph:  # of a value that is constant: a weight that it is computed from, or None
        given = [value for value in node.inputs if value is not None]
        bodies = any(
            item.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for item in node.attributes.values()
        )
        if given and all(value in source for value in given) and not bodies and not DRAWS.search(node.op_type):
            site = next((source[value] for value in given if source[value] is not None), None)
            source |= dict.fromkeys(node.outputs, site)
    computed = [v for v, site in source.items() if site is not None and v.producer() is not None and _leaves(v, source)]
    if not computed:
        return
    part = ir.Model(ir.convenience.extract(graph, [], computed), ir_version=model.ir_version)
    for value in (value for node in part.graph for value in node.outputs if value.type is None):
        value.shape = None  # which alone cannot be written
    arrays = session_of(ir.to_proto(part).SerializeToString(), optimize=False).run(None, {})
    taken = set(graph.initializers)
    for value, array in zip(computed, arrays, strict=True):
        name = unique(f"{source[value]}.{UNPACKED}", taken)
        held = ir.tensor(array, name=name)
        stored = ir.Value(name=name, type=ir.TensorType(held.dtype), shape=held.shape, const_value=held)
        graph.register_initializer(stored)
        value.replace_all_uses_with(stored, replace_graph_outputs=True)
    remove_unused(graph)


def _leaves(value: ir.Value, constant: Collection[ir.Value]) -> bool:
    """Whether something that is computed at run time uses a value."""
    return value.is_graph_output() or any(use.outputs[0] not in constant for use in value.consumers())
