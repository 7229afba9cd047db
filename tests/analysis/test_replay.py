"""Activations that are kept between evaluations: never another score, fewer operations, and why none are kept."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qgraph
from qgraph.runtime import session_for
from tests.models import CASES, GPT, ResNet
from tests.zoo.checks import leaves
from tests.zoo.generator import built, samples
from tests.zoo.traps import TRAPS


def outputs_of(calls, mode=torch.no_grad):
    """An `evaluate` that reads every number that the model returns."""

    def evaluate(model):
        model.eval()
        total = 0.0
        with mode():
            for args, kwargs in calls:
                torch.manual_seed(1)
                for leaf in leaves(model(*copy.deepcopy(args), **copy.deepcopy(kwargs))):
                    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                        total += float(leaf.double().nan_to_num().clamp(-1e6, 1e6).sum())
        return total

    return evaluate


def scores(prepared, evaluate, **options):
    found = qgraph.sensitivity(prepared, evaluate, progress=False, **options)
    return {(row.kind, row.name): row.score for row in (*found.layers, *found.kinds)}, found.cached


MODES = [
    pytest.param(name, how, mode, id=f"{name}-{how}")
    for name in (*CASES, *TRAPS)
    for how, mode in (("quantized", torch.no_grad), ("float", torch.inference_mode))
    if (name, how) != ("EnableGrad", "float")  # eager raises on inference tensors
]


@pytest.mark.parametrize("name, how, mode", MODES)
def test_the_scores_are_those_of_full_evaluations(name, how, mode):
    case = {**CASES, **TRAPS}[name]
    torch.manual_seed(0)
    model, calls = case.make(), [(case.inputs(i), {}) for i in (0, 1, 0)]
    prepared = qgraph.prepare(model, "A8W2", calls[0][0])
    evaluate = outputs_of(calls, mode)
    evaluate(prepared)
    own = [module.__dict__.get("forward") for module in prepared.modules()]
    full, _ = scores(prepared, evaluate, how=how, cache_bytes=0)
    kept, cached = scores(prepared, evaluate, how=how)
    assert kept == full, cached
    assert own == [module.__dict__.get("forward") for module in prepared.modules()]


def test_random_models():
    for source in samples(20261126, 12):
        with warnings.catch_warnings(action="ignore"), built(source) as (model, calls):
            calls = [(call.args, call.kwargs) for call in calls]
            try:
                outputs_of(calls)(model)
                prepared = qgraph.prepare(model, "A8W2", calls[0][0])
                evaluate = outputs_of(calls)
                evaluate(prepared)
                full, _ = scores(prepared, evaluate, cache_bytes=0)
            except (RuntimeError, qgraph.QGraphError):
                continue  # eager cannot run it, or nothing is quantized
            assert scores(prepared, evaluate)[0] == full, source


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def products(prepared, evaluate, **options):
    """How many matrix products and convolutions a ranking takes."""
    with Products() as seen:
        _, cached = scores(prepared, evaluate, **options)
    return sum(seen.counts[name] for name in ("addmm", "mm", "bmm", "convolution")), cached


@pytest.mark.parametrize("how", ["quantized", "float"])
@pytest.mark.parametrize(
    "make, inputs", [(GPT, lambda: torch.randint(0, 33, (2, 9))), (ResNet, lambda: torch.randn(2, 3, 16, 16))]
)
def test_what_comes_before_a_layer_is_not_computed_again(make, inputs, how):
    torch.manual_seed(0)
    prepared = qgraph.prepare(make(), "W2", inputs())
    evaluate = outputs_of([((inputs(),), {}) for _ in range(3)])
    evaluate(prepared)
    full, _ = products(prepared, evaluate, how=how, cache_bytes=0)
    kept, cached = products(prepared, evaluate, how=how)
    some, fewer = products(prepared, evaluate, how=how, cache_bytes=8000)
    assert kept < 0.8 * full and "modules were kept" in cached
    assert kept < some < 1.2 * full and fewer != cached  # the base is evaluated twice


def test_why_nothing_is_kept():
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    prepared = qgraph.prepare(nn.Sequential(nn.Linear(16, 16), nn.Dropout(), nn.Linear(16, 16)), "W2", x)

    def with_gradients(model):
        return float(model.eval()(x).sum())

    def in_train(model):
        torch.manual_seed(0)
        with torch.no_grad():
            return float(model.train()(x).sum())

    for evaluate, why in ((with_gradients, "runs with gradients"), (in_train, "draws random numbers")):
        found, cached = scores(prepared, evaluate)
        assert found == scores(prepared, evaluate, cache_bytes=0)[0] and why in cached and "in full" in cached


def test_a_score_that_changes_from_run_to_run_is_noticed():
    torch.manual_seed(0)
    x, runs = torch.randn(4, 16), []
    prepared = qgraph.prepare(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), "W2", x)

    def evaluate(model):
        runs.append(0)
        with torch.no_grad():
            return float(model.eval()(x).sum()) + len(runs)

    assert "in full" in scores(prepared, evaluate)[1]


def small():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return qgraph.prepare(nn.Sequential(inner, nn.Linear(8, 8), nn.Linear(8, 4)), "W2", x), x


def test_hooks_of_evaluate_see_every_call():
    prepared, x = small()
    calls = []

    def evaluate(model):
        seen = []
        handle = model[0][0].register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.no_grad():
            result = model.eval()(x)
        handle.remove()
        calls.append(len(seen))
        return float(result.sum() + seen[0].sum())

    full, _ = scores(prepared, evaluate, cache_bytes=0)
    kept, cached = scores(prepared, evaluate)
    assert kept == full and set(calls) == {1} and "were kept" in cached


@pytest.mark.parametrize("form", ["copied", "compiled", "exported"])
def test_an_evaluate_that_makes_something_of_the_model(form, tmp_path):
    prepared, x = small()

    def evaluate(model):
        if form == "exported":
            qgraph.export(model, tmp_path / "a.onnx", (x,), progress=False)
            session = session_for(tmp_path / "a.onnx")
            return float(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0].sum())
        made = copy.deepcopy(model) if form == "copied" else torch.compile(model, backend="eager")
        with torch.no_grad():
            return float(made.eval()(x).sum())

    prepared.eval()
    assert scores(prepared, evaluate)[0] == scores(prepared, evaluate, cache_bytes=0)[0]


class Writes(nn.Module):
    """Each child's result or argument is written to afterwards, or a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        y = self.a(x)
        z = self.relu(y)
        y += self.b(z)
        self.seen.mul_(0.5).add_(y.mean(0))
        return F.relu_(self.c(y)) + self.seen + z


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_written_to_is_computed_again(mode):
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    prepared = qgraph.prepare(nn.Sequential(Writes(), nn.Linear(8, 8), Writes()), "W2", x)

    def evaluate(model):
        for module in model.modules():
            if isinstance(module, Writes):
                module.seen.zero_()
        return outputs_of([((x,), {}), ((2 * x,), {})], mode)(model)

    full, _ = scores(prepared, evaluate, cache_bytes=0)
    assert scores(prepared, evaluate)[0] == full and len(set(full.values())) > 3


def test_allocate_finds_the_same_costs():
    torch.manual_seed(0)
    ids = torch.randint(0, 33, (2, 9))
    prepared = qgraph.prepare(GPT(), "W4", ids)
    evaluate = outputs_of([((ids,), {})])
    found = qgraph.allocation(prepared, "9 bits", evaluate, candidates=(2, 3, 4))
    widest, other = found.layers[0], found.layers[-1]
    for layer in (widest, other):
        config = qgraph.QConfig.parse("W4").with_rules(*(qgraph.Rule(path, "W2") for path in layer.paths))
        alone = evaluate(qgraph.prepare(prepared_model(prepared), config, ids))
        assert layer.costs[2] == pytest.approx(evaluate(prepared) - alone, abs=1e-9)


def prepared_model(prepared):
    model = GPT()
    model.load_state_dict(prepared.state_dict(), strict=False)
    return model
