"""`allocate`: the budget, the exact choice, the rules of the result, and what is said of wrong use."""

from __future__ import annotations

import builtins
import functools
import inspect
import itertools
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraph
from qgraph.analysis.budget import budget_bytes, choose
from qgraph.errors import ConfigError, InspectError, QGraphError
from qgraph.graph import quantizer_modules
from tests.analysis.planted import PLANTED
from tests.models import GPT


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def net():
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def distance(model, x):
    wanted = model.eval()(x).detach()

    def evaluate(candidate):
        candidate.eval()
        with torch.no_grad():
            return F.mse_loss(candidate(x), wanted)

    return evaluate


def weight_bytes(prepared):
    return sum(layer.bytes_after for layer in qgraph.inspect(prepared).layers if layer.weight is not None)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all(seed):
    generator = random.Random(seed)
    layers, widths = 5, 4
    costs = [[generator.random() * 10.0**-seed for _ in range(widths)] for _ in range(layers)]
    sizes = [sorted(generator.randrange(10, 1000) for _ in range(widths)) for _ in range(layers)]
    limit = sum(min(row) for row in sizes) + generator.randrange(0, 1500)
    choices = [c for c in itertools.product(range(widths), repeat=layers) if total(sizes, c) <= limit]
    best = min(total(costs, c) for c in choices)
    found = choose(costs, sizes, limit)
    assert total(sizes, found) <= limit and total(costs, found) == pytest.approx(best, rel=1e-6)


def total(rows, choice):
    return sum(row[i] for row, i in zip(rows, choice, strict=True))


@pytest.mark.parametrize("how", ["evaluate", "snr", "fisher"])
@pytest.mark.parametrize("budget", ["2.5 bits", "0.5x size", "4 KB"])
def test_a_budget_holds_in_the_model_that_is_prepared_with_the_result(how, budget):
    model, x = net(), torch.randn(64, 16)
    prepared = qgraph.prepare(model, "A8W8@tensor", x[:2])
    evaluate = distance(model, x)
    found = qgraph.allocation(
        prepared, budget, evaluate, how=how, lower_is_better=True, batches=[x], loss=lambda m, b: m(b).square().mean()
    )
    mixed = qgraph.prepare(model, found.config, x[:2])
    weights = sum(math.prod(layer.shape) for layer in qgraph.inspect(mixed).layers)
    assert weight_bytes(mixed) == found.stored <= found.limit
    biases = 4 * (24 + 24 + 4)
    limit = {
        "2.5 bits": int(2.5 * weights / 8),
        "0.5x size": int(0.5 * (weight_bytes(prepared) + biases)) - biases,
        "4 KB": 4096 - biases,
    }[budget]
    assert found.limit == limit
    assert {q.spec for q in quantizer_modules(mixed) if q.site.endswith("input")} == {
        q.spec for q in quantizer_modules(prepared) if q.site.endswith("input")
    }
    chosen = {path: layer.bits for layer in found.layers for path in layer.paths}
    assert {layer.path: layer.weight.bits for layer in qgraph.inspect(mixed).layers} == chosen
    if budget == "4 KB":  # all that there is room for
        assert set(chosen.values()) == {8}
    assert qgraph.QConfig.from_json(found.config.to_json()) == found.config


@pytest.mark.parametrize("name", PLANTED)
def test_the_layer_that_suffers_most_gets_the_most_bits(name):
    case = PLANTED[name]
    model, inputs = case.make(), case.inputs()
    with torch.no_grad():
        getattr(model.get_submodule(case.layer), case.weight).view(-1)[0] = 3.0
    config = qgraph.QConfig.parse("W8@tensor").with_rules(*(qgraph.Rule(table, None) for table in case.tables))
    prepared = qgraph.prepare(model, config, inputs)
    before = {q.site: q.spec for q in quantizer_modules(prepared)}
    with torch.no_grad():
        wanted = model.eval()(*inputs)

    def evaluate(candidate):
        candidate.eval()
        with torch.no_grad():
            return -F.mse_loss(candidate(*inputs), wanted)

    fine, rough = (qgraph.inspect(qgraph.prepare(model, replaced(config, bits), inputs)).layers for bits in (8, 4))
    room = sum((f if f.path == case.layer else r).bytes_after for f, r in zip(fine, rough, strict=True) if f.weight)
    weights = sum(math.prod(layer.shape) for layer in fine if layer.weight)
    found = qgraph.allocation(prepared, f"{8 * (room + 0.5) / weights} bits", evaluate, candidates=(2, 4, 8))
    chosen = {path: layer.bits for layer in found.layers for path in layer.paths}
    assert chosen[case.layer] == max(chosen.values()) > min(chosen.values()), str(found)
    assert not set(case.tables) & set(chosen)
    assert before == {q.site: q.spec for q in quantizer_modules(prepared)} and prepared.training
    mixed = qgraph.prepare(model, found.config, inputs)
    assert evaluate(mixed) >= evaluate(qgraph.prepare(model, replaced(config, 4), inputs))


