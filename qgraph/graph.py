"""What we add to torch.fx: the sites of a graph, the shared state of a prepared model, and views on both."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.optim.swa_utils import AveragedModel

from qgraph.config import QConfig, QuantSpec, SparsitySpec
from qgraph.errors import CaptureError
from qgraph.modules import ActivationQuantizer, Quantizers, Sparsifier, WeightQuantizer
from qgraph.ops import Groups
from qgraph.placement import Owner, Site, place
from qgraph.sites import CONSTANT, DATA, SiteCall, Source, after_write, combine, site_call, swaps_last_two, written

if TYPE_CHECKING:
    from qgraph.capture.state import ModuleState

STATE = "_qgraph"  # the attribute of a prepared module that holds its ModuleState
OWN_FORWARD = "_qgraph_forward"  # that of one whose `forward` was set on the object: what was set


@dataclass(slots=True, eq=False)
class Shared:
    """What all modules of one prepared model share.

    ``quantizers``: by site name, so that tied weights share one. ``canonical``: for each second name of a tied
    parameter, its first. ``pipeline``: what every captured graph is rewritten by.
    """

    config: QConfig
    pipeline: Any
    canonical: dict[str, str] = field(default_factory=dict)
    configs: dict[str, QConfig | None] = field(default_factory=dict)  # by module path, rules applied
    quantizers: dict[str, nn.Module] = field(default_factory=dict)
    strict: bool = False
    model_name: str = ""
    notes: list[Any] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by pass, over all graphs
    dump: Any = None  # the Dump that graphs are written to, if any
    varying: tuple[str, ...] = ()  # paths of modules that have returned a tensor and something else
    settings: dict[str, Any] = field(default_factory=dict)  # what schedules set now, also of quantizers made later
    off: list[str | None] = field(default_factory=list)  # globs of the sites that `disabled` holds off now; None: all
    install: Callable[[nn.Module, str, Shared], None] | None = None  # captures a module that a forward makes later

    def is_off(self, site: str) -> bool:
        """Whether a quantizer made now for this site starts switched off."""
        return any(match is None or matches_site(site, match) for match in self.off)

    def canonical_name(self, module_path: str, relative: str) -> str:
        name = f"{module_path}.{relative}" if module_path else relative
        return self.canonical.get(name, name)


def matches_site(site: str, match: str) -> bool:
    """Whether a glob names a site, or a module that holds it."""
    parts = site.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), match) for i in range(len(parts)))


# -- the sites of one graph --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GraphSite:
    """A site of a captured graph: its node, its operands, and the node of each."""

    node: fx.Node
    site: Site

    def operand_node(self, placed: Any) -> Any:
        return placed.operand.get(self.node.args, self.node.kwargs)


def function_name(node: fx.Node) -> str:
    """The bare name of what a node calls: ``linear``, ``matmul``, ..., or ``""``."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if node.target is getattr:
        return str(node.args[1])
    name = str(getattr(node.target, "__name__", type(node.target).__name__))
    return name.partition(".")[0] if isinstance(node.target, torch._ops.OpOverload) else name


def find_sites(graph: fx.Graph, owner: Owner) -> Iterator[GraphSite]:
    """The sites of a graph in order, with the same operand names as `capture.operands` gives to running Python."""
    sources: dict[fx.Node, Source] = {}
    numbers: set[fx.Node] = set()
    ordinals: dict[str, list[fx.Node]] = {}

    def ordinal(operands: list[fx.Node], key: str, i: int) -> int:
        met, node = ordinals.setdefault(key, []), operands[i]
        if node not in met:
            met.append(node)
        return met.index(node)

    for node in graph.nodes:
        if _is_number(node, numbers):
            numbers.add(node)
        sources[node] = node_source(node, sources, numbers, owner)
        for target in nodes_written(node):
            for other in sources:
                if other is target or over_same_memory(other, target):
                    sources[other] = after_write(sources[other], sources[node])
        name = function_name(node)
        known = getattr(node.target, "site", None)  # of an autograd Function, found when it was recorded
        call = known if isinstance(known, SiteCall) else site_call(name, node.args, node.kwargs, rank)
        if call is None:
            continue
        operands = [unquantized(operand.get(node.args, node.kwargs)) for operand in call.operands]
        found = [
            sources.get(o, CONSTANT).of(o.meta.get("dtype")) if isinstance(o, fx.Node) else CONSTANT for o in operands
        ]
        site = place(call, found, owner, functools.partial(ordinal, operands))
        if site is not None:
            yield GraphSite(node, site)


