"""Captured graphs as plain data and back, so that a prepared model pickles and deep-copies."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import fx

from qgraph.capture.calls import Apply, Constant, Global, Rebuild, Setter

_NAMESPACES = (
    "torch",
    "torch.nn.functional",
    "torch._C._nn",
    "torch._VF",
    "torch._C",
    "operator",
    "builtins",
    "math",
)
_WRAPPERS: dict[str, Any] = {"apply": Apply, "rebuild": Rebuild, "constant": Constant, "global": Global}
RESERVED = ("self", "device", "torch", "inf", "nan", "NoneType")
_META = ("where", "source", "parameter", "shape", "dtype", "memory", "holds_parameters", "qgraph")


def new_graph() -> fx.Graph:
    """An empty graph whose nodes leave the names alone that generated code uses itself."""
    graph = fx.Graph()
    for name in RESERVED:
        graph._graph_namespace.create_name(name, None)
    return graph


def dump_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """A graph as a list of plain node records, in order."""
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _dump_target(node.target),
            "args": fx.node.map_arg(node.args, _reference),
            "kwargs": dict(fx.node.map_arg(node.kwargs, _reference)),
            "meta": {key: node.meta[key] for key in _META if key in node.meta},
        }
        for node in graph.nodes
    ]


def load_graph(records: list[dict[str, Any]]) -> fx.Graph:
    """The graph of `dump_graph`."""
    graph = new_graph()
    nodes: dict[str, fx.Node] = {}
    for record in records:
        node = graph.create_node(
            record["op"],
            _load_target(record["target"]),
            _resolve(record["args"], nodes),
            _resolve(record["kwargs"], nodes),
            name=record["name"],
        )
        node.meta.update(record["meta"])
        nodes[record["name"]] = node
    return graph


class _NodeName(str):
    """A node's name standing for the node."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _NodeName:
        return self


def _reference(node: fx.Node) -> Any:
    return _NodeName(node.name)


def _resolve(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, _NodeName):
        return nodes[value]
    if isinstance(value, slice):
        return slice(_resolve(value.start, nodes), _resolve(value.stop, nodes), _resolve(value.step, nodes))
    if isinstance(value, tuple):
        return tuple(_resolve(v, nodes) for v in value)
    if isinstance(value, list):
        return [_resolve(v, nodes) for v in value]
    if isinstance(value, dict):
        return {k: _resolve(v, nodes) for k, v in value.items()}
    return value


def _dump_target(target: Any) -> Any:
    """Builtins of torch do not pickle by themselves: name the namespace where they are found."""
    if isinstance(target, str):
        return target
    if isinstance(target, Setter):
        return ("set", target.name)
    if isinstance(target, Apply):
        return ("apply", target.function)
    if isinstance(target, Rebuild):
        return ("rebuild", target.kind)
    if isinstance(target, Constant):
        return ("constant", target.value)
    if isinstance(target, Global):
        return ("global", target.place)
    if isinstance(target, torch._ops.OpOverload):
        return ("op", target._name, target._overloadname)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return ("op", target._qualified_op_name, None)
    name = getattr(target, "__name__", "")
    for namespace in _NAMESPACES:
        if getattr(importlib.import_module(namespace), name, None) is target:
            return ("function", namespace, name)
    return ("object", target)


def _load_target(target: Any) -> Any:
    if isinstance(target, str):
        return target
    kind = target[0]
    if kind == "set":
        return Setter(target[1])
    if kind in _WRAPPERS:
        return _WRAPPERS[kind](target[1])
    if kind == "op":
        namespace, name = target[1].split("::")
        packet = getattr(getattr(torch.ops, namespace), name.split(".")[0])
        return packet if target[2] is None else getattr(packet, target[2])
    if kind == "function":
        return getattr(importlib.import_module(target[1]), target[2])
    return target[1]
