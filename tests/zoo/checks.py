"""What every model of the zoo is checked for, and what a run of the checks found."""

from __future__ import annotations

import copy
import pickle
import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import qgraph
from qgraph.graph import coverage, sites
from qgraph.modules import ActivationQuantizer, Sparsifier, WeightQuantizer
from tests.zoo.census import counting

CONFIG = "A4W2"


@dataclass(slots=True)
class Found:
    """One model's result; `failures` is empty where every check holds."""

    name: str
    failures: list[str] = field(default_factory=list)
    sites: int = 0
    quantized: int = 0
    weights: int = 0
    modules: int = 0
    captured: int = 0
    graphs: int = 0
    misses: int = 0
    opaque: list[str] = field(default_factory=list)
    prepare_seconds: float = 0.0
    seconds: float = 0.0


def leaves(value: Any) -> list[Any]:
    """Tensors and scalars of an output, objects looked into (a cache is an output too)."""
    if isinstance(value, (Tensor, int, float, str, bool, type(None))):
        return [value]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    return leaves(list(vars(value).values())) if hasattr(value, "__dict__") and not callable(value) else []


def clone(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.clone(), copy.copy(inputs))


def seed() -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)


def run(model: nn.Module, kwargs: dict[str, Any], training: bool) -> tuple[list[Any], dict[str, Tensor]]:
    """Output leaves and gradients of one forward and backward from the same random state."""
    model.train(training)
    model.zero_grad()
    seed()
    out = leaves(model(**clone(kwargs)))
    total = [t.float().abs().square().sum() for t in out if isinstance(t, Tensor) and t.requires_grad]
    try:
        if total:
            sum(total).backward()
    except (RuntimeError, AssertionError) as error:  # some models have no backward in eval: then nor may ours
        out.append(f"no backward: {type(error).__name__}")
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    return type(a) is type(b) and a == b


def all_same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def check(name: str, model: nn.Module, calls: list[dict[str, Any]]) -> Found:
    """Every check of one model: `calls` are keyword arguments, the example first."""
    found = Found(name)
    started = time.perf_counter()
    prepared = qgraph.prepare(model, CONFIG, example_kwargs=calls[0])
    found.prepare_seconds = time.perf_counter() - started
    _off(found, model, prepared, calls)
    _on(found, model, prepared, calls)
    _objects(found, model, prepared, calls)
    if not _repeatable(model, calls[0]):
        found.failures = [f for f in found.failures if not f.startswith("off")]
    report = coverage(prepared)
    found.sites, found.quantized = report.sites, report.sites_quantized
    found.modules, found.captured = report.modules, report.captured
    found.graphs, found.misses = report.graphs, report.guard_misses
    found.opaque = sorted({f"{o.kind}: {o.reason} ({_short(o.where)})" for o in report.opaque})
    if report.sites != report.sites_quantized:
        found.failures.append("sites left float: " + ", ".join(s.name for s in sites(prepared) if s.reason))
    found.seconds = time.perf_counter() - started
    return found


def _off(found: Found, model: nn.Module, prepared: nn.Module, calls: list[dict[str, Any]]) -> None:
    for number, kwargs in enumerate([*calls, calls[0]]):
        for training in (False, True):
            expected, expected_grads = run(copy.deepcopy(model), kwargs, training)
            other = copy.deepcopy(prepared) if number == 0 else prepared
            with qgraph.disabled(other):
                other.load_state_dict(model.state_dict())
                out, grads = run(other, kwargs, training)
                if not all(same(grads[n], g) for n, g in expected_grads.items() if n in grads):
                    # A call that is recorded may sum gradients in another order: the next one must not.
                    out, grads = run(other, kwargs, training)
            at = f"off, call {number}, {'train' if training else 'eval'}"
            if not all_same(out, expected):
                found.failures.append(f"{at}: outputs differ")
            elif grads.keys() != expected_grads.keys():
                found.failures.append(f"{at}: gradients of {sorted(grads.keys() ^ expected_grads.keys())[:3]}")
            elif wrong := [n for n in grads if not same(grads[n], expected_grads[n])]:
                found.failures.append(f"{at}: gradient of {wrong[0]} differs ({len(wrong)})")


def _on(found: Found, model: nn.Module, prepared: nn.Module, calls: list[dict[str, Any]]) -> None:
    for number, kwargs in enumerate(calls):
        for training in (False, True):
            at = f"on, call {number}, {'train' if training else 'eval'}"
            eager, quantized = _count(copy.deepcopy(model), kwargs, training), _count(prepared, kwargs, training)
            found.weights = max(found.weights, len(eager.weights))
            if quantized.floating:
                found.failures.append(f"{at}: float in a product: {sorted(quantized.floating)[:4]}")
            skipped = eager.weights - quantized.weights  # experts that other activations are not routed to
            if number == 0 and not skipped and eager.calls > quantized.calls:
                found.failures.append(f"{at}: {eager.calls} products of eager, {quantized.calls} of prepared")
            expected, expected_grads = run(copy.deepcopy(model), kwargs, training)
            out, grads = run(prepared, kwargs, training)
            if all_same(out, expected):
                found.failures.append(f"{at}: outputs do not change")
            if lost := sorted(expected_grads.keys() - grads.keys() - skipped):
                found.failures.append(f"{at}: no gradient for {lost[:3]}")
            finite = all(torch.isfinite(g).all() for g in expected_grads.values())
            if bad := [n for n, g in grads.items() if finite and not torch.isfinite(g).all()]:
                found.failures.append(f"{at}: gradient of {bad[0]} is not finite ({len(bad)})")


def _count(model: nn.Module, kwargs: dict[str, Any], training: bool) -> Any:
    model.train(training)
    seed()
    inputs = clone(kwargs)
    with counting(model, inputs, (WeightQuantizer, Sparsifier, ActivationQuantizer)) as census:
        model(**inputs)
    return census


def _objects(found: Found, model: nn.Module, prepared: nn.Module, calls: list[dict[str, Any]]) -> None:
    kwargs, model = calls[0], copy.deepcopy(model)
    for call in calls:  # what a run leaves in eager (hooks that do not pickle) is eager's own
        run(model, call, False)
    if list(prepared.state_dict()) != list(model.state_dict()) or not isinstance(prepared, type(model)):
        found.failures.append("class or state_dict keys differ")
    expected, _ = run(prepared, kwargs, False)
    makers = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
    for kind, make in makers.items():
        try:
            make(model)
        except Exception:
            continue  # nor can eager
        try:
            if not all_same(run(make(prepared), kwargs, False)[0], expected):
                found.failures.append(f"{kind}: another result")
        except Exception as error:
            found.failures.append(f"{kind}: {type(error).__name__}: {error}")


def _repeatable(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether eager gives the same twice from the same random state."""
    return all_same(run(copy.deepcopy(model), kwargs, True)[0], run(copy.deepcopy(model), kwargs, True)[0])


def _short(where: str) -> str:
    file, _, line = where.rpartition(":")
    return f"{file.rpartition('/')[2]}:{line}"
