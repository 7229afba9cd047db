"""The network of a model as a file for other tools, by networkx's writers: GraphML, DOT, JSON of nodes and links."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraph.errors import InspectError
from qgraph.inspection.beside import written

if TYPE_CHECKING:
    import networkx

__all__ = ["write_dot", "write_graphml", "write_node_link"]

_COLORS = {1: "#e5484d", 1.58: "#f0763a", 2: "#f2a31b", 3: "#b3b324", 4: "#46a758", 8: "#5b66e8"}
_SHAPES = {"placeholder": "ellipse", "output": "ellipse", "parameter": "note", "buffer": "note", "initializer": "note"}


def write_graphml(network: networkx.DiGraph, path: Path) -> Path:
    """GraphML, for Gephi, yEd, Cytoscape and igraph; shapes are text such as ``2x16``."""
    import networkx

    return written(path, lambda beside: networkx.write_graphml(_plain(network), beside, named_key_ids=True))


def write_node_link(network: networkx.DiGraph, path: Path) -> Path:
    """JSON of nodes and links, which `networkx.node_link_graph` reads; shapes are lists."""
    import networkx

    data = networkx.node_link_data(network, edges="links")
    return written(path, lambda beside: beside.write_text(json.dumps(data, indent=1, allow_nan=False)))


def write_dot(network: networkx.DiGraph, path: Path) -> Path:
    """DOT, for Graphviz: quantizers and sites are filled with the colour of their bits.

    Raises
    ------
    InspectError
        When pydot, which writes it, is not installed.
    """
    import networkx

    if importlib.util.find_spec("pydot") is None:
        raise InspectError(
            f"{path}: DOT is written by pydot, which is not installed. Expected it; pip install 'qgraph[dot]'."
        )
    named = networkx.DiGraph()
    for name, data in network.nodes(data=True):
        named.add_node(_quoted(name), **{key: _quoted(value) for key, value in _drawn(name, data).items()})
    named.add_edges_from((_quoted(a), _quoted(b)) for a, b in network.edges)
    return written(path, lambda beside: networkx.nx_pydot.write_dot(named, beside))


def _drawn(name: str, data: dict[str, Any]) -> dict[str, str]:
    shape = "×".join(map(str, data.get("shape", ())))
    second = data.get("spec") or shape
    label = str(data.get("kind") or data["target"])
    drawn = {
        "label": f"{label}\n{second}" if second else label,
        "shape": _SHAPES.get(data["op"], "box"),
        "tooltip": name,
    }
    if data.get("bits", 32) <= 8:
        drawn |= {"style": "filled", "fillcolor": _COLORS[min(_COLORS, key=lambda bits: abs(bits - data["bits"]))]}
    return drawn


def _quoted(text: str) -> str:
    """A string of DOT; its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _plain(network: networkx.DiGraph) -> networkx.DiGraph:
    """The same graph with attributes that are text, numbers and truth values."""
    import networkx

    plain = networkx.DiGraph()
    for name, data in network.nodes(data=True):
        values = {key: "x".join(map(str, value)) if isinstance(value, tuple) else value for key, value in data.items()}
        if "bits" in values:
            values["bits"] = float(values["bits"])
        plain.add_node(name, **{key: value for key, value in values.items() if value is not None})
    plain.add_edges_from(network.edges)
    return plain
