"""Write what modules do alike once, as model-local functions, where a file would else be mostly nodes.

A stack of equal blocks becomes one function, called with the weights of each; so do quantizers inside it. Every runtime
of ONNX inlines such functions before anything else; onnxruntime's optimizer then sees the plain nodes. Some other
runtimes want them inlined first (`onnx.inliner`), so files that are small enough without stay plain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import onnx
import onnx.inliner
import onnx_ir as ir

from qgraph.exporters.naming import SHARED, common_path, forget_type, identifiers, stem

DOMAIN = "model"
SHORTEST = 4  # nodes
LIFTED = 16  # nodes, at most, that go before the module they stood in
NODE, CALL, INPUT, FUNCTION = 22, 40, 4, 80  # bytes, about


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The nodes of one module or step, in order, what they take from outside and what others take from them."""

    path: str
    graph: ir.Graph
    nodes: list[ir.Node]
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    pattern: Any


def owners(graph: ir.Graph) -> list[str]:
    """For each node, in order, the path of the module or step that it works for, as its name says; "" if none."""
    names = [node.name or "" for node in graph]
    return [stem(name) if "/" in name or "." in name else "" for name in names]


def outline(model: ir.Model, owned_by: Sequence[str], modules: Mapping[str, str]) -> None:
    """Replace what modules do alike by calls of one function, in place, as long as that saves bytes.

    Parameters
    ----------
    model : ir.Model
    owned_by : sequence of str
        See `owners`; for the nodes of the model in their order.
    modules : mapping
        Path -> name of the class, which the function is called by.
    """
    graphs = [model.graph]
    paths: dict[ir.Graph, str] = {}
    owner = dict(zip(model.graph, owned_by, strict=True))
    model.graph.extend(_lifted(_hoisted(owner), owner))  # moves them: the order is now this one
    names: set[str] = set()
    while True:
        chunks = max(_alike(graphs, owner), key=_saved, default=[])
        if _saved(chunks) <= 0:
            break
        path = chunks[0].path
        name = _fresh(modules.get(path, path.rpartition(".")[2].capitalize()), names)
        body, copies = _body(chunks[0], name, model.graph.opset_imports)
        owner |= {copy: owner[node] for node, copy in copies.items()}
        for node, *named in zip(body, *map(_names_inside, chunks), strict=True):
            node.name = f"{path}.{named[0]}" if named[0] and len(set(named)) == 1 else None
        graphs.append(body)
        paths[body] = path
        for chunk in chunks:  # read again: what it takes may be what the call before now computes
            call = _call(_chunk(chunk.path, chunk.graph, chunk.nodes), name)
            owner[call] = chunk.path
    for value in model.graph.initializers.values():
        forget_type(value)
    for body in graphs[1:]:
        _shorten(body, paths[body])
        if any(node.domain == DOMAIN for node in body):
            body.opset_imports[DOMAIN] = 1
        function = ir.Function(DOMAIN, body.name or "", graph=body, attributes=())
        model.functions[function.identifier()] = function
        model.graph.opset_imports[DOMAIN] = 1


def _hoisted(owner: dict[ir.Node, str]) -> list[ir.Node]:
    """What several modules may use goes first: tables, and sizes computed from the shapes of the inputs.

    Else it stood inside the first module that uses it, which would then differ from the others.
    """
    shared: dict[ir.Node, None] = {}
    known: set[ir.Value] = set()
    for node, path in owner.items():
        inputs = [value for value in node.inputs if value is not None]
        computable = all(value in known or value.producer() is None for value in inputs)
        sizes = node.op_type == "Shape" or any(value in known for value in inputs)
        if computable and (sizes or path.startswith(SHARED)):
            known.update(node.outputs)
            shared[node] = None
            owner[node] = ""
    return [*shared, *(node for node in owner if node not in shared)]


def _lifted(nodes: list[ir.Node], owner: dict[ir.Node, str]) -> list[ir.Node]:
    """What the first of several modules computes for the others too goes before that module.

    A mask, say, that the tracer found to be the same in every layer.
    """
    place = {node: (float(i), 0) for i, node in enumerate(nodes)}
    first: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for path in _with_parents(owner[node]):
            first.setdefault(path, i)
    for node in nodes:
        users = [owner[use.node] for value in node.outputs for use in value.uses() if use.node in owner]
        around = reduce(common_path, users, owner[node])
        inside = [path for path in _with_parents(owner[node]) if len(path) > len(around)]
        if not inside or not any(_is_in(path, inside[0]) for path in users):
            continue
        needed, others = _made_inside(node, inside[0], owner)
        if len(needed) <= LIFTED and all(place[maker][0] < first[inside[0]] for maker in others):
            for maker in needed:
                place[maker], owner[maker] = (first[inside[0]] - 0.5, len(around)), around
    return sorted(nodes, key=place.__getitem__)


def _made_inside(node: ir.Node, path: str, owner: Mapping[ir.Node, str]) -> tuple[set[ir.Node], set[ir.Node]]:
    """The nodes of a module that a node of it needs, itself included, and those outside that they need."""
    needed, others, todo = {node}, set(), [node]
    while todo:
        for value in todo.pop().inputs:
            maker = None if value is None else value.producer()
            if maker is None or maker in needed:
                continue
            if _is_in(owner[maker], path):
                needed.add(maker)
                todo.append(maker)
            else:
                others.add(maker)
    return needed, others


