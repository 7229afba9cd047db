"""The whole model as one networkx DiGraph: the eval graphs of all modules, spliced into one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from qgraph.errors import InspectError
from qgraph.graph import STATE, find_sites, function_name, is_quantizer, states
from qgraph.modules import ActivationQuantizer, Sparsifier, WeightQuantizer

if TYPE_CHECKING:
    import networkx

_Value = Any  # the id of a network node, or a tuple, list, dict, ... of them as a module returns it


def model_network(model: nn.Module) -> networkx.DiGraph:
    """Operations as nodes, data flow as edges; a call of a captured child is the child's own operations.

    Node attributes: ``path`` (of the module), ``scope`` (the same for one call: ``fc#2`` is the second), ``op`` (of
    torch.fx), ``target``, ``where`` (file and line), ``shape``, ``site``, ``kind`` (class of a called module), and of
    a quantizer ``quantizer`` (weight, activation or sparsity), ``spec`` and ``bits``. A parameter is one node, tied
    ones included. A module that stays Python is one node, with its captured children behind it.
    """
    import networkx

    if not any(state.variants for _, _, state in states(model)):
        raise InspectError(
            f"{type(model).__name__}: found no captured graph. Expected a prepared model that ran once; "
            f"prepare it with example_inputs, or run it."
        )
    network = networkx.DiGraph()
    root = model.__dict__[STATE]
    builder = _Builder(network, model)
    variant = _variant(root)
    if variant is None:
        builder.opaque(root.path, model, "", type(model).__name__, [], root.path)
    else:
        builder.module(model, variant, None, root.path, root.path)
    return network


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a captured module: what the names of its nodes begin with, its path, and which call it is."""

    module: nn.Module
    prefix: str
    path: str
    scope: str
    specs: dict[fx.Node, str]

    def below(self, target: str) -> str:
        return f"{self.scope}.{target}".lstrip(".")


class _Builder:
    """Adds one module call after another; `calls` counts the calls of each module, `scopes` those of each scope."""

    def __init__(self, network: networkx.DiGraph, model: nn.Module) -> None:
        self.network = network
        self.shared = model.__dict__[STATE].shared
        self.calls: dict[str, int] = {}
        self.scopes: dict[str, int] = {}

    def module(
        self, module: nn.Module, variant: Any, arguments: dict[str, _Value] | None, path: str, scope: str
    ) -> _Value:
        """Splice one call of a captured module; returns the value of its output."""
        owner = module.__dict__[STATE].owner(module)
        specs = _site_specs(variant.graph, owner)
        call = _Call(module, _numbered(self.calls, path) + ":", path, _numbered(self.scopes, scope), specs)
        values: dict[fx.Node, _Value] = {}
        result: _Value = None
        for node in variant.graph.nodes:
            if node.op == "placeholder" and arguments is not None:
                values[node] = arguments.get(str(node.target))
            elif node.op == "output":
                result = fx.node.map_arg(node.args[0], values.__getitem__)
                if arguments is None:
                    self._add(call, node, "output", result)
            elif node.op == "get_attr":
                values[node] = self._attribute(call, node)
            elif node.op == "call_module" and not is_quantizer(node):
                values[node] = self._call(call, node, values)
            else:
                values[node] = self._operation(call, node, values)
        return result

    def opaque(self, path: str, module: nn.Module, target: str, kind: str, sources: list[str], scope: str) -> str:
        """One node for a module that stays Python, and its captured descendants after it."""
        name = _Id(_numbered(self.calls, path) + ":")
        scope = _numbered(self.scopes, scope)
        data = {"path": path, "scope": scope, "op": "call_module", "target": target, "kind": kind, "where": ""}
        self.network.add_node(name, **data, python=True)
        self._connect(sources, name)
        if self.calls[path] == 1:
            for relative, child in _captured_below("", module):
                below = f"{path}.{relative}".lstrip(".")
                variant = _variant(child.__dict__[STATE])
                self.module(child, variant, _Everything(name), below, f"{scope}.{relative}".lstrip("."))
        return name

    def _call(self, call: _Call, node: fx.Node, values: dict[fx.Node, _Value]) -> _Value:
        target = str(node.target)
        child = call.module.get_submodule(target)
        path = f"{call.path}.{target}".lstrip(".")
        state = child.__dict__.get(STATE)
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        if state is None:
            return self._add(call, node, target, (args, kwargs), path=path, kind=type(child).__name__)
        variant = _variant(state, state.names(args, kwargs))
        if variant is None:
            kind = type(child).__name__
            return self.opaque(state.path, child, target, kind, _ids((args, kwargs)), call.below(target))
        ordered = (*args, *(kwargs[name] for name in sorted(kwargs)))
        placeholders = [str(n.target) for n in variant.graph.nodes if n.op == "placeholder"]
        arguments = dict(zip(placeholders, ordered, strict=False))
        return self.module(child, variant, arguments, state.path, call.below(target))

    def _operation(self, call: _Call, node: fx.Node, values: dict[fx.Node, _Value]) -> _Value:
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        if function_name(node) == "getitem" and isinstance(args[0], (tuple, list, dict)):
            try:
                return args[0][args[1]]  # type: ignore[index]
            except (LookupError, TypeError):
                pass
        extra = dict(node.meta.get("qgraph", {}))
        if node in call.specs:
            extra["site"] = call.specs[node]
        if is_quantizer(node):
            extra |= _quantizer(call.module.get_submodule(str(node.target)))
        target = function_name(node) or str(node.target)
        return self._add(call, node, target, (args, kwargs), **extra)

    def _attribute(self, call: _Call, node: fx.Node) -> str:
        name = _Id(self.shared.canonical_name(call.path, str(node.target)))
        if name not in self.network:
            op = "parameter" if node.meta.get("parameter") else "buffer"
            shape = tuple(node.meta.get("shape", ()))
            data = {"path": call.path, "scope": call.scope, "op": op, "target": str(name), "where": ""}
            self.network.add_node(name, **data, shape=shape)
        return name

    def _add(self, call: _Call, node: fx.Node, target: str, inputs: _Value, **extra: Any) -> _Id:
        attributes: dict[str, Any] = {"path": call.path, "scope": call.scope, "op": node.op, "target": target}
        attributes["where"] = node.meta.get("where", "")
        if "shape" in node.meta:
            attributes["shape"] = tuple(node.meta["shape"])
        made = _Id(f"{call.prefix}{node.name}")
        self.network.add_node(made, **{**attributes, **extra})
        self._connect(_ids(inputs), made)
        return made

    def _connect(self, sources: list[str], name: str) -> None:
        self.network.add_edges_from((source, name) for source in sources)


