"""`freeze`: from a prepared model to the one that is deployed in torch, integer codes in place of its weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qgraph.capture.names import format_target
from qgraph.capture.state import ModuleState
from qgraph.copying import copied
from qgraph.errors import CaptureError
from qgraph.frozen import FrozenSparsifier, FrozenWeight
from qgraph.graph import is_prepared, is_quantizer, states, unwrapped
from qgraph.modules import Quantizers, Sparsifier, WeightQuantizer
from qgraph.ops import quantize
from qgraph.ops.sharded import whole

__all__ = ["freeze"]

NAMED = 5  # weights that a warning lists


def freeze(prepared: nn.Module) -> nn.Module:
    """A copy of a prepared model that holds integer codes, scales and zero points in place of its quantized weights.

    The copy is in eval mode and stays there. It computes what ``prepared.eval()`` does, up to float rounding: a weight
    is `scale * (code - zero_point)`, which is within 1e-6 of the largest weight. Codes are packed to 1, 2, 4 or 8 bits
    in memory and unpacked when the layer runs. It has a state_dict of its own, is copied and pickled like any module,
    and `qgraph.export`, `qgraph.inspect` and `qgraph.compare` take it.

    Parameters
    ----------
    prepared : nn.Module
        What `qgraph.prepare` returned, with its eval graphs captured: prepared with examples, or run once in eval. Left
        as it is.

    Returns
    -------
    nn.Module

    Raises
    ------
    CaptureError
        For a model that is not prepared, was frozen before, or has no eval graph yet.

    Notes
    -----
    A weight keeps its float form, and a warning names it, where something else than its quantizer uses it, where a
    forward stays Python, and where it is computed from several parameters (weight norm). A call of a kind that no
    captured graph holds for is an error that says so, where the prepared model would run its Python.

    Examples
    --------
    >>> deployed = qgraph.freeze(prepared)  # doctest: +SKIP
    >>> torch.save(deployed, "model.pt")  # doctest: +SKIP
    """
    prepared = unwrapped(prepared)
    _check(prepared)
    model = copied(prepared).eval()
    for _, _, state in states(model):
        state.variants = [variant for variant in state.variants if not variant.training]
        for variant in state.variants:  # no other graph can be made elsewhere, where a library has set its flags anew
            variant.forget_globals(state.variants)
    kept = _kept(model)
    found = dict(_freezable(model, kept))
    replaced = {id(module): _frozen(model, module, parameter) for module, parameter in found.values()}
    _replace(model, replaced)
    _release(model, {id(parameter) for _, parameter in found.values()})
    left = [m.site for m in _weight_modules(model) if not isinstance(m, FrozenWeight | FrozenSparsifier) and m.enabled]
    if left := list(dict.fromkeys(left)):
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        warnings.warn(
            f"freeze: {', '.join(left[:NAMED])}{more} stay float beside their quantizers: something else uses them, or "
            f"their forward stays Python.",
            stacklevel=2,
        )
    return model


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module) or not is_prepared(model):
        raise CaptureError(
            f"freeze: found a {type(model).__name__} that is not prepared; expected what qgraph.prepare returned."
        )
    if any(isinstance(module, FrozenWeight | FrozenSparsifier) for module in model.modules()):
        raise CaptureError("freeze: this model is frozen already; expected what qgraph.prepare returned.")
    if not any(_runs_eval(state) for _, _, state in states(model)):
        raise CaptureError(
            "freeze: no eval graph of this model was captured yet; expected at least one. Prepare it with "
            "example_inputs, or run it once in eval mode."
        )


def _runs_eval(state: ModuleState) -> bool:
    return any(not variant.training for variant in state.variants) or _is_opaque(state)


def _is_opaque(state: ModuleState) -> bool:
    return bool(state.python_sites) or any(not opaque.training for opaque in state.opaque)


def _weight_modules(model: nn.Module) -> Iterator[WeightQuantizer | Sparsifier]:
    for module in model.modules():
        if isinstance(module, WeightQuantizer) or (isinstance(module, Sparsifier) and module.alone):
            yield module


def _kept(model: nn.Module) -> set[int]:
    """The parameters that something else than a quantizer uses."""
    kept: set[int] = set()
    named = dict(model.named_parameters(remove_duplicate=False))
    for _, module, state in states(model):
        for variant in state.variants:
            for node in variant.graph.nodes:
                if node.op == "get_attr" and not all(map(is_quantizer, node.users)):
                    kept.add(id(_attribute(module, str(node.target))))
        if _is_opaque(state):
            kept |= {id(parameter) for parameter in module._parameters.values()}
            for site, _, _ in state.python_sites.values():
                kept |= {id(named.get(name)) for placed in site.weights for name in placed.source.names}
    return kept


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def _freezable(model: nn.Module, kept: set[int]) -> Iterator[tuple[str, tuple[Any, nn.Parameter]]]:
    """By site: the module that stands for a weight, and the parameter that it quantizes."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for module in _weight_modules(model):
        parameter = named.get(module.site)
        idle = not module.enabled or (isinstance(module, Sparsifier) and module.sparsity is None)
        if parameter is not None and id(parameter) not in kept and not idle:
            yield module.site, (module, parameter)