def _is_in(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _with_parents(path: str) -> list[str]:
    """``a``, ``a.b``, ``a.b.c`` of ``a.b.c``."""
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _alike(graphs: Sequence[ir.Graph], owner: Mapping[ir.Node, str]) -> Iterator[list[_Chunk]]:
    """Chunks of one pattern, in any of the graphs, none in another; several at least."""
    groups: dict[Any, list[_Chunk]] = {}
    for graph in graphs:
        for path, nodes in _runs(graph, owner):
            chunk = _chunk(path, graph, nodes)
            groups.setdefault(chunk.pattern, []).append(chunk)
    for chunks in groups.values():
        taken: set[ir.Node] = set()
        free = []
        for chunk in chunks:
            if taken.isdisjoint(chunk.nodes):
                free.append(chunk)
                taken.update(chunk.nodes)
        if len(free) > 1:
            yield free


def _saved(chunks: Sequence[_Chunk]) -> int:
    """Bytes that a function would save, about."""
    if not chunks:
        return 0
    nodes, inputs = len(chunks[0].nodes), len(chunks[0].inputs)
    return (len(chunks) - 1) * NODE * nodes - len(chunks) * (CALL + INPUT * inputs) - FUNCTION


def _runs(graph: ir.Graph, owner: Mapping[ir.Node, str]) -> Iterator[tuple[str, list[ir.Node]]]:
    """Modules and steps whose nodes, and those of their children, stand in one run; modules before their steps."""
    nodes = list(graph)
    places: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for path in _with_parents(owner[node]):
            places.setdefault(path, []).append(i)
    for path, found in sorted(places.items(), key=lambda item: len(item[0])):
        if SHORTEST <= len(found) == found[-1] - found[0] + 1 < len(nodes):
            yield path, nodes[found[0] : found[-1] + 1]


def _chunk(path: str, graph: ir.Graph, nodes: list[ir.Node]) -> _Chunk:
    inside = {value: (i, k) for i, node in enumerate(nodes) for k, value in enumerate(node.outputs)}
    members = set(nodes)
    inputs: dict[ir.Value, int] = {}
    steps = []
    for node in nodes:
        references = [
            None if value is None else inside[value] if value in inside else inputs.setdefault(value, len(inputs))
            for value in node.inputs
        ]
        attributes = tuple(sorted((key, str(attribute.value)) for key, attribute in node.attributes.items()))
        steps.append((node.domain, node.op_type, attributes, tuple(references), len(node.outputs)))
    outputs = [
        value for value in inside if value.is_graph_output() or any(use.node not in members for use in value.uses())
    ]
    pattern = (tuple(steps), tuple(inside[value] for value in outputs))
    return _Chunk(path, graph, nodes, list(inputs), outputs, pattern)


def _body(chunk: _Chunk, name: str, opsets: Mapping[str, int]) -> tuple[ir.Graph, dict[ir.Node, ir.Node]]:
    """A copy of the chunk as a graph of its own, and node -> its copy."""
    new: dict[ir.Value | None, ir.Value | None] = {value: ir.Value() for value in chunk.inputs} | {None: None}
    copies: dict[ir.Node, ir.Node] = {}
    for node in chunk.nodes:
        inputs = [new[value] for value in node.inputs]
        copy = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs))
        new.update(zip(node.outputs, copy.outputs, strict=True))
        copies[node] = copy
    used = {domain: opsets[domain] for domain in {node.domain for node in chunk.nodes} if domain != DOMAIN}
    inputs, outputs = ([new[value] for value in values] for values in (chunk.inputs, chunk.outputs))
    return ir.Graph(inputs, outputs, nodes=list(copies.values()), opset_imports=used, name=name), copies


def _call(chunk: _Chunk, name: str) -> ir.Node:
    """Put a call of the function in the place of the chunk."""
    call = ir.Node(DOMAIN, name, chunk.inputs, num_outputs=len(chunk.outputs), name=chunk.path)
    chunk.graph.insert_after(chunk.nodes[-1], call)
    for old, new in zip(chunk.outputs, call.outputs, strict=True):
        new.shape, new.type = old.shape, old.type
        kept, old.name = old.name, None
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        new.name = kept
    chunk.graph.remove(chunk.nodes, safe=True)
    return call


def _names_inside(chunk: _Chunk) -> list[str]:
    """The names of the nodes without the path of the module; "" for those that have none, or another one."""
    return [_relative(node.name, chunk.path) for node in chunk.nodes]


def _relative(name: str | None, path: str) -> str:
    return name[len(path) + 1 :] if name and name.startswith(f"{path}.") else ""


def _shorten(body: ir.Graph, path: str) -> None:
    """Values of a function are named a, b, ..; its nodes as seen from the module that calls it."""
    names = identifiers()
    for value in (*body.inputs, *(value for node in body for value in node.outputs)):
        value.name = next(names)
    for node in body:
        node.name = _relative(node.name, path) or None


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without its functions; each node has the name that it had before: the path of the module that it is
    the last one of, or none.
    """
    if not model.functions:
        return model
    plain = onnx.inliner.inline_local_functions(model)
    bodies = {function.name: function.node for function in model.functions if function.domain == DOMAIN}
    for node, name in zip(plain.graph.node, _names_in(model.graph.node, bodies, ""), strict=True):
        node.name = name
    return plain


def _names_in(nodes: Iterable[onnx.NodeProto], bodies: Mapping[str, Sequence[onnx.NodeProto]], path: str) -> list[str]:
    """The names of nodes as they are inlined; the last one of a call has the call's name."""
    names: list[str] = []
    for node in nodes:
        name = f"{path}.{node.name}" if path and node.name else node.name
        names += _names_in(bodies[node.op_type], bodies, name) if node.domain == DOMAIN else [name]
        names[-1] = names[-1] or name
    return names


def _fresh(name: str, taken: set[str]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}{number}"
    taken.add(candidate)
    return candidate
