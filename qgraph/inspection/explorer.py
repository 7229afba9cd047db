"""`explore`: a model or a file in Google's Model Explorer, with what qgraph knows of each node."""

from __future__ import annotations

import json
import linecache
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qgraph.errors import InspectError
from qgraph.inspection.beside import written
from qgraph.inspection.code import short_where
from qgraph.inspection.summary import Inspection, inspect
from qgraph.inspection.tree import scopes
from qgraph.inspection.view import network_of

if TYPE_CHECKING:
    import networkx

__all__ = ["explore", "explorer_graphs"]

_COLORS = {1: "#f7b5b7", 1.58: "#fac9ae", 2: "#fbdca3", 3: "#e5e5a6", 4: "#b8dfbf", 8: "#c0c4f8"}
_ATTRIBUTES = ("kind", "site", "spec", "bits", "quantized", "reason", "quantizer", "bytes_before", "bytes_after")


def explore(
    model_or_path: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    open: bool = True,
    **options: Any,
) -> Path:
    """Open a model in Google's Model Explorer: layers as its namespaces, spec, bits, error and bytes at each node.

    Model Explorer is a package of its own, ``pip install 'qgraph[explorer]'``. Its server runs in this process until
    it is interrupted.

    Parameters
    ----------
    model_or_path : nn.Module, str or Path
        What `inspect` takes.
    path : str or Path, optional
        Where to write the graph as JSON, which Model Explorer opens too; else a temporary file.
    open : bool
        False: write the file alone; Model Explorer need not be installed.
    **options
        For ``model_explorer.visualize``, such as ``port=8081``.

    Returns
    -------
    Path
        Of the JSON.

    Raises
    ------
    InspectError
        When Model Explorer is to be opened and is not installed.

    Examples
    --------
    >>> qgraph.explore(prepared)
    """
    if open:
        try:
            import model_explorer
        except ImportError as error:
            raise InspectError(
                f"explore: Model Explorer is not installed ({error}). Expected it; pip install 'qgraph[explorer]', or "
                f"pass open=False and a path to write its JSON."
            ) from error
    found = inspect(model_or_path)
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="qgraph-")) / f"{_name(found)}.json"
    text = json.dumps(explorer_graphs(found), allow_nan=False)
    file = written(Path(path), lambda beside: beside.write_text(text))
    if open:
        model_explorer.visualize(str(file), **options)
    return file


def explorer_graphs(inspection: Inspection) -> dict[str, Any]:
    """A model as a GraphCollection of Model Explorer, plain data."""
    network, _ = network_of(inspection)
    spaces = {name: _namespace(scope) for name, scope in scopes(network).items()}
    graph = {
        "id": _name(inspection),
        "nodes": [_node(name, network, spaces[name]) for name in network],
        "groupNodeAttributes": _groups(network, spaces, inspection),
        "layoutConfigs": {"keepLayersWithASingleChild": True},
    }
    return {"label": "qgraph", "graphs": [graph]}


def _node(name: str, network: networkx.DiGraph, namespace: str) -> dict[str, Any]:
    data = network.nodes[name]
    shape = data.get("shape")
    made: dict[str, Any] = {
        "id": name,
        "label": _label(data),
        "namespace": namespace,
        "attrs": [{"key": key, "value": value} for key, value in _attributes(data).items()],
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
            for i, source in enumerate(network.predecessors(name))
        ],
    }
    if shape is not None:
        text = "×".join(map(str, shape)) or "scalar"
        made["outputsMetadata"] = [{"id": "0", "attrs": [{"key": "shape", "value": text}]}]
    if data.get("bits", 32) <= 8:
        nearest = min(_COLORS, key=lambda bits: abs(bits - data["bits"]))
        made["style"] = {"backgroundColor": _COLORS[nearest]}
    return made


def _attributes(data: dict[str, Any]) -> dict[str, str]:
    found = {key: str(data[key]) for key in _ATTRIBUTES if data.get(key) is not None}
    if "error_db" in data:
        found["error"] = f"{data['error_db']:.1f} dB"
    place = short_where(data.get("where", ""))
    if place:
        found["where"] = place
        file, _, line = data["where"].rpartition(":")
        text = linecache.getline(file, int(line)).strip() if line.isdecimal() else ""
        if text:
            found["source"] = text
    return found


def _label(data: dict[str, Any]) -> str:
    target = str(data["target"])
    if "quantizer" in data:
        kind = "prune" if data["quantizer"] == "sparsity" else "quantize"
        return f"{kind} {target.rpartition('.')[2].replace('__', '.')}"
    if data["op"] in ("parameter", "buffer", "initializer"):
        return target.rpartition(".")[2] or target
    return str(data.get("kind") or target.rpartition("::")[2])


def _groups(network: networkx.DiGraph, spaces: dict[str, str], inspection: Inspection) -> dict[str, dict[str, str]]:
    """What each namespace takes before and after; the empty one is the whole model."""
    sums: dict[str, Counter[str]] = {}
    for name, data in network.nodes(data=True):
        parts = spaces[name].split("/") if spaces[name] else []
        for depth in range(len(parts) + 1):
            own = sums.setdefault("/".join(parts[:depth]), Counter())
            own["before"] += data.get("bytes_before", 0)
            own["after"] += data.get("bytes_after", 0)
    groups = {
        space: {"bytes before": f"{own['before']:,}", "bytes after": f"{own['after']:,}"}
        for space, own in sums.items()
        if own["before"] or own["after"]
    }
    totals = inspection.totals
    whole = {"model": inspection.title, "layers quantized": f"{totals.layers_quantized} of {totals.layers}"}
    return {**groups, "": {**whole, **groups.get("", {})}}


def _namespace(scope: str) -> str:
    """``encoder/0`` of ``encoder.0``; a slash in a name is another character here."""
    return scope.replace("/", "∕").replace(".", "/")


def _name(inspection: Inspection) -> str:
    source = inspection.source
    return type(source).__name__ if isinstance(source, nn.Module) else Path(str(source)).stem