@torch.no_grad()
def _frozen(model: nn.Module, module: Any, parameter: nn.Parameter) -> nn.Module:
    """What takes the place of a quantizer, or of a sparsifier that stands alone."""
    weight = whole(parameter.detach())
    if isinstance(module, Sparsifier):
        return FrozenSparsifier(module, module(weight).clone())
    sparsifier = _sparsifier_before(model, module.site)
    pruned = weight if sparsifier is None else sparsifier(weight)
    dense = None if pruned is weight else weight  # a schedule may hold the pruning back
    found = quantize(pruned, module.spec, module.groups, dense=dense, step=module.step)
    return FrozenWeight(module, found, weight.dtype)


def _sparsifier_before(model: nn.Module, site: str) -> Sparsifier | None:
    found = (m for m in model.modules() if isinstance(m, Sparsifier) and m.site == site and m.enabled)
    return next(found, None)


def _replace(model: nn.Module, replaced: dict[int, nn.Module]) -> None:
    """Put the frozen modules in the places of the others, also where the model's state knows them by site."""
    sites = {getattr(module, "site", "") for module in replaced.values()}
    for container in [module for module in model.modules() if isinstance(module, Quantizers)]:
        for name, module in list(container._modules.items()):
            if id(module) in replaced:
                container._modules[name] = replaced[id(module)].eval()
            elif isinstance(module, Sparsifier) and module.site in sites:
                container._modules[name] = FrozenSparsifier(module, None).eval()
    _, _, state = next(states(model))
    known = state.shared.quantizers
    known.update({site: replaced[id(module)] for site, module in known.items() if id(module) in replaced})


def _release(model: nn.Module, released: set[int]) -> None:
    """Let go of the float weights, and of what graphs take for granted about them."""
    gone: set[tuple[int, str]] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in released:
                module._parameters[name] = None
                gone.add((id(module), name))
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    for _, module, state in states(model):
        state.gone = frozenset(name for name in module._parameters if (id(module), name) in gone)
        lost = bool(state.gone)
        for variant in state.variants:
            targets = [str(node.target) for node in variant.graph.nodes if node.op == "get_attr"]
            missing = [target for target in targets if _attribute(module, target) is None]
            lost = lost or bool(missing)
            for held in variant.held:
                owner = _attribute(module, ".".join(held.path)) if held.path else module
                for table, name in held.present:
                    if (id(owner), name) in gone:
                        held.present[table, name] = False
            gone_here = [rf"\b{re.escape(format_target('self', target))}(?!\w)" for target in missing]
            pattern = re.compile("|".join(gone_here) or r"(?!)")
            variant.guards = tuple(guard for guard in variant.guards if not pattern.search(guard.source))
            variant.compile()
        state.frozen = state.frozen or lost
