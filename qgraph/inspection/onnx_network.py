"""An .onnx file as one networkx DiGraph, with its functions inlined and its nodes under the modules they came from."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraph.exporters.merge import separate
from qgraph.exporters.outline import inlined
from qgraph.exporters.report import PARTS, stacked_sites
from qgraph.inspection.layers import Layer
from qgraph.inspection.onnx_file import load

if TYPE_CHECKING:
    import networkx
    import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"  # what torch's exporter notes of the modules around a node


def onnx_network(path: Path, layers: Iterable[Layer] = ()) -> networkx.DiGraph:
    """Nodes, inputs, outputs and initializers of a file; edges are values.

    A node that is ``constant`` does not depend on the inputs: a runtime computes it when it loads the file.
    `path` and `scope` of a node are what its name or the exporter's notes say; else those of the weights that it
    reads, and where it reads none, the module that holds both the nodes before and after.

    Parameters
    ----------
    path : Path
    layers : iterable of Layer
        Weights of the file, whose codes and scales are initializers of the same name; of one that is cut out of a stack
        its name stands for what is cut out.
    """
    import networkx

    model = load(path)
    separate(model)
    stacked = stacked_sites(model)
    model = inlined(model)
    network = networkx.DiGraph()
    made: dict[str, str] = {}
    layers = list(layers)
    owners = {layer.site: layer.path for layer in layers}
    tied = {layer.site for layer in layers if ", " in layer.op}  # of several layers, and the file names the first
    homes: dict[str, str | None] = {}
    waiting = {tensor.name: tensor for tensor in model.graph.initializer}
    wholes: dict[str, str | None] = {}  # value -> the stack of weights that it is made of

    def add_initializer(name: str) -> None:
        tensor, made[name] = waiting.pop(name), name
        site, holder = _site_of(name, owners), name.rpartition(".")[0]
        stack = holder if holder in stacked else None
        homes[name] = (site if site != name else None) or (holder if stack is None else None) or None
        wholes[name] = stack
        data = {"op": "initializer", "target": name, "where": "", "shape": tuple(tensor.dims)}
        network.add_node(name, **data, **({"site": site} if site else {}))

    for value in model.graph.input:
        if value.name not in waiting:
            made[value.name] = value.name
            network.add_node(value.name, op="placeholder", target=value.name, where="", shape=_shape(value))
    order = []
    for i, node in enumerate(model.graph.node):
        for each in _reads(node):
            if each in waiting:
                add_initializer(each)
        name = node.name or f"{node.op_type}_{i}"
        name = f"{name}#{i}" if name in network else name
        target = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        network.add_node(name, op="call", target=target, where="")
        network.add_edges_from((made[each], name) for each in _reads(node) if each in made)
        made.update(dict.fromkeys(node.output, name))
        order.append((name, node))
        whole = next((wholes[each] for each in node.input if wholes.get(each)), None)
        if whole is None or node.op_type != "Split":
            wholes.update(dict.fromkeys(node.output, whole))
            continue
        for value, site in zip(node.output, stacked[whole], strict=True):
            network.add_node(site, op="initializer", target=site, where="", site=site)
            network.add_edge(name, site)
            made[value], homes[site] = site, site
    for each in list(waiting):
        add_initializer(each)
    for value in model.graph.output:
        name = f"output:{value.name}"
        network.add_node(name, op="output", target=value.name, where="", shape=_shape(value))
        if value.name in made:
            network.add_edge(made[value.name], name)
    _place(network, order, homes, owners, tied)
    return network


def _place(
    network: networkx.DiGraph,
    order: list[Any],
    homes: dict[str, str | None],
    owners: dict[str, str],
    tied: set[str],
) -> None:
    """Set `path` and `scope`: a weight and the nodes that unpack it go under the weight, the others under a module."""
    data = {n for n, d in network.nodes(data=True) if d["op"] == "placeholder"}
    weights = {n: d["site"] for n, d in network.nodes(data=True) if "site" in d}  # what holds one, or is made of one
    found: list[str | None] = []
    for name, node in order:
        sources = list(network.predecessors(name))
        weight = next((weights[source] for source in sources if source in weights), None)
        inherited = {home for home in (homes.get(source) for source in sources) if home is not None}
        home = _named(node)
        if home is None and inherited:
            home = max(sorted(inherited), key=lambda each: (each in owners, each.count(".")))
        if data.intersection(sources):
            data.add(name)
            home = owners.get(home, home) if home is not None else None
            if weight is not None:
                network.nodes[name]["site"] = weight
                if weight in tied and node.op_type != "Gather":
                    home = None
        else:
            homes[name] = home
            network.nodes[name]["constant"] = True
            if weight is not None:
                weights[name] = weight
        found.append(home)
    paths = dict(zip((name for name, _ in order), _filled(found), strict=True))
    for name, attributes in network.nodes(data=True):
        scope = paths.get(name)
        if scope is None:
            scope = homes.get(name)
        if scope is None and attributes["op"] == "initializer":  # a constant: beside those that use it
            scope = _common(paths.get(user, "") for user in network.successors(name))
        scope = scope or ""
        attributes |= {"path": owners.get(scope, scope), "scope": scope}


def _filled(homes: list[str | None]) -> list[str]:
    """Where nothing says the module, the one around the nodes before and after."""
    after: list[str] = []
    for home in reversed(homes):
        after.append(home if home is not None else (after[-1] if after else ""))
    filled, before = [], ""
    for home, following in zip(homes, reversed(after), strict=True):
        before = home if home is not None else _common((before, following))
        filled.append(before)
    return filled


def _common(paths: Iterable[str]) -> str:
    parts = [path.split(".") for path in paths]
    if not parts:
        return ""
    pairs = zip(*parts, strict=False)
    return ".".join(each[0] for each in itertools.takewhile(lambda each: len(set(each)) == 1, pairs))


def _named(node: onnx.NodeProto) -> str | None:
    """The module that a node's name or its exporter's notes tell: ``/layer1/conv/Conv``, ``layer1.conv/Conv``."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            try:
                scopes = [scope for scope in ast.literal_eval(entry.value)[:-1] if scope]
            except (SyntaxError, ValueError):
                continue
            return scopes[-1] if scopes else ""
    stem, slash, _ = node.name.rpartition("/")
    return stem.strip("/").replace("/", ".") if slash else None


def _site_of(name: str, owners: dict[str, str]) -> str | None:
    if name in owners:
        return name
    stem, _, part = name.rpartition(".")
    return stem if stem in owners and part in PARTS else None


def _reads(node: onnx.NodeProto) -> list[str]:
    """What a node takes, the bodies of loops and branches included."""
    inside = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return [*node.input, *(value for graph in inside for inner in graph.node for value in _reads(inner))]


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
