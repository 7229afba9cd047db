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

import qgraph
from qgraph.copying import copied
from qgraph.graph import coverage, sites
from qgraph.modules import ActivationQuantizer, Sparsifier, WeightQuantizer
from tests.zoo.census import Census, counting

CONFIG = "A4W2"
WEIGHTS = "W2"  # where outputs are compared up to rounding


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def double(self) -> Call:
        """The same in float64."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        for tensor in filter(_is_float, leaves((args, kwargs))):
            tensor.data = tensor.data.double()
        return Call(args, kwargs)


@dataclass(slots=True)
class Run:
    """Output leaves and gradients of a run, and the arguments and buffers as they are after its forward."""

    outputs: list[Any]
    gradients: dict[str, Tensor]
    state: list[Any]


Runs = dict[tuple[int, bool], Run]  # by the number of a call and the mode


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
    eager_breaks: int = 0
    breaks: int = 0
    export: str = ""  # the dynamic sizes of the file, or why there is none
    export_calls: int = 0  # how many of the zoo's shapes a file was run on
    export_notes: list[str] = field(default_factory=list)


def leaves(value: Any) -> list[Any]:
    """Tensors and scalars of an output, objects looked into (a cache is an output too)."""
    if isinstance(value, (Tensor, int, float, str, bool, type(None))):
        return [value]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    return leaves(list(vars(value).values())) if hasattr(value, "__dict__") and not callable(value) else []


def seed() -> None:
    torch.default_generator.manual_seed(7)  # torch.manual_seed asks for every other device too, at some cost
    random.seed(7)
    np.random.seed(7)


def _ready(model: nn.Module, call: Call, training: bool, start: nn.Module | None) -> tuple[Any, Any]:
    """Put a model and the random numbers in the state where each run begins; returns the arguments, fresh."""
    if start is not None:
        model.load_state_dict(start.state_dict())
    model.train(training)
    model.zero_grad()
    seed()
    return copy.deepcopy((call.args, call.kwargs))


def run(model: nn.Module, call: Call, training: bool, start: nn.Module | None = None) -> Run:
    """One forward and backward, always from the same random state, and from the parameters and buffers of `start`."""
    args, kwargs = _ready(model, call, training, start)
    out = leaves(model(*args, **kwargs))
    state = [*leaves((args, kwargs)), *(b.clone() for b in model.buffers())]
    total = [t.float().abs().square().sum() for t in out if isinstance(t, Tensor) and t.requires_grad]
    try:
        if total:
            sum(total).backward()
    except (RuntimeError, AssertionError) as error:  # some models have no backward in eval: then nor may ours
        out.append(f"no backward: {type(error).__name__}")
        model.zero_grad()  # how far it came is no matter
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Run(out, gradients, state)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if torch._C._functorch.is_functorch_wrapped_tensor(a):  # seen by a hook inside a transform that is over
            return torch._C._functorch.is_functorch_wrapped_tensor(b)
        return torch.equal(torch.nan_to_num(a.detach()), torch.nan_to_num(b.detach()))  # complex ones have no gradient
    return type(a) is type(b) and a == b


def all_same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def check(name: str, model: nn.Module, calls: list[Call]) -> Found:
    """Every check of one model: the example is the first of `calls`."""
    found = Found(name)
    started = time.perf_counter()
    prepared = qgraph.prepare(model, CONFIG, calls[0].args, example_kwargs=calls[0].kwargs)
    found.prepare_seconds = time.perf_counter() - started
    eager = copied(model)
    expected = {key: run(eager, call, key[1], model) for key, call in _modes(calls)}
    _off(found, model, prepared, calls, expected)
    _on(found, model, prepared, calls, expected)
    _objects(found, model, prepared, calls)
    if not all_same(run(eager, calls[0], True, model).outputs, expected[0, True].outputs):  # eager itself varies
        compared = ("another result the second time", "outputs differ", "other results")
        found.failures = [f for f in found.failures if not f.startswith("off") and not f.endswith(compared)]
    report = coverage(prepared)
    found.sites, found.quantized = report.sites, report.sites_quantized
    found.modules, found.captured = report.modules, report.captured
    found.graphs, found.misses = report.graphs, report.guard_misses
    found.opaque = sorted({f"{o.kind}: {o.reason} ({_short(o.where)})" for o in report.opaque})
    if report.sites != report.sites_quantized:
        found.failures.append("sites left float: " + ", ".join(s.name for s in sites(prepared) if s.reason))
    found.seconds = time.perf_counter() - started
    return found


def _modes(calls: list[Call]) -> list[tuple[tuple[int, bool], Call]]:
    """Every call in eval and in train mode."""
    return [((number, training), call) for number, call in enumerate(calls) for training in (False, True)]


def _off(found: Found, model: nn.Module, prepared: nn.Module, calls: list[Call], expected: Runs) -> None:
    copied = copy.deepcopy(prepared)
    again = [(key, call) for key, call in _modes(calls) if key[0] == 0]
    for i, ((number, training), call) in enumerate([*_modes(calls), *again]):
        other = copied if i < len(again) else prepared
        with qgraph.disabled(other):
            ours = run(other, call, training, model)
            if _wrong_gradients(ours, expected[number, training]):
                # A call that is recorded may sum gradients in another order: the next one must not.
                ours = run(other, call, training, model)
        if problem := _difference(ours, expected[number, training]):
            found.failures.append(f"off, call {number}, {'train' if training else 'eval'}: {problem}")


def _difference(ours: Run, expected: Run) -> str | None:
    if not all_same(ours.outputs, expected.outputs):
        return "outputs differ"
    if not all_same(ours.state, expected.state):
        return "buffers or arguments differ afterwards"
    if others := ours.gradients.keys() ^ expected.gradients.keys():
        return f"gradients of {sorted(others)[:3]}"
    if wrong := _wrong_gradients(ours, expected):
        return f"gradient of {wrong[0]} differs ({len(wrong)})"
    return None


def _wrong_gradients(ours: Run, expected: Run) -> list[str]:
    return [n for n, g in ours.gradients.items() if n in expected.gradients and not same(g, expected.gradients[n])]


def _on(found: Found, model: nn.Module, prepared: nn.Module, calls: list[Call], expected: Runs) -> None:
    counted = copied(model)
    for (number, training), call in _modes(calls):
        at, floating = f"on, call {number}, {'train' if training else 'eval'}", expected[number, training]
        eager, _ = _count(counted, call, training, model)
        quantized, first = _count(prepared, call, training, model)
        ours = run(prepared, call, training, model)
        found.weights = max(found.weights, len(eager.weights))
        if quantized.floating:
            found.failures.append(f"{at}: float in a product: {sorted(quantized.floating)[:4]}")
        skipped = eager.weights - quantized.weights  # experts that other activations are not routed to
        if number == 0 and not skipped and eager.calls > quantized.calls:
            found.failures.append(f"{at}: {eager.calls} products of eager, {quantized.calls} of prepared")
        if not all_same(first, ours.outputs[: len(first)]):
            found.failures.append(f"{at}: another result the second time")
        if _reaches_output(eager.weights, floating) and all_same(ours.outputs, floating.outputs):
            found.failures.append(f"{at}: outputs do not change")
        lost = sorted(floating.gradients.keys() - ours.gradients.keys() - skipped)
        if lost and not skipped:  # else another branch was taken, by data that quantizers have changed
            found.failures.append(f"{at}: no gradient for {lost[:3]}")
        finite = all(torch.isfinite(g).all() for g in floating.gradients.values())
        if bad := [n for n, g in ours.gradients.items() if finite and not torch.isfinite(g).all()]:
            found.failures.append(f"{at}: gradient of {bad[0]} is not finite ({len(bad)})")


ROUNDING = 1e-5  # gradients below it are sums that cancel


def _reaches_output(weights: set[str], run: Run) -> bool:
    """Whether the output depends on a quantized weight, as far as gradients tell."""
    return any(n in run.gradients and bool((run.gradients[n].abs() > ROUNDING).any()) for n in weights)


def _count(model: nn.Module, call: Call, training: bool, start: nn.Module) -> tuple[Census, list[Any]]:
    """The census of one forward, and its output leaves."""
    args, kwargs = _ready(model, call, training, start)
    with counting(model, leaves((args, kwargs)), (WeightQuantizer, Sparsifier, ActivationQuantizer)) as census:
        out = leaves(model(*args, **kwargs))
    return census, out


def _objects(found: Found, model: nn.Module, prepared: nn.Module, calls: list[Call]) -> None:
    call, eager = calls[0], copied(model)
    for (_, training), other in _modes(calls):  # what a run leaves in eager (hooks that do not pickle) is its own
        run(eager, other, training)
    if list(prepared.state_dict()) != list(model.state_dict()) or not isinstance(prepared, type(model)):
        found.failures.append("class or state_dict keys differ")
    if [n for n, _ in prepared.named_parameters()] != [n for n, _ in model.named_parameters()]:
        found.failures.append("names of parameters differ")
    expected = run(prepared, call, False, model)
    makers = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
    for kind, make in makers.items():
        try:
            make(eager)
        except Exception:
            continue  # nor can eager
        try:
            made = make(prepared)
            if not all_same(run(made, call, False, model).outputs, expected.outputs):
                found.failures.append(f"{kind}: another result")
            if kind == "deepcopy":
                _double(found, eager, made, call)
        except Exception as error:
            found.failures.append(f"{kind}: {type(error).__name__}: {error}")
    _hooks(found, copied(model), prepared, call)


def _double(found: Found, eager: nn.Module, prepared: nn.Module, call: Call) -> None:
    """In float64, as far as eager runs in it."""
    call, start = call.double(), copied(eager).double()
    try:
        expected = run(eager.double(), call, True, start)
    except Exception:
        return
    with qgraph.disabled(prepared):
        if problem := _difference(run(prepared.double(), call, True, start), expected):
            found.failures.append(f"double: {problem}")


def _hooks(found: Found, eager: nn.Module, prepared: nn.Module, call: Call) -> None:
    """Forward hooks see the same modules in the same order, with the same results."""
    seen: tuple[list[list[Any]], list[list[Any]]] = ([], [])
    start = copied(eager)
    with qgraph.disabled(prepared):
        run(
            prepared, call, True, start
        )  # a graph whose sizes turn out not to hold has called hooks before that is seen
        for model, calls in zip((eager, prepared), seen, strict=True):
            handles = [
                module.register_forward_hook(lambda _, __, out, n=name, c=calls: c.append([n, *leaves(out)]))
                for name, module in model.named_modules()
                if "qgraph" not in name.split(".") and not isinstance(module, torch.jit.ScriptModule)
            ]
            args, kwargs = _ready(model, call, True, start)
            model(*args, **kwargs)
            for handle in handles:
                handle.remove()
    if [call[0] for call in seen[0]] != [call[0] for call in seen[1]]:
        found.failures.append("hooks: called for other modules")
    elif not all(all_same(a, b) for a, b in zip(*seen, strict=True)):
        found.failures.append("hooks: other results")


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _short(where: str) -> str:
    file, _, line = where.rpartition(":")
    return f"{file.rpartition('/')[2]}:{line}"
