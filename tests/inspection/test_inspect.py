"""`qgraph.inspect` on eager and prepared models: rows, what stays float, coverage, text, data, no trace."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraph
from qgraph.config import QConfig, QuantSpec, Rule
from qgraph.graph import STATE, coverage, states
from tests.models import CASES


def prepared_case(name, config="A8W4@8", example=True):
    torch.manual_seed(0)
    case = CASES[name]
    return qgraph.prepare(case.make(), config, case.inputs(0) if example else None)


def by_site(found):
    return {layer.site: layer for layer in found.layers}


# -- rows ----------------------------------------------------------------------------------------------------


def test_a_cnn_by_hand():
    found = qgraph.inspect(prepared_case("cnn", "A4W2"))
    rows = [(r.site, r.op, r.shape, r.spec, r.groups, r.bytes_before, r.bytes_after) for r in found.layers]
    assert rows == [
        ("conv1.weight", "conv2d", (8, 3, 3, 3), "A4W2", "8 x 27", 216 * 4, 54 + 8 * 8),
        ("conv2.weight", "conv2d", (12, 8, 3, 3), "A4W2", "12 x 72", 864 * 4, 216 + 12 * 8),
        ("fc.weight", "linear", (5, 12), "A4W2", "5 x 12", 60 * 4, 15 + 5 * 8),
    ]
    totals = found.totals
    assert (totals.weights_quantized, totals.bytes_before) == (1140, 4560)
    assert totals.bytes_after == 118 + 312 + 55
    assert totals.bits_per_weight == pytest.approx(8 * 485 / 1140)
    assert totals.float_bytes == 4 * (8 + 12 + 5 + 2 * 8 + 2 * 12)  # biases, two norms
    assert totals.model_bytes_before == 4560 + totals.float_bytes
    assert totals.model_bytes_after == 485 + totals.float_bytes
    assert all(row.where.rpartition(":")[0].endswith("models.py") for row in found.layers)


@pytest.mark.parametrize("name", CASES)
def test_rows_and_coverage_agree_for_every_model(name):
    prepared = prepared_case(name)
    found = qgraph.inspect(prepared)
    assert found.coverage.sites == len(found.layers) >= coverage(prepared).sites > 0
    assert found.coverage.sites_quantized == len(found.layers)
    assert len(by_site(found)) == len(found.layers)
    for row in found.layers:
        assert (row.error_db is None) == (row.tied_to is not None)
        assert row.error_db is None or 10 < row.error_db < 60
    covered = {name for name, _ in prepared.named_parameters()} - {item.name for item in found.floats}
    assert covered and all(dict(prepared.named_parameters())[name].dim() > 1 for name in covered)


def test_tied_weights_are_counted_once():
    found = qgraph.inspect(prepared_case("gpt"))
    rows = by_site(found)
    head, table = rows["head.weight"], rows["wte.weight"]
    assert (head.tied_to, head.name, head.op, table.op) == ("wte.weight", "wte.weight", "linear", "embedding")
    assert (head.bytes_before, head.bytes_after, head.error_db) == (0, 0, None)
    unique = {id(p): p for p in prepared_case("gpt").parameters()}.values()
    assert found.totals.model_bytes_before == sum(4 * p.numel() for p in unique)
    assert "head.weight = wte.weight" in str(found)


def test_rows_come_in_the_order_of_use_and_the_ends_are_named():
    found = qgraph.inspect(prepared_case("unet"))
    names = [row.path for row in found.layers]
    assert names == ["down.0", "down.1", "mid", "up.0", "fuse.0", "up.1", "fuse.1", "head"]
    assert (found.first.path, found.last.path) == ("down.0", "head")
    assert "first layer down.0.weight (A8W4@8); last layer head.weight (A8W4@8)" in str(found)


def test_recurrent_layers_have_a_row_a_matrix():
    rows = by_site(qgraph.inspect(prepared_case("recurrent")))
    assert sum(row.op == "lstm" for row in rows.values()) == 8 and sum(r.op == "gru" for r in rows.values()) == 2
    assert rows["lstm.weight_ih_l1"].bytes_before == 48 * 24 * 4


def test_a_recurrent_layer_has_its_activation_at_the_weight_that_meets_the_input():
    rows = by_site(qgraph.inspect(prepared_case("recurrent")))
    assert [name for name, row in rows.items() if row.op in ("lstm", "gru") and row.activation is not None] == [
        "lstm.weight_ih_l0",
        "gru.weight_ih_l0",
    ]


def test_a_parametrized_weight_is_measured_as_it_is_used():
    prepared = prepared_case("parametrized", "W3")
    row = next(r for r in qgraph.inspect(prepared).layers if r.path == "0")
    weight = F.softplus(prepared[0].parametrizations.weight.original.detach())
    quantizer = prepared[0].qgraph["parametrizations__weight__derived"]
    noise = (quantizer(weight) - weight).detach().square().sum()
    assert row.error_db == pytest.approx(float(10 * torch.log10(weight.square().sum() / noise)), rel=1e-4)
    assert [item.name for item in qgraph.inspect(prepared).floats] == ["0.bias", "2.bias"]


def test_learned_steps():
    config = QConfig(weight=QuantSpec(3, method="lsq"), activation=QuantSpec(8, granularity="token"))
    for name in ("cnn", "cross_attention"):
        found = qgraph.inspect(prepared_case(name, config))
        assert all(row.spec == "A8@token W3@channel-lsq" and row.error_db > 5 for row in found.layers)
        assert not [item for item in found.floats if "qgraph" in item.name]


def test_exact_weights_are_said_to_be_so():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0, 2.0], [0, 3.0, 4.0, 0]]))
    found = qgraph.inspect(qgraph.prepare(model, "2:4", (torch.ones(1, 4),)))
    assert found.layers[0].error_db == math.inf
    assert "exact" in str(found)
    assert (found.to_dict()["layers"][0]["error_db"], found.to_dict()["layers"][0]["exact"]) == (None, True)


class Listed(nn.Module):
    """Weights in a list, one of them used in two ways."""

    def __init__(self):
        super().__init__()
        self.ws = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])

    def forward(self, x):
        for w in self.ws:
            x = x @ w
        return torch.einsum("bi,ij->bj", x, self.ws[0])


def test_a_weight_used_in_two_ways_has_a_row_each_and_is_counted_once():
    torch.manual_seed(0)
    found = qgraph.inspect(qgraph.prepare(Listed(), "W4", (torch.ones(2, 4),)))
    rows = [(row.site, row.op, row.tied_to) for row in found.layers]
    assert sorted(rows, key=str) == [
        ("ws.0", "einsum", "ws.0"),
        ("ws.0", "matmul", None),
        ("ws.1", "matmul", None),
    ]
    assert found.totals.weights == 32 and "ws.0 again" in str(found)


# -- what stays float ----------------------------------------------------------------------------------------


class Passing(nn.Module):
    """A parameter that is handed to a child, which multiplies by it."""

    def __init__(self):
        super().__init__()
        self.child, self.w = Taking(), nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6))

    def forward(self, x):
        return self.child(x, weight=self.w)


class Taking(nn.Module):
    def forward(self, x, weight):
        return F.linear(x, weight)


def test_a_parameter_that_is_passed_to_a_child_is_covered_and_measured():
    found = qgraph.inspect(qgraph.prepare(Passing(), "W4", (torch.ones(2, 6),)))
    (row,) = found.layers
    assert (row.path, row.shape, row.quantized) == ("child", (4, 6), True) and row.error_db > 15
    assert found.floats == ()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.skip, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.position = nn.Parameter(torch.zeros(3, 4))
        self.unused = nn.Parameter(torch.zeros(2, 2))
        self.temperature = nn.Parameter(torch.ones(()))
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.skip(self.norm(self.a(x) + self.position)) * self.gain / self.temperature


def test_every_float_parameter_has_its_reason():
    config = QConfig.parse("W4").with_rules(Rule("skip", None))
    found = qgraph.inspect(qgraph.prepare(Odd(), config, (torch.ones(3, 4),)))
    assert {item.name: item.reason for item in found.floats} == {
        "position": "used, but no weight of a site",
        "unused": "never used in the captured runs",
        "temperature": "a scalar",
        "gain": "1-D",
        "a.bias": "bias",
        "skip.bias": "bias",
        "norm.weight": "norm",
        "norm.bias": "norm",
    }
    skip = by_site(found)["skip.weight"]
    assert (skip.reason, skip.spec, skip.bytes_after, skip.error_db) == (
        "a rule leaves it float",
        "float",
        64,
        None,
    )
    text = str(found)
    assert "1 of 2 sites quantized" in text and "a rule leaves it float: 1 (64 bytes): skip.weight" in text
    assert found.totals.float_bytes == 64 + 4 * (12 + 4 + 1 + 4 + 4 + 4 + 4 + 4)


def test_before_the_first_call_the_layers_stand_ready():
    prepared = qgraph.prepare(Odd(), "W4")
    found = qgraph.inspect(prepared)
    assert [(r.site, r.captured, r.spec) for r in found.layers] == [
        ("a.weight", False, "W4"),
        ("skip.weight", False, "W4"),
    ]
    assert all(row.error_db > 10 for row in found.layers)
    assert {i.name: i.reason for i in found.floats}["position"] == "not captured yet"
    assert found.coverage.graphs == 0 and "nothing is captured yet" in str(found) and found.graphs == {}
    prepared(torch.ones(3, 4))
    assert all(row.captured for row in qgraph.inspect(prepared).layers)


def test_activations_only_say_why_the_weights_are_float():
    found = qgraph.inspect(prepared_case("cnn", "A8"))
    assert {row.reason for row in found.layers} == {"the config quantizes no weights"}
    assert {row.spec for row in found.layers} == {"A8"} and found.totals.weights_quantized == 0


# -- coverage ------------------------------------------------------------------------------------------------


def test_opaque_modules_are_named_with_reason_and_line():
    found = qgraph.inspect(prepared_case("branching"))
    assert {o.path for o in found.coverage.opaque} == {""}
    line = next(line for line in found.text(250).splitlines() if line.startswith("stays Python"))
    assert line.startswith("stays Python (eval and train): the model (Branching): reads tensor data in Python")
    assert "models.py:" in line
    assert by_site(found)["w"].captured is False and by_site(found)["w"].error_db > 10
    assert "* in no graph, quantized while Python runs: 1: w" in found.text(250)
    assert "* not run in the captured calls: 1: b.weight" in found.text(250)


def test_guard_misses_are_counted():
    prepared = prepared_case("cnn")
    assert "calls that no graph held for: 0" in str(qgraph.inspect(prepared))
    prepared(torch.randn(2, 3, 16, 16).double().float().requires_grad_())
    prepared.eval()(torch.randn(1, 3, 20, 20))
    found = qgraph.inspect(prepared)
    assert f"calls that no graph held for: {coverage(prepared).guard_misses}" in str(found)
    assert found.coverage == coverage(prepared)


def test_modules_alike_that_stay_python_share_a_line():
    class Reading(nn.Module):
        def forward(self, x):
            return x * x.max().item()

    model = nn.Sequential(*(Reading() for _ in range(9)), nn.Linear(3, 3))
    text = qgraph.inspect(qgraph.prepare(model, "W4", (torch.ones(2, 3),))).text(200)
    (line,) = [line for line in text.splitlines() if line.startswith("stays Python")]
    assert line.startswith("stays Python (eval and train): 9 times: 0, 1, 2, 3, 4, 5 and 3 more (Reading): ")


# -- parts and wrappers ---------------------------------------------------------------------------------------


def test_a_part_of_a_prepared_model_keeps_its_names():
    prepared = prepared_case("gpt")
    whole = by_site(qgraph.inspect(prepared))
    part = qgraph.inspect(prepared.blocks[1]["attn"])
    assert part.title.startswith("blocks.1.attn (Attention) of GPT: prepared with")
    assert [row.site for row in part.layers] == ["blocks.1.attn.qkv.weight", "blocks.1.attn.proj.weight"]
    assert all(row == whole[row.site] for row in part.layers)
    assert [item.name for item in part.floats] == ["blocks.1.attn.qkv.bias", "blocks.1.attn.proj.bias"]
    assert set(part.graphs) == {"blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.attn.proj"}
    assert "blocks.1.attn:q" in part.to_networkx()
    (head,) = qgraph.inspect(prepared.head).layers
    assert head.name == "wte.weight" and head.error_db == whole["wte.weight"].error_db


def test_wrappers_are_looked_into():
    prepared = prepared_case("twice")
    expected = qgraph.inspect(prepared).to_json()
    for wrapped in (nn.Sequential(prepared), nn.DataParallel(prepared), torch.compile(prepared, backend="eager")):
        assert qgraph.inspect(wrapped).to_json() == expected
    pair = nn.ModuleDict({"g": prepared, "d": prepared_case("twice")})
    with pytest.raises(qgraph.InspectError, match="ModuleDict holds 2 prepared models, at g, d"):
        qgraph.inspect(pair)


# -- eager ---------------------------------------------------------------------------------------------------


def test_an_eager_model_is_said_to_be_float():
    torch.manual_seed(0)
    model = CASES["gpt"].make()
    found = qgraph.inspect(model)
    assert found.kind == "eager" and found.title == "GPT: not prepared, everything is float"
    assert len(found.layers) == 11 and {row.spec for row in found.layers} == {"float"}
    assert by_site(found)["head.weight"].tied_to == "wte.weight"
    assert found.totals.model_bytes_before == sum(4 * p.numel() for p in model.parameters())
    assert {item.reason for item in found.floats} == {"norm", "bias"}
    assert (found.coverage.captured, found.coverage.sites_quantized, found.graphs) == (0, 0, {})
    assert "none quantized" in str(found)


def test_an_eager_model_of_its_own_parameters():
    found = qgraph.inspect(CASES["functional"].make())
    assert [(r.site, r.op, r.shape) for r in found.layers] == [
        ("w", "parameter", (6, 8)),
        ("k", "parameter", (4, 1, 3, 3)),
        ("m", "parameter", (6, 5)),
        ("e", "parameter", (5, 4)),
    ]


def test_models_without_weights_and_lazy_ones():
    for model in (nn.ReLU(), qgraph.prepare(nn.ReLU(), "W4", (torch.ones(2),))):
        found = qgraph.inspect(model)
        assert found.layers == () and found.first is None
        assert "0 sites" in str(found)
    lazy = nn.Sequential(nn.LazyLinear(3))
    assert {item.reason for item in qgraph.inspect(lazy).floats} == {"not initialized yet (lazy)"}


# -- text and data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", [80, 120, 160])
def test_text_fits_its_width_and_loses_nothing(name, width):
    found = qgraph.inspect(prepared_case(name, "A4W2-2:4@8"))
    text = found.text(width)
    assert max(map(len, text.splitlines())) <= width
    joined = text.replace("\n", "")
    for row in found.layers:
        assert width == 80 or row.site in text
        assert f"{row.bits_per_weight:.2f}" in joined and (row.tied_to or f"{row.bytes_after:,}" in joined)


def test_the_width_of_the_terminal_is_used(monkeypatch):
    found = qgraph.inspect(prepared_case("cnn"))
    monkeypatch.setenv("COLUMNS", "100")
    assert str(found) == found.text(100)
    monkeypatch.setenv("COLUMNS", "20")
    assert str(found) == found.text(80)


@pytest.mark.parametrize("name", CASES)
def test_data_is_json_and_the_same_each_time(name):
    prepared = prepared_case(name)
    first, second = qgraph.inspect(prepared), qgraph.inspect(prepared)
    assert first.to_json() == second.to_json() and str(first) == str(second)
    data = json.loads(first.to_json())
    assert data == first.to_dict()
    assert [row["site"] for row in data["layers"]] == [row.site for row in first.layers]
    assert data["coverage"]["sites"] == len(data["layers"])


def test_copies_and_pickles_look_alike():
    prepared = prepared_case("gpt")
    expected = qgraph.inspect(prepared).to_json()
    assert qgraph.inspect(copy.deepcopy(prepared)).to_json() == expected
    assert qgraph.inspect(pickle.loads(pickle.dumps(prepared))).to_json() == expected


# -- no trace ------------------------------------------------------------------------------------------------


def everything(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    gradients = [p.grad for p in model.parameters()]
    counts = [(state.misses, len(state.variants), len(state.opaque)) for _, _, state in states(model)]
    return tensors, modes, gradients, counts, [name for name, _ in model.named_modules()]


def randomness():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def spectral():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("name", [*CASES, "spectral"])
def test_looking_leaves_no_trace(name):
    torch.manual_seed(0)
    prepared = prepared_case(name) if name in CASES else qgraph.prepare(spectral(), "W4", (torch.randn(2, 6),))
    prepared.train()
    next(prepared.children(), prepared).eval()
    before, random_before = everything(prepared), randomness()
    found = qgraph.inspect(prepared)
    str(found), found.graphs, found.to_networkx(), found.to_json()
    after = everything(prepared)
    assert randomness() == random_before
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])


def test_switched_off_quantizers_are_measured_all_the_same():
    prepared = prepared_case("cnn")
    with qgraph.disabled(prepared):
        found = qgraph.inspect(prepared)
    assert [r.error_db for r in found.layers] == [r.error_db for r in qgraph.inspect(prepared).layers]


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [3, None, [nn.Linear(2, 2)], nn.Linear])
def test_a_wrong_type_is_an_error_that_says_what_to_pass(wrong):
    with pytest.raises(qgraph.InspectError, match=r"inspect: found \w+\. Expected a torch\.nn\.Module or the path"):
        qgraph.inspect(wrong)


def test_the_notes_of_the_standard_passes_are_data_not_text():
    found = qgraph.inspect(prepared_case("cnn"))
    assert {note.pass_name for note in found.notes} >= {"quantize-weights", "quantize-activations"}
    assert "note:" not in str(found)
    assert STATE not in found.to_json()