def replaced(config, bits):
    return qgraph.QConfig.parse(f"W{bits}@tensor").with_rules(*config.rules)


def test_layers_that_share_a_weight_get_the_same_bits():
    model, ids = GPT(), torch.randint(0, 33, (2, 9))
    prepared = qgraph.prepare(model, "W4", ids)
    found = qgraph.allocation(prepared, "3.5 bits", how="snr", candidates=(1.58, 2, 3, 4, 8))
    shared = next(layer for layer in found.layers if "wte" in layer.paths)
    assert set(shared.paths) == {"wte", "head"} and shared.weights == model.wte.weight.numel()
    mixed = {layer.path: layer.weight.bits for layer in qgraph.inspect(qgraph.prepare(model, found.config, ids)).layers}
    assert mixed == {path: layer.bits for layer in found.layers for path in layer.paths}


def test_rules_of_the_model_and_of_modules_inside_others_hold():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.inner, self.other = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.other(self.inner(F.linear(x, self.w)))

    model, x = nn.Sequential(Outer(), nn.Linear(8, 4)), torch.randn(4, 8)
    config = qgraph.QConfig.parse("W4").with_rules(qgraph.Rule("0.other", None))
    prepared = qgraph.prepare(model, config, x)
    found = qgraph.allocation(prepared, "12.5 bits", how="snr", candidates=(2, 3))
    assert str(found.config.rules[0]) == "'0.other' -> float"
    mixed = qgraph.inspect(qgraph.prepare(model, found.config, x)).layers
    bits = {layer.path: None if layer.weight is None else layer.weight.bits for layer in mixed}
    chosen = {path: layer.bits for layer in found.layers for path in layer.paths}
    assert bits == {**chosen, "0.other": None} and set(chosen) == {"0", "0.inner", "1"}


def test_the_result_as_text_and_as_data():
    model, x = net(), torch.randn(8, 16)
    found = qgraph.allocation(qgraph.prepare(model, "W8@tensor", x), "3 bits", how="snr")
    assert "costs by snr" in str(found) and "cost at 1.58" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["paths"] == ["0"]
    assert found.bits_per_weight <= 3
    assert qgraph.allocate(qgraph.prepare(model, "W8@tensor", x), "3 bits", how="snr") == found.config


def test_scores_are_kept_for_a_run_that_was_stopped_and_for_other_budgets(tmp_path):
    model, x = net(), torch.randn(16, 16)
    prepared = qgraph.prepare(model, "W8@tensor", x)
    distance_to, calls = distance(model, x), []

    def evaluate(candidate):
        calls.append(candidate)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return distance_to(candidate)

    plan = functools.partial(
        qgraph.allocation, prepared, evaluate=evaluate, lower_is_better=True, resume=tmp_path / "scores.json"
    )
    stop = 9
    with pytest.raises(KeyboardInterrupt):
        plan("3 bits")
    first, stop = len(calls), 0
    found = plan("3 bits")
    whole = 1 + 3 * 6  # others see that giving back activations changes nothing, and compare with W3 and by noise
    assert whole < len(calls) <= first + whole - 6 + 5
    assert found == qgraph.allocation(prepared, "3 bits", distance_to, lower_is_better=True)
    done = len(calls)
    other = plan("5 bits")
    assert len(calls) == done + 3
    assert other == qgraph.allocation(prepared, "5 bits", distance_to, lower_is_better=True)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(InspectError, match=r"allocate: .*belongs to another model: its weights differ"):
        qgraph.allocate(qgraph.prepare(model, "W8@tensor", x), "3 bits", distance_to, resume=tmp_path / "scores.json")


