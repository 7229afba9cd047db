"""What the HTML page of a model shows, as plain data: boxes, nodes, edges, weights, source lines.

Nothing here knows of HTML; the page is put together in `page.py`.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from qgraph.errors import InspectError
from qgraph.graph import STATE
from qgraph.inspection.code import short_where
from qgraph.inspection.eager import eager_network
from qgraph.inspection.histograms import file_histograms, model_histograms, prepared_histograms
from qgraph.inspection.layers import Layer
from qgraph.inspection.tree import Box, Tree, scopes

if TYPE_CHECKING:
    import networkx

    from qgraph.inspection.summary import Inspection

__all__ = ["network_of", "view"]

VERSION = 1  # of the data's form
HIDDEN = ("number", "constant")  # roles that a page shows when asked to
_NUMBERS = frozenset({"size", "numel", "dim", "len", "shape", "check", "check_structure", "getattr", "Shape"})
_ROLES = {
    "placeholder": "input",
    "output": "output",
    "parameter": "parameter",
    "buffer": "buffer",
    "initializer": "parameter",
}


def view(inspection: Inspection) -> dict[str, Any]:
    """Everything that a page about a model shows.

    Returns
    -------
    dict
        ``boxes``: the module hierarchy, each box after the one that holds it (``parent`` is its number);
        ``nodes`` and ``edges`` (pairs of node numbers): the data flow; ``layers`` and ``floats``: the weights as in
        `Inspection.to_dict`, with ``box`` and, where it is known, ``histogram``; ``lines``: file and line -> text;
        ``code``: the rewritten graphs, which boxes name by number; ``totals``, ``coverage``, ``title``, ``kind``.
    """
    network, flow = network_of(inspection)
    roles = _roles(network, inspection.layers)
    hidden = {name for name, role in roles.items() if role in HIDDEN}
    tree = Tree(_model_name(inspection))
    _fill(tree, network, inspection)
    tree.split(hidden)
    boxes = tree.in_order()
    number = {id(box): i for i, box in enumerate(boxes)}
    box_of = {child: number[id(box)] for box in boxes for child in box.children if isinstance(child, str)}
    names = {name: i for i, name in enumerate(network)}
    rows: dict[str, list[int]] = {}
    for i, layer in enumerate(inspection.layers):
        for key in {layer.name, layer.site}:
            rows.setdefault(key, []).append(i)
    data = inspection.to_dict()
    nodes = [_node(name, network, box_of[name], rows, inspection.layers, roles[name]) for name in network]
    homes = _homes(tree, network, number, box_of)
    _attach(data, inspection, {**box_of, **homes} if inspection.kind == "onnx" else homes)  # there a weight is a node
    code, codes = _codes(inspection)
    kinds = _kinds(inspection)
    opaque = {module.path: module for module in inspection.coverage.opaque}
    return {
        "version": VERSION,
        "kind": inspection.kind,
        "title": inspection.title,
        "flow": flow,
        "totals": data["totals"],
        "coverage": data["coverage"],
        "remarks": data["remarks"],
        "file_bytes": data["file_bytes"],
        "boxes": [_box(box, number, kinds, codes, opaque) for box in boxes],
        "nodes": nodes,
        "edges": [[names[a], names[b]] for a, b in network.edges],
        "layers": data["layers"],
        "floats": data["floats"],
        "code": code,
        "lines": _lines(network, inspection),
    }


def network_of(inspection: Inspection) -> tuple[networkx.DiGraph, bool]:
    """The data flow; of a model without graphs its modules alone, and False."""
    try:
        return inspection.to_networkx(), True
    except InspectError:
        if not isinstance(inspection.source, nn.Module):
            raise
        return eager_network(inspection.source), False


def _fill(tree: Tree, network: networkx.DiGraph, inspection: Inspection) -> None:
    where = scopes(network)
    for name in network:
        tree.box(where[name]).children.append(name)
    leaves = {data["path"] for _, data in network.nodes(data=True)}
    for path in (
        *(_owner(layer) for layer in inspection.layers),
        *(f.name.rpartition(".")[0] for f in inspection.floats),
    ):
        if path not in leaves:
            tree.box(path)


def _homes(tree: Tree, network: networkx.DiGraph, number: dict[int, int], box_of: dict[str, int]) -> dict[str, int]:
    """Module path -> the number of its box, or of the box in which its one node stands."""
    found = {data["path"]: box_of[name] for name, data in reversed(list(network.nodes(data=True)))}
    return found | {scope: number[id(box)] for scope, box in tree.boxes.items()}


def _owner(layer: Layer) -> str:
    return layer.site.rpartition(".")[0]


def _attach(data: dict[str, Any], inspection: Inspection, homes: dict[str, int]) -> None:
    """Say of each weight in which box it is, and how its values are spread."""
    spread = _histograms(inspection)
    for row, layer in zip(data["layers"], inspection.layers, strict=True):
        row["box"] = homes.get(layer.site, homes.get(_owner(layer), 0))
        row["where"] = short_where(layer.where)
        found = spread.get(layer.name)
        row["histogram"] = found.to_dict() if found is not None and layer.tied_to is None else None
    for row in data["floats"]:
        row["box"] = homes.get(row["name"], homes.get(row["name"].rpartition(".")[0], 0))


def _histograms(inspection: Inspection) -> dict[str, Any]:
    source = inspection.source
    if isinstance(source, nn.Module):
        return prepared_histograms(source) if STATE in source.__dict__ else model_histograms(source)
    return file_histograms(source) if source is not None else {}


def _node(
    name: str, network: networkx.DiGraph, box: int, rows: dict[str, list[int]], layers: tuple[Layer, ...], role: str
) -> dict[str, Any]:
    data = network.nodes[name]
    site = data.get("site", name)
    found = [i for each in site.split(",") for i in rows.get(each, ())]
    if not found and data.get("quantizer") == "activation":  # its site is an input's: the weight's is beside it
        found = [i for user in network.successors(name) for i in _sites(network.nodes[user], rows)]
    here = [i for i in found if layers[i].path == data["path"]]
    shown = {
        "id": name,
        "label": _label(name, data, role),
        "role": role,
        "box": box,
        "path": data["path"],
        "op": data["op"],
        "target": str(data["target"]),
        "where": short_where(data.get("where", "")),
        "shape": list(data["shape"]) if data.get("shape") is not None and "shape" in data else None,
        "kind": data.get("kind"),
        "spec": data.get("spec"),
        "bits": data.get("bits"),
        "layers": list(dict.fromkeys(here or found)),
    }
    return {key: value for key, value in shown.items() if value not in (None, "", [])} | {
        "box": box,
        "path": data["path"],
    }


def _sites(data: dict[str, Any], rows: dict[str, list[int]]) -> Iterable[int]:
    return [i for each in data.get("site", "").split(",") for i in rows.get(each, ())]


def _roles(network: networkx.DiGraph, layers: tuple[Layer, ...]) -> dict[str, str]:
    """What each node is to a reader: input, output, parameter, weight (quantizer), site, op, number, ..."""
    numbers = _numbers(network)
    sites = {layer.site for layer in layers}
    return {
        name: "number" if name in numbers else _role(data, data["scope"] in sites)
        for name, data in network.nodes(data=True)
    }


def _role(data: dict[str, Any], unpacks: bool) -> str:
    if "quantizer" in data:
        return data["quantizer"]
    if data.get("python"):
        return "python"
    role = _ROLES.get(data["op"])
    if role is not None:
        return role if data["op"] != "initializer" or "bytes_after" in data else "constant"
    if data.get("constant") and not unpacks:
        return "constant"
    return "site" if "quantized" in data else "op"


def _label(name: str, data: dict[str, Any], role: str) -> str:
    target = str(data["target"])
    if role in ("parameter", "buffer", "constant"):
        return target.rpartition(".")[2] or target
    if "quantizer" in data:
        return target.rpartition(".")[2].replace("__", ".")
    if "kind" in data:
        parts = str(data["path"]).split(".")
        return f"{'.'.join(parts[-2:] if parts[-1].isdecimal() else parts[-1:])} {data['kind']}".strip()
    return target.rpartition("::")[2]


def _numbers(network: networkx.DiGraph) -> set[str]:
    """Sizes, checks and what is made of them alone: Python's numbers between the tensors."""
    found: set[str] = set()
    for name, data in network.nodes(data=True):
        if data["op"] not in ("call_function", "call_method", "call"):
            continue
        sources = list(network.predecessors(name))
        made_of_numbers = "shape" not in data and bool(sources) and found.issuperset(sources)
        if str(data["target"]) in _NUMBERS or made_of_numbers:
            found.add(name)
    return found