def nodes_written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors a node writes into."""
    target = written(function_name(node), node.args, node.kwargs)
    return [n for n in (target if isinstance(target, (tuple, list)) else [target]) if isinstance(n, fx.Node)]


def over_same_memory(a: fx.Node, b: fx.Node) -> bool:
    """Whether the tensors of two nodes shared their memory when the graph was recorded."""
    return a.meta.get("memory", a) == b.meta.get("memory", b)


def node_source(node: fx.Node, sources: dict[fx.Node, Source], numbers: set[fx.Node], owner: Owner) -> Source:
    """What a node derives from, given the sources of the nodes before it, and which of them are numbers."""
    if node.op == "placeholder":
        if node.meta.get("parameter"):
            return Source("parameter", (f"{owner.path}.{node.target}".lstrip("."),))
        return DATA
    if node.op == "get_attr":
        if not node.meta.get("parameter"):
            return CONSTANT
        return Source("parameter", (owner.shared.canonical_name(owner.path, str(node.target)),), exact=True)
    if is_quantizer(node):
        return sources.get(node.args[0], CONSTANT) if isinstance(node.args[0], fx.Node) else CONSTANT
    inputs = [sources[n] for n in node.all_input_nodes if n not in numbers]
    if node.op == "call_module":
        if inputs:
            return DATA
        made_of_parameters = node.meta.get("holds_parameters")
        return Source("parameter", (f"{owner.path}.{node.target}".lstrip("."),)) if made_of_parameters else CONSTANT
    name = function_name(node)
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and first in nodes_written(node) and sources[first].exact:  # a parameter stays itself
        return sources[first]
    swapped = isinstance(first, fx.Node) and swaps_last_two(name, node.args, rank(first))
    return combine(name, inputs, swapped)


def rank(value: Any) -> int:
    """The number of dimensions that a node's value had when it was recorded."""
    return len(value.meta.get("shape", ())) if isinstance(value, fx.Node) else 0


def is_quantizer(node: fx.Node) -> bool:
    """Whether a node calls one of our own modules."""
    return node.op == "call_module" and str(node.target).split(".")[0] == "qgraph"


def without_quantizers(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that calls none of our own modules: what it computes while they are all switched off."""
    copied, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        nodes[node] = nodes[node.args[0]] if is_quantizer(node) else copied.node_copy(node, nodes.__getitem__)
    return copied


def unquantized(value: Any) -> Any:
    """The node behind the quantizers and sparsifiers that passes have put before an operand."""
    while isinstance(value, fx.Node) and is_quantizer(value):
        value = value.args[0]
    return value


def _is_number(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Sizes, flags and what is made of them alone say nothing of what a tensor derives from."""
    if function_name(node) in _SIZES:
        return True
    inputs = node.all_input_nodes
    tensor = node.op == "placeholder" or "dtype" in node.meta  # as torch.zeros(size) gives
    return not tensor and bool(inputs) and numbers.issuperset(inputs)


_SIZES = frozenset({"size", "numel", "dim", "shape", "dtype", "device", "ndim", "len"})


# -- the sites of a prepared model -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """One weight operand of a prepared model.

    ``path``: the module whose forward makes the call; ``name``: the weight; ``shape``: the weight's; ``reason``: why it
    is left float, or None; ``captured``: in a graph, or quantized while Python runs; ``sources``: the parameters (or
    the modules that make them) that it derives from; ``node``: the operand in its graph, before any quantizer.
    """

    path: str
    name: str
    op: str
    shape: tuple[int, ...]
    weight: QuantSpec | None
    activation: QuantSpec | None
    sparsity: SparsitySpec | None
    groups: Groups | None
    where: str
    reason: str | None
    captured: bool
    quantizer: WeightQuantizer | None
    sources: tuple[str, ...] = ()
    node: fx.Node | None = None


def is_prepared(model: nn.Module) -> bool:
    """Whether `qgraph.prepare` returned this model."""
    return STATE in model.__dict__


def shared_below(model: nn.Module) -> list[Shared]:
    """What each prepared model shares that is, or is inside, `model` (a wrapper, a task around it).

    Raises
    ------
    CaptureError
        Where there is none.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = {id(m.__dict__[STATE].shared): m.__dict__[STATE].shared for m in modules if is_prepared(m)}
    if not found:
        raise CaptureError(f"{type(model).__name__} is not prepared: call qgraph.prepare on it first.")
    return [*found.values()]


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile's, the data-parallel and the averaging wrappers."""
    wrappers = nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, wrappers):
            model = model.module
        else:
            return model