def test_the_config_alone_has_the_options_of_the_allocation():
    shown, whole = inspect.signature(qgraph.allocate), inspect.signature(qgraph.allocation)
    assert shown.parameters == whole.parameters and shown.return_annotation == "QConfig"
    assert qgraph.allocate.__name__ == "allocate" and "2.5 bits" in qgraph.allocate.__doc__


@pytest.mark.parametrize("text", ["2.5", "bits", "2.5 tokens", "-1 bits", "", 2.5, "3 ms", "20 tokens/s"])
def test_a_text_that_is_no_budget(text):
    with pytest.raises(ConfigError, match=r"'2\.5 bits'.*'4 MB'.*'0\.5x size'"):
        budget_bytes(text, 100, 0, 100)


def test_budgets_of_time_and_of_nothing():
    with pytest.raises(ConfigError, match="share of the float model's"):
        budget_bytes("3 ms", 100, 0, 100)
    with pytest.raises(ConfigError, match="above 0"):
        budget_bytes("0 bits", 100, 0, 100)


def test_wrong_use_is_said(monkeypatch):
    model, x = net(), torch.randn(8, 16)
    prepared = qgraph.prepare(model, "W8@tensor", x)
    with pytest.raises(InspectError, match="Sequential is not prepared"):
        qgraph.allocate(model, "2 bits", len)
    with pytest.raises(ConfigError, match="found how='guess'"):
        qgraph.allocate(prepared, "2 bits", how="guess")
    with pytest.raises(ConfigError, match="needs evaluate="):
        qgraph.allocate(prepared, "2 bits")
    with pytest.raises(ConfigError, match="needs loss="):
        qgraph.allocate(prepared, "2 bits", how="fisher")
    with pytest.raises(ConfigError, match=r"bits are 1\.\.8"):
        qgraph.allocate(prepared, "2 bits", how="snr", candidates=(2, 9))
    with pytest.raises(ConfigError, match="no candidates"):
        qgraph.allocate(prepared, "2 bits", how="snr", candidates=())
    with pytest.raises(
        ConfigError, match=r"take 288 bytes at the narrowest.*'1 bits' leaves 132 for them \(208 are fl"
    ):
        qgraph.allocate(prepared, "1 bits", how="snr", candidates=(2, 4))
    with pytest.raises(InspectError, match="no quantized weight that is switched on"):
        qgraph.allocate(qgraph.prepare(model, "A8", x), "2 bits", how="snr")
    with pytest.raises(InspectError, match="allocate: evaluate returned str"):
        qgraph.allocate(prepared, "2 bits", lambda m: "0.5")
    with pytest.raises(InspectError, match="allocate: evaluate divided by zero for 'all layers at 8 bits'"):
        qgraph.allocate(prepared, "3 bits", lambda m: 1 / len([]))
    with pytest.raises(InspectError, match="evaluate gives nan for 2 alone at 2 bits"):
        qgraph.allocate(
            prepared,
            "3 bits",
            lambda m: math.nan if m[2].qgraph["weight"].spec.bits == 2 else 1.0,
            candidates=(2, 4),
        )
    assert {q.spec.bits for q in quantizer_modules(prepared)} == {8}
    with pytest.raises(InspectError, match="batches is empty"):
        qgraph.allocate(prepared, "3 bits", how="fisher", loss=lambda m, b: m(b).sum(), batches=[])
    with pytest.raises(InspectError, match="no tensor of one value"):
        qgraph.allocate(prepared, "3 bits", how="fisher", loss=lambda m, b: 1.0, batches=[x])
    learned = qgraph.prepare(model, qgraph.QConfig(weight=qgraph.QuantSpec(4, method="lsq")), x)
    with pytest.raises(ConfigError, match="whose learned step belongs to its bits"):
        qgraph.allocate(learned, "3 bits", how="snr")
    real = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(QGraphError, match=r"pip install 'qgraph\[allocate\]'"):
        qgraph.allocate(prepared, "3 bits", how="snr")


