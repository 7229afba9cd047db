"""Rows of a prepared model: every weight of every site met so far, with its size and its present error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qgraph.graph import STATE, SiteRecord, find_sites, keeping_modes, sites, states
from qgraph.inspection.layers import Layer, notation
from qgraph.inspection.sizes import FLOAT_BITS, bits_per_weight, describe_groups, error_db, stored_bytes
from qgraph.modules import ActivationQuantizer, Quantizers, Sparsifier, WeightQuantizer
from qgraph.passes.weights import value_of

NOT_CAPTURED = "not captured yet"


def prepared_layers(model: nn.Module) -> tuple[list[Layer], set[str]]:
    """The rows of a prepared model; the names of the parameters, or of modules making them, they cover."""
    records, parameters, passed = _records(model)
    owners = {state.path: module for _, module, state in states(model)}
    first: dict[Any, Layer] = {}
    layers: list[Layer] = []
    covered: set[str] = set()
    for record in records:
        covered.update(passed.get(source, source) for source in record.sources or (record.name,))
        layer = _layer(owners[record.path], record, parameters, first)
        layers.append(layer)
    return layers, covered


def site_values(model: nn.Module) -> Iterator[tuple[SiteRecord, Tensor]]:
    """The float weight of each site of a prepared model, where there is one now."""
    records, parameters, _ = _records(model)
    owners = {state.path: module for _, module, state in states(model)}
    for record in records:
        value = _value(owners[record.path], record, parameters)
        if value is not None and value.numel():
            yield record, value


def _records(model: nn.Module) -> tuple[list[SiteRecord], dict[str, nn.Parameter], dict[str, str]]:
    """The sites met so far or ready, parameters by name, and arguments that are parameters of a parent."""
    records = sites(model)
    met = {record.name for record in records}
    records += [record for record in _waiting(model) if record.name not in met or record.reason is not None]
    parameters = _parameters(model)
    passed = _passed(model)
    parameters |= {name: parameters[source] for name, source in passed.items() if source in parameters}
    return records, parameters, passed


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names in the whole prepared model, of which `model` may be a part."""
    state = model.__dict__[STATE]
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        full = f"{state.path}.{name}".lstrip(".")
        found[full] = found[state.shared.canonical.get(full, full)] = parameter
    return found


def _layer(owner: nn.Module, record: SiteRecord, parameters: dict[str, nn.Parameter], first: dict[Any, Layer]) -> Layer:
    key = (record.name, record.weight, record.sparsity, record.groups)
    stored = first.get(key)
    value = None if stored is not None else _value(owner, record, parameters)
    shape = stored.shape if stored is not None else tuple(value.shape) if value is not None else record.shape
    dtype = value.dtype if value is not None else torch.float32
    before = math.prod(shape) * dtype.itemsize
    layer = Layer(
        path=record.path,
        name=record.name,
        op=record.op,
        shape=shape,
        dtype=stored.dtype if stored is not None else str(dtype).removeprefix("torch."),
        spec=notation(record.weight, record.activation, record.sparsity),
        weight=record.weight,
        activation=record.activation,
        sparsity=record.sparsity,
        groups="",
        bits_per_weight=8.0 * dtype.itemsize,
        bytes_before=before,
        bytes_after=before,
        reason=record.reason,
        where=record.where,
        captured=record.captured,
    )
    if record.groups is not None:
        layer = _with_sizes(layer, record, value)
    if stored is not None:
        return replace(layer, bytes_before=0, bytes_after=0, error_db=None, tied_to=stored.site)
    first[key] = layer
    return layer


def _with_sizes(layer: Layer, record: SiteRecord, value: Tensor | None) -> Layer:
    assert record.groups is not None
    arguments = (layer.shape, record.weight, record.sparsity, record.groups)
    measured = None
    if value is not None and not value.is_meta and value.numel():
        step = record.quantizer.step if record.quantizer is not None else None
        measured = error_db(value, record.weight, record.sparsity, record.groups, step)
    return replace(
        layer,
        groups=describe_groups(record.groups, layer.shape),
        bits_per_weight=bits_per_weight(*arguments),
        bytes_after=stored_bytes(*arguments),
        error_db=measured,
    )


def _value(owner: nn.Module, record: SiteRecord, parameters: dict[str, nn.Parameter]) -> Tensor | None:
    """The float weight as it is now; None where only running Python makes it."""
    parameter = parameters.get(record.name)
    if parameter is None and record.node is not None and record.node.op == "placeholder":
        parameter = parameters.get(record.sources[0])
    if parameter is not None:
        return None if nn.parameter.is_lazy(parameter) else parameter.detach()
    if record.node is None:
        return None
    try:
        with _undisturbed(owner):
            value = value_of(record.node, owner)()
    except Exception:  # user code that makes a weight may need what only a whole forward has
        return None
    return value.detach().clone() if isinstance(value, Tensor) else None