@contextlib.contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Put the training flag of each module back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def config_of(model: nn.Module) -> QConfig | None:
    """The config that a model was prepared with, or None."""
    state = model.__dict__.get(STATE)
    return state.shared.config if state is not None else None


def states(model: nn.Module) -> Iterator[tuple[str, nn.Module, ModuleState]]:
    """Every captured module of a prepared model with its path and state."""
    for path, module in model.named_modules():
        state = module.__dict__.get(STATE)
        if state is not None:
            yield path, module, state


def quantizer_modules(model: nn.Module) -> Iterator[Any]:
    """The sparsifiers and quantizers of a prepared model, each once."""
    for module in model.modules():
        if isinstance(module, (WeightQuantizer, ActivationQuantizer, Sparsifier)):
            yield module


def sites(model: nn.Module) -> list[SiteRecord]:
    """Every weight operand of every site met so far, in the order of the model's modules; each once."""
    records: dict[tuple[str, str, str], SiteRecord] = {}
    for path, module, state in states(model):
        owner = state.owner(module)
        for variant in state.variants:
            for found in find_sites(variant.graph, owner):
                for i, placed in enumerate(found.site.weights):
                    node = unquantized(found.operand_node(placed))
                    shape = tuple(node.meta.get("shape", ()))
                    where = found.node.meta.get("where", "")
                    record = _record(owner, found.site, i, shape, where, node)
                    records.setdefault((path, placed.site, record.op), record)
        for site, where, shapes in state.python_sites.values():
            for i, (placed, shape) in enumerate(zip(site.weights, shapes, strict=True)):
                record = _record(owner, site, i, shape, where, None)
                records.setdefault((path, placed.site, record.op), record)
    return list(records.values())


def _record(
    owner: Owner, site: Site, number: int, shape: tuple[int, ...], where: str, node: fx.Node | None
) -> SiteRecord:
    """What is known of weight `number` of a site."""
    placed = site.weights[number]
    config = owner.config
    container = owner.module._modules.get("qgraph")
    quantizer: Any = None
    sparsifier: Any = None
    activation: Any = None
    if isinstance(container, Quantizers):
        held = container._modules
        name = placed.key.replace(".", "__")
        quantizer, sparsifier = held.get(name), held.get(f"{name}__sparsifier")
        if number < len(site.inputs):  # an LSTM's hidden weights and its layers above multiply float values
            activation = held.get(site.inputs[number].key.replace(".", "__"))
    reason = None
    if quantizer is None and sparsifier is None:
        if config is None:
            reason = "a rule leaves it float"
        elif config.weight is None and config.sparsity is None:
            reason = "the config quantizes no weights"
        elif placed.source.unfit:
            reason = f"its values are {placed.source.unfit}, which no quantizer takes"
        else:
            reason = "no quantizer was placed"
    holder = quantizer if quantizer is not None else sparsifier
    return SiteRecord(
        path=owner.path,
        name=placed.site,
        op=site.call.op,
        shape=shape,
        weight=quantizer.spec if quantizer is not None else None,
        activation=activation.spec if activation is not None else None,
        sparsity=sparsifier.sparsity if sparsifier is not None else None,
        groups=holder.groups if holder is not None else None,
        where=where,
        reason=reason,
        captured=node is not None,
        quantizer=quantizer,
        sources=placed.source.names,
        node=node,
    )


# -- coverage ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpaqueModule:
    """A module that stays Python for some call: why, and where in the user's code."""

    path: str
    kind: str
    training: bool
    reason: str
    where: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """What was captured: modules with graphs and without, sites and how many are quantized, calls that missed."""

    modules: int
    captured: int
    graphs: int
    opaque: tuple[OpaqueModule, ...]
    sites: int
    sites_quantized: int
    guard_misses: int


def coverage(model: nn.Module) -> Coverage:
    """Count what is captured so far in a prepared model."""
    opaque: list[OpaqueModule] = []
    modules = captured = graphs = misses = 0
    for path, module, state in states(model):
        modules += 1
        captured += bool(state.variants)
        graphs += len(state.variants)
        misses += state.misses
        kind = type(module).__name__
        opaque.extend(OpaqueModule(path, kind, o.training, o.reason, o.where) for o in state.opaque)
    records = sites(model)
    quantized = sum(record.reason is None for record in records)
    return Coverage(modules, captured, graphs, tuple(opaque), len(records), quantized, misses)