def test_a_width_has_the_scale_that_its_notation_has():
    model, x = net(), torch.randn(8, 16)
    for text in ("W8@tensor", "W1@tensor"):
        found = qgraph.allocation(qgraph.prepare(model, text, x), "2 bits", how="snr", candidates=(1, 2, 4))
        layers = qgraph.inspect(qgraph.prepare(model, found.config, x)).layers
        assert [layer.weight for layer in layers] == [
            qgraph.QConfig.parse(f"W{layer.weight.bits}@tensor").weight for layer in layers
        ]
    chosen = qgraph.QConfig(weight=qgraph.QuantSpec(8, granularity="tensor", scale="absmean"))
    found = qgraph.allocation(qgraph.prepare(model, chosen, x), "2 bits", how="snr", candidates=(1, 2))
    layers = qgraph.inspect(qgraph.prepare(model, found.config, x)).layers
    assert {layer.weight.scale for layer in layers} == {"absmean"}


def test_sparse_weights_keep_their_pattern_and_scheme():
    model, x = net(), torch.randn(8, 16)
    prepared = qgraph.prepare(model, "W4-2:4@tensor", x)
    found = qgraph.allocation(prepared, "2.6 bits", how="snr", candidates=(1, 1.58, 2, 4))
    mixed = qgraph.prepare(model, found.config, x)
    layers = qgraph.inspect(mixed).layers
    assert weight_bytes(mixed) == found.stored <= found.limit
    assert all(str(layer.sparsity) == "2:4" and layer.weight.scheme == "linear" for layer in layers)


def test_a_budget_of_latency():
    model, x = net(), torch.randn(2, 16)
    prepared = qgraph.prepare(model, "W8", x)
    specs = [q.spec for q in quantizer_modules(prepared)]
    plan = functools.partial(qgraph.allocation, prepared, evaluate=distance(model, x), lower_is_better=True)
    found = plan("50x latency", example_inputs=(x,), candidates=(2, 4, 8))
    assert {layer.bits for layer in found.layers} == {8} and found.limit is None
    assert found.latency is not None and 0 < found.latency <= found.latency_limit == 50
    assert all(time >= 0 for layer in found.layers for time in layer.milliseconds.values())  # whole microseconds
    assert "the float model's latency, allowed 50x" in str(found) and json.loads(json.dumps(found.to_dict()))["latency"]
    assert specs == [q.spec for q in quantizer_modules(prepared)] and prepared.training
    with pytest.raises(ConfigError, match=r"the fastest candidate.*4 bits \d+\.\d\dx, 8 bits .*Raise the budget"):
        plan("0.00001x latency", example_inputs=(x,), candidates=(4, 8))
    with pytest.raises(ConfigError, match="needs example_inputs="):
        plan("0.5x latency")


def test_one_width_where_no_mixture_is_better():
    model, x = net(), torch.randn(64, 16)
    prepared = qgraph.prepare(model, "W8@tensor", x[:2])
    evaluate = distance(model, x)
    size = weight_bytes(qgraph.prepare(model, "W3@tensor", x[:2]))
    found = qgraph.allocation(
        prepared, f"{8 * (size + 0.5) / sum(p.numel() for p in model.parameters() if p.dim() > 1)} bits", evaluate,
        lower_is_better=True,
    )  # fmt: skip
    mixed, uniform = (qgraph.prepare(model, config, x[:2]) for config in (found.config, "W3@tensor"))
    assert evaluate(mixed) <= evaluate(uniform) and (not found.uniform or found.stored == size)


def test_the_choice_by_noise_where_costs_do_not_add_up():
    model, x = net(), torch.randn(8, 16)
    prepared = qgraph.prepare(model, "W8@tensor", x)
    plan = functools.partial(qgraph.allocation, prepared, "4 bits", candidates=(2, 4, 8))
    by_noise = [layer.bits for layer in plan(how="snr").layers]

    def evaluate(candidate):
        bits = [candidate[i].qgraph["weight"].spec.bits for i in (0, 2, 4)]
        return 100.0 if bits == by_noise else bits[1] + bits[2] - 3 * bits[0]

    found = plan(evaluate)
    assert found.choice == "noise" and [layer.bits for layer in found.layers] == by_noise
    assert "by the noise of the weights" in str(found) and found.to_dict()["choice"] == "noise"
    alone = [max(layer.costs.values()) for layer in found.layers]
    assert alone[0] == 0 < min(alone[1:])