def _box(
    box: Box, number: dict[int, int], kinds: dict[str, str], codes: dict[str, int], opaque: dict[str, Any]
) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": box.name,
        "path": box.path,
        "parent": None if box.parent is None else number[id(box.parent)],
    }
    if box.group:
        modules = [child for child in box.children if isinstance(child, Box) and not child.group]
        held = {kinds.get(child.path, "") for child in modules}
        one = held.pop() if len(held) == 1 and 2 * len(modules) > len(box.children) else ""
        return {**shown, "group": True, "kind": f"{len(modules)} × {one}" if one else f"{len(box.children)} parts"}
    if kinds.get(box.path):
        shown["kind"] = kinds[box.path]
    if box.path in codes:
        shown["code"] = codes[box.path]
    if box.path in opaque:
        shown["opaque"] = opaque[box.path].reason
        shown["where"] = short_where(opaque[box.path].where)
    return shown


def _kinds(inspection: Inspection) -> dict[str, str]:
    """Path -> class of a module; of a file, what is known of its weights."""
    source = inspection.source
    if not isinstance(source, nn.Module):
        return {layer.site: layer.form or layer.spec for layer in inspection.layers}
    prefix = source.__dict__[STATE].path if STATE in source.__dict__ else ""
    return {
        ".".join(part for part in (prefix, path) if part): type(module).__name__
        for path, module in source.named_modules(remove_duplicate=False)
    }


def _codes(inspection: Inspection) -> tuple[list[str], dict[str, int]]:
    """The texts of the graphs, equal ones once, and which is whose."""
    texts: dict[str, int] = {}
    found = {path: texts.setdefault(text.partition("\n")[2], len(texts)) for path, text in inspection.graphs.items()}
    return list(texts), found


def _lines(network: networkx.DiGraph, inspection: Inspection) -> dict[str, str]:
    """File and line as the page shows them -> that line of the user's code."""
    places = {data.get("where", "") for _, data in network.nodes(data=True)}
    places |= {layer.where for layer in inspection.layers} | {module.where for module in inspection.coverage.opaque}
    found = {}
    for where in sorted(place for place in places if place):
        file, _, line = where.rpartition(":")
        text = linecache.getline(file, int(line)).strip() if line.isdecimal() else ""
        if text and short_where(where):
            found[short_where(where)] = text
    return found


def _model_name(inspection: Inspection) -> str:
    source = inspection.source
    if isinstance(source, nn.Module):
        return type(source).__name__
    return source.name if source is not None else "model"