def _passed(model: nn.Module) -> dict[str, str]:
    """Arguments that are parameters: ``child.argument`` -> the parameter that the parent passes."""
    found = {}
    for _, module, state in states(model):
        for variant in state.variants:
            for node in variant.graph.nodes:
                child = _child_state(module, node)
                if child is None:
                    continue
                values = (*node.args, *(node.kwargs[name] for name in sorted(node.kwargs)))
                for name, value in zip(child.names(node.args, dict(node.kwargs)), values, strict=True):
                    if isinstance(value, fx.Node) and value.op == "get_attr" and value.meta.get("parameter"):
                        source = state.shared.canonical_name(state.path, str(value.target))
                        found[f"{child.path}.{name}"] = source
    return found


def _child_state(module: nn.Module, node: fx.Node) -> Any:
    if node.op != "call_module" or str(node.target).startswith("qgraph."):
        return None
    return module.get_submodule(str(node.target)).__dict__.get(STATE)


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Let a module compute a weight in eval mode; modes, buffers, counters and random states stay."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    counters = [(s, s.misses, len(s.variants), len(s.opaque)) for _, _, s in states(module)]
    try:
        with keeping_modes(module), torch.random.fork_rng(), torch.no_grad():
            for each in module.modules():
                each.training = False
            yield
    finally:
        for state, misses, variants, opaque in counters:
            state.misses = misses
            del state.variants[variants:], state.opaque[opaque:]
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _waiting(model: nn.Module) -> Iterator[SiteRecord]:
    """Torch's own layers whose quantizers stand ready though no call of the layer was captured yet."""
    for _, module, state in states(model):
        if state.variants or state.python_sites:
            continue
        path = state.path
        container = module._modules.get("qgraph")
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        quantizer: Any = None
        sparsifier: Any = None
        activation: Any = None
        if isinstance(container, Quantizers):
            quantizer = _entry(container, WeightQuantizer)
            sparsifier = _entry(container, Sparsifier)
            activation = _entry(container, ActivationQuantizer)
        holder = quantizer if quantizer is not None else sparsifier
        name = holder.site if holder is not None else state.shared.canonical_name(path, "weight")
        reason = None if holder is not None else _why_float(state.owner(module).config)
        yield SiteRecord(
            path=path,
            name=name,
            op=standard_op(module),
            shape=() if nn.parameter.is_lazy(weight) else tuple(weight.shape),
            weight=quantizer.spec if quantizer is not None else None,
            activation=activation.spec if activation is not None else None,
            sparsity=sparsifier.sparsity if sparsifier is not None else None,
            groups=holder.groups if holder is not None else None,
            where="",
            reason=reason,
            captured=False,
            quantizer=quantizer,
            sources=(name,),
        )


def _entry(container: Quantizers, kind: type[nn.Module]) -> nn.Module | None:
    return next((module for module in container._modules.values() if isinstance(module, kind)), None)


def _why_float(config: Any) -> str:
    if config is None:
        return "a rule leaves it float"
    if config.weight is None and config.sparsity is None:
        return "the config quantizes no weights"
    return NOT_CAPTURED


_OPS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Bilinear: "bilinear",
    **{getattr(nn, f"Conv{d}d"): f"conv{d}d" for d in (1, 2, 3)},
    **{getattr(nn, f"ConvTranspose{d}d"): f"conv_transpose{d}d" for d in (1, 2, 3)},
    nn.Embedding: "embedding",
    nn.EmbeddingBag: "embedding_bag",
    nn.MultiheadAttention: "attention",
    nn.LSTM: "lstm",
    nn.GRU: "gru",
    nn.RNN: "rnn",
    nn.LSTMCell: "lstm_cell",
    nn.GRUCell: "gru_cell",
    nn.RNNCell: "rnn_cell",
}


def standard_op(module: nn.Module) -> str:
    """The operation that a layer of torch's own stands for; ``parameter`` for a module of any other kind."""
    return next((_OPS[base] for base in type(module).__mro__ if base in _OPS), "parameter")


def in_order_of_use(model: nn.Module, layers: list[Layer]) -> list[Layer]:
    """The rows in the order in which a forward meets them, as far as graphs tell; else in that of modules."""
    rank: dict[tuple[str, str], int] = {}
    _visit(model, rank, set())
    last = len(rank)
    return sorted(layers, key=lambda layer: rank.get((layer.path, layer.name), last))


def _visit(module: nn.Module, rank: dict[tuple[str, str], int], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    state = module.__dict__.get(STATE)
    if state is None or not state.variants:
        for child in module.children():
            _visit(child, rank, seen)
        return
    variant = next((v for v in state.variants if not v.training), state.variants[0])
    found: dict[fx.Node, list[str]] = {}
    for site in find_sites(variant.graph, state.owner(module)):
        found[site.node] = [placed.site for placed in site.site.weights]
    for node in variant.graph.nodes:
        for name in found.get(node, ()):
            rank.setdefault((state.path, name), len(rank))
        if node.op == "call_module":
            _visit(module.get_submodule(str(node.target)), rank, seen)


__all__ = ["FLOAT_BITS", "NOT_CAPTURED", "in_order_of_use", "prepared_layers", "site_values", "standard_op"]
