"""Write steps that many layers repeat once, as model-local functions, where a file would else be mostly nodes.

Every runtime of ONNX inlines such a function before anything else; onnxruntime's optimizer then sees the plain nodes.
Some other runtimes want them inlined first (`onnx.inliner`), so files that are small enough without stay plain.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qgraph.exporters.naming import stem

DOMAIN = "qgraph"
REPEATS = 2  # a function that is called once saves nothing
SHORTEST = 4  # nodes; a call takes about the bytes of two


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The nodes of one step, in order, what they take from outside and what others take from them."""

    name: str
    nodes: list[ir.Node]
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    pattern: Any


def steps_of(nodes: Iterable[ir.Node]) -> dict[str, list[ir.Node]]:
    """The nodes that were added for weights and activations, by the name of their step."""
    found: dict[str, list[ir.Node]] = {}
    for node in nodes:
        if node.graph is not None and node.name:
            found.setdefault(stem(node.name), []).append(node)
    return found


def outline(model: ir.Model, steps: Mapping[str, list[ir.Node]]) -> dict[int, ir.Value]:
    """Replace groups of nodes that do the same by calls of one function.

    Parameters
    ----------
    model : ir.Model
        Changed in place.
    steps : mapping
        See `steps_of`.

    Returns
    -------
    dict
        id of each value that a call now computes -> its new value.
    """
    groups: dict[Any, list[_Chunk]] = {}
    order = {node: i for i, node in enumerate(model.graph)}
    for name, members in steps.items():
        chunk = _chunk(name, sorted(members, key=order.__getitem__))
        if len(chunk.nodes) >= SHORTEST:
            groups.setdefault(chunk.pattern, []).append(chunk)
    replaced: dict[int, ir.Value] = {}
    numbers = itertools.count()
    for chunks in groups.values():
        if len(chunks) >= REPEATS:
            # Read again: what a chunk takes may be what an earlier call now computes.
            function = _function(
                _chunk(chunks[0].name, chunks[0].nodes), f"Step{next(numbers)}", model.graph.opset_imports
            )
            model.functions[function.identifier()] = function
            model.graph.opset_imports[DOMAIN] = 1
            for chunk in chunks:
                _call(_chunk(chunk.name, chunk.nodes), function, model.graph, replaced)
    model.graph.sort()
    return replaced


def _chunk(name: str, nodes: list[ir.Node]) -> _Chunk:
    inside = {id(value): (i, k) for i, node in enumerate(nodes) for k, value in enumerate(node.outputs)}
    members = {id(node) for node in nodes}
    inputs: list[ir.Value] = []
    places: dict[int, int] = {}
    steps = []
    for node in nodes:
        references: list[Any] = []
        for value in node.inputs:
            if value is None or id(value) in inside:
                references.append(None if value is None else inside[id(value)])
                continue
            if id(value) not in places:
                places[id(value)] = len(inputs)
                inputs.append(value)
            references.append(places[id(value)])
        attributes = tuple(sorted((key, str(attribute.value)) for key, attribute in node.attributes.items()))
        steps.append((node.domain, node.op_type, attributes, tuple(references), len(node.outputs)))
    outputs = [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(id(use.node) not in members for use in value.uses())
    ]
    pattern = (tuple(steps), tuple(inside[id(value)] for value in outputs))
    return _Chunk(name, nodes, inputs, outputs, pattern)


def _function(chunk: _Chunk, name: str, opsets: Mapping[str, int]) -> ir.Function:
    names = (f"v{i}" for i in itertools.count())
    new = {id(value): ir.Value(name=next(names)) for value in chunk.inputs}
    inputs = list(new.values())
    copies = []
    for node in chunk.nodes:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else new[id(value)] for value in node.inputs],
            node.attributes.values(),
            num_outputs=len(node.outputs),
        )
        for old, value in zip(node.outputs, copy.outputs, strict=True):
            value.name = next(names)
            new[id(old)] = value
        copies.append(copy)
    used = {domain: opsets[domain] for domain in {node.domain for node in chunk.nodes}}
    outputs = [new[id(value)] for value in chunk.outputs]
    return ir.Function(
        DOMAIN, name, graph=ir.Graph(inputs, outputs, nodes=copies, opset_imports=used, name=name), attributes=()
    )


def _call(chunk: _Chunk, function: ir.Function, graph: ir.Graph, replaced: dict[int, ir.Value]) -> None:
    call = ir.node(function.name, chunk.inputs, domain=DOMAIN, num_outputs=len(chunk.outputs), name=chunk.name)
    graph.insert_after(chunk.nodes[-1], call)
    for old, new in zip(chunk.outputs, call.outputs, strict=True):
        new.name, new.shape, new.type = f"{old.name}", old.shape, old.type
        old.name = f"{old.name}/inside"
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        replaced[id(old)] = new
    graph.remove(chunk.nodes, safe=True)
