"""The whole model as one networkx DiGraph: the eval graphs of all modules, spliced into one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx, nn

from qgraph.errors import InspectError
from qgraph.graph import STATE, find_sites, function_name, states

if TYPE_CHECKING:
    import networkx

_Value = Any  # the id of a network node, or a tuple, list, dict, ... of them as a module returns it


def model_network(model: nn.Module) -> networkx.DiGraph:
    """Operations as nodes, data flow as edges; a call of a captured child is the child's own operations.

    Node attributes: ``path`` (of the module), ``op`` (of torch.fx), ``target``, ``where`` (file and line),
    ``shape``, ``site`` and ``spec`` (of a quantizer), ``kind`` (class of a called module). A parameter is one
    node, tied ones included. A module that stays Python is one node, with its captured children behind it.
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
        builder.opaque(root.path, model, "", type(model).__name__, [])
    else:
        builder.module(model, variant, None, root.path)
    return network


class _Builder:
    """Adds one module call after another; `calls` counts the calls of each module."""

    def __init__(self, network: networkx.DiGraph, model: nn.Module) -> None:
        self.network = network
        self.shared = model.__dict__[STATE].shared
        self.calls: dict[str, int] = {}

    def module(self, module: nn.Module, variant: Any, arguments: dict[str, _Value] | None, path: str) -> _Value:
        """Splice one call of a captured module; returns the value of its output."""
        number = self.calls[path] = self.calls.get(path, 0) + 1
        prefix = f"{path}:" if number == 1 else f"{path}#{number}:"
        owner = module.__dict__[STATE].owner(module)
        specs = _site_specs(variant.graph, owner)
        values: dict[fx.Node, _Value] = {}
        result: _Value = None
        for node in variant.graph.nodes:
            if node.op == "placeholder" and arguments is not None:
                values[node] = arguments.get(str(node.target))
            elif node.op == "output":
                result = fx.node.map_arg(node.args[0], values.__getitem__)
                if arguments is None:
                    self._add(f"{prefix}{node.name}", path, node, "output", result)
            elif node.op == "get_attr":
                values[node] = self._attribute(path, node)
            elif node.op == "call_module" and not str(node.target).startswith("qgraph."):
                values[node] = self._call(module, node, values, prefix)
            else:
                values[node] = self._operation(prefix, path, node, values, specs)
        return result

    def opaque(self, path: str, module: nn.Module, target: str, kind: str, sources: list[str]) -> str:
        """One node for a module that stays Python, and its captured descendants after it."""
        number = self.calls[path] = self.calls.get(path, 0) + 1
        name = f"{path}:" if number == 1 else f"{path}#{number}:"
        name = _Id(name)
        self.network.add_node(name, path=path, op="call_module", target=target, kind=kind, where="", python=True)
        self._connect(sources, name)
        if number == 1:
            for child_path, child in _captured_below(path, module):
                self.module(child, _variant(child.__dict__[STATE]), _Everything(name), child_path)
        return name

    def _call(self, module: nn.Module, node: fx.Node, values: dict[fx.Node, _Value], prefix: str) -> _Value:
        target = str(node.target)
        child = module.get_submodule(target)
        owner = module.__dict__[STATE].path
        path = f"{owner}.{target}".lstrip(".")
        state = child.__dict__.get(STATE)
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        if state is None:
            return self._add(f"{prefix}{node.name}", path, node, target, (args, kwargs), kind=type(child).__name__)
        variant = _variant(state, state.names(args, kwargs))
        if variant is None:
            return self.opaque(state.path, child, target, type(child).__name__, _ids((args, kwargs)))
        ordered = (*args, *(kwargs[name] for name in sorted(kwargs)))
        placeholders = [str(n.target) for n in variant.graph.nodes if n.op == "placeholder"]
        return self.module(child, variant, dict(zip(placeholders, ordered, strict=False)), state.path)

    def _operation(
        self, prefix: str, path: str, node: fx.Node, values: dict[fx.Node, _Value], specs: dict[fx.Node, str]
    ) -> _Value:
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        if function_name(node) == "getitem" and isinstance(args[0], (tuple, list, dict)):
            try:
                return args[0][args[1]]  # type: ignore[index]
            except (LookupError, TypeError):
                pass
        extra = dict(node.meta.get("qgraph", {}))
        if node in specs:
            extra["site"] = specs[node]
        target = function_name(node) or str(node.target)
        return self._add(f"{prefix}{node.name}", path, node, target, (args, kwargs), **extra)

    def _attribute(self, path: str, node: fx.Node) -> str:
        name = _Id(self.shared.canonical_name(path, str(node.target)))
        if name not in self.network:
            op = "parameter" if node.meta.get("parameter") else "buffer"
            shape = tuple(node.meta.get("shape", ()))
            self.network.add_node(name, path=path, op=op, target=name, where="", shape=shape)
        return name

    def _add(self, name: str, path: str, node: fx.Node, target: str, inputs: _Value, **extra: Any) -> _Id:
        attributes = {"path": path, "op": node.op, "target": target, "where": node.meta.get("where", "")}
        if "shape" in node.meta:
            attributes["shape"] = tuple(node.meta["shape"])
        made = _Id(name)
        self.network.add_node(made, **attributes, **extra)
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