class _Everything(dict[str, _Value]):
    """Arguments that all come from one node: what Python passes on is not known."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    def get(self, key: str, default: Any = None) -> Any:
        return self.source


def _variant(state: Any, names: tuple[str, ...] | None = None) -> Any:
    """The graph that stands for a module: in eval, of the same arguments, as far as there is one."""
    ranked = sorted(state.variants, key=lambda v: (v.training, names is not None and tuple(v.names) != names))
    return ranked[0] if ranked else None


def _numbered(counts: dict[str, int], name: str) -> str:
    """``fc``, then ``fc#2``, ``fc#3``, ..."""
    counts[name] = counts.get(name, 0) + 1
    return name if counts[name] == 1 else f"{name}#{counts[name]}"


def _quantizer(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, Sparsifier):
        return {"quantizer": "sparsity"}
    if isinstance(module, (WeightQuantizer, ActivationQuantizer)):
        kind = "weight" if isinstance(module, WeightQuantizer) else "activation"
        return {"quantizer": kind, "bits": module.spec.bits}
    return {}


def _captured_below(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    found = []
    for name, child in module.named_children():
        below = f"{path}.{name}".lstrip(".")
        state = child.__dict__.get(STATE)
        if state is not None and state.variants:
            found.append((below, child))
        else:
            found += _captured_below(below, child)
    return found


def _site_specs(graph: fx.Graph, owner: Any) -> dict[fx.Node, str]:
    return {site.node: ",".join(p.site for p in site.site.weights) for site in find_sites(graph, owner)}


def _ids(value: Any) -> list[str]:
    """The network nodes in a value, in order, each once."""
    found: dict[str, None] = {}

    def visit(item: Any) -> None:
        if isinstance(item, _Id):
            found[item] = None
        elif isinstance(item, dict):
            for each in item.values():
                visit(each)
        elif isinstance(item, (tuple, list)):
            for each in item:
                visit(each)
        elif isinstance(item, slice):
            visit((item.start, item.stop, item.step))

    visit(value)
    return list(found)


class _Id(str):
    """The name of a network node, told apart from the strings that a call takes."""
