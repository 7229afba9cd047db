"""`sensitivity`: the ranking, the switches, resuming, and what is said of a bad `evaluate`."""

from __future__ import annotations

import functools
import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qgraph
from qgraph.errors import InspectError
from tests.models import CNN, GPT


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def distance(model, inputs):
    """An `evaluate`: how far a model is from the float one."""
    with torch.no_grad():
        wanted = model.eval()(*inputs)
    model.train()

    def evaluate(prepared):
        prepared.eval()
        with torch.no_grad():
            return F.mse_loss(prepared(*inputs), wanted)

    return evaluate


def switches(prepared):
    return {path: m.enabled for path, m in prepared.named_modules() if hasattr(m, "enabled")}


def test_the_scores_are_those_of_the_switches_set_by_hand():
    model, inputs = CNN(), (torch.randn(4, 3, 16, 16),)
    prepared = qgraph.prepare(model, "A4W2-2:4", inputs)
    evaluate = distance(model, inputs)
    before = switches(prepared)
    alone = qgraph.sensitivity(prepared, evaluate, lower_is_better=True)
    without = qgraph.sensitivity(prepared, evaluate, how="float", lower_is_better=True)
    assert switches(prepared) == before and prepared.training
    assert alone.float_score == 0 and alone.quantized_score == without.quantized_score > 0
    assert {row.name for row in alone.layers} == {"conv1", "conv2", "fc"}
    assert {row.name: row.quantizers for row in alone.kinds} == {"weights": 3, "activations": 3, "sparsity": 3}
    by_name = {row.name: row for row in (*without.layers, *without.kinds)}
    with qgraph.disabled(prepared, "conv2*"):
        assert by_name["conv2"].score == float(evaluate(prepared))
    assert by_name["conv2"].cost == pytest.approx(without.quantized_score - by_name["conv2"].score)
    with qgraph.disabled(prepared, "conv1*"), qgraph.disabled(prepared, "fc*"):
        assert {row.name: row.score for row in alone.layers}["conv2"] == float(evaluate(prepared))
    with qgraph.disabled(prepared, "*.input"):
        assert by_name["activations"].score == float(evaluate(prepared))


def test_higher_is_better_by_default_and_costs_sort():
    model, inputs = CNN(), (torch.randn(4, 3, 16, 16),)
    prepared = qgraph.prepare(model, "W1", inputs)
    evaluate = distance(model, inputs)
    loss = qgraph.sensitivity(prepared, evaluate, lower_is_better=True)
    gain = qgraph.sensitivity(prepared, lambda m: -evaluate(m))
    assert [row.name for row in loss.layers] == [row.name for row in gain.layers]
    assert [row.cost for row in gain.layers] == sorted((row.cost for row in gain.layers), reverse=True)
    assert "quantized alone" in str(gain) and "higher is better" in str(gain)
    assert json.loads(json.dumps(gain.to_dict()))["layers"][0]["name"] == gain.worst.name


def test_what_is_switched_off_stays_off_and_tied_layers_share():
    inputs = (torch.randint(0, 33, (2, 9)),)
    model = GPT()
    prepared = qgraph.prepare(model, "W2", inputs)
    qgraph.set_enabled(prepared, False, "blocks.0*")
    before = switches(prepared)
    found = qgraph.sensitivity(prepared, distance(model, inputs), lower_is_better=True)
    names = {row.name for row in found.layers}
    assert switches(prepared) == before
    assert {"wte", "head", "blocks.1.mlp.0"} <= names and not any(name.startswith("blocks.0") for name in names)
    scores = {row.name: row.score for row in found.layers}
    assert scores["wte"] == scores["head"] > 0


def test_a_stopped_run_goes_on(tmp_path):
    model, inputs = CNN(), (torch.randn(4, 3, 16, 16),)
    prepared = qgraph.prepare(model, "A4W2", inputs)
    evaluate, path = distance(model, inputs), tmp_path / "scores.json"
    calls = []

    def counted(limit):
        def run(m):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(m)
            return evaluate(m)

        return run

    before = switches(prepared)
    with pytest.raises(KeyboardInterrupt):
        qgraph.sensitivity(prepared, counted(5), resume=path)
    assert switches(prepared) == before and len(json.loads(path.read_text())["scores"]) == 4
    found = qgraph.sensitivity(prepared, counted(100), resume=path)
    # Twice the base, to keep its activations and to see that they are right.
    assert len(calls) == 2 + 3 + 2 + 1 + 2 and found == qgraph.sensitivity(prepared, evaluate)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]
    done = qgraph.sensitivity(prepared, counted(0), resume=path)  # all is known: nothing runs
    assert done.layers == found.layers and not done.cached
    other = qgraph.prepare(model, "A4W3", inputs)
    with pytest.raises(InspectError, match=r"scores\.json belongs to another model: its config differ"):
        qgraph.sensitivity(other, evaluate, resume=path)
    with torch.no_grad():
        prepared.fc.weight.add_(1)
    with pytest.raises(InspectError, match="its weights differ"):
        qgraph.sensitivity(prepared, evaluate, resume=path)
    path.write_text("[]")
    with pytest.raises(InspectError, match="cannot be read"):
        qgraph.sensitivity(prepared, evaluate, resume=path)


def test_a_bar_is_shown_on_a_terminal_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    model, inputs = CNN(), (torch.randn(4, 3, 16, 16),)
    prepared, evaluate = qgraph.prepare(model, "W2", inputs), distance(model, inputs)
    monkeypatch.setenv("TERM", "xterm")
    for terminal, progress, shown in (
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
    ):
        monkeypatch.setattr("sys.stderr", terminal)
        qgraph.sensitivity(prepared, evaluate, progress=progress)
        assert ("sensitivity" in terminal.getvalue()) == shown


def test_a_model_that_captures_at_its_first_call():
    model, inputs = CNN(), (torch.randn(4, 3, 16, 16),)
    found = qgraph.sensitivity(qgraph.prepare(model, "W2"), distance(model, inputs), lower_is_better=True)
    assert {row.name for row in found.layers} == {"conv1", "conv2", "fc"}


def test_wrong_use_is_said():
    model, inputs = CNN(), (torch.randn(4, 3, 16, 16),)
    prepared = qgraph.prepare(model, "W2", inputs)
    with pytest.raises(InspectError, match="is not prepared"):
        qgraph.sensitivity(model, lambda m: 1.0)
    with pytest.raises(InspectError, match="found how='alone'"):
        qgraph.sensitivity(prepared, lambda m: 1.0, how="alone")
    with pytest.raises(InspectError, match="nan, for the quantized model"):
        qgraph.sensitivity(
            prepared, lambda m: math.nan if m.conv1.qgraph["weight"].enabled and m.fc.qgraph["weight"].enabled else 1.0
        )
    for value in (None, "0.5", torch.zeros(2)):
        with pytest.raises(InspectError, match="Expected a number"):
            qgraph.sensitivity(prepared, lambda m, value=value: value)
    batches = iter([torch.randn(2, 3, 16, 16)])

    def mean_over(m):
        found = [float(m(batch).detach().sum()) for batch in batches]
        return sum(found) / len(found)

    with pytest.raises(InspectError, match=r"divided by zero for 'float'.* does its loader hold any data"):
        qgraph.sensitivity(prepared, mean_over)
    with pytest.raises(InspectError, match="inf for the float model"):
        qgraph.sensitivity(prepared, lambda m: math.inf)

    def trains(m):
        with torch.no_grad():
            m.fc.weight.add_(0.1)
        return 1.0

    with pytest.raises(InspectError, match="changed the weights"):
        qgraph.sensitivity(prepared, trains)
    qgraph.set_enabled(prepared, False)
    with pytest.raises(InspectError, match="no quantizer of the model is active"):
        qgraph.sensitivity(prepared, lambda m: 1.0)


def test_the_gradient_ranks_as_evaluations_do():
    from sklearn.datasets import load_digits
    from torch import nn

    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for i in range(200):
        optimizer.zero_grad()
        rows = slice(i * 64 % 1024, i * 64 % 1024 + 64)
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    prepared = qgraph.prepare(model, "A8W6", x[:2])
    before = switches(prepared)

    def loss(m, batch):
        return F.cross_entropy(m(batch[0]), batch[1])

    def evaluate(m):
        with torch.no_grad():
            return loss(m.eval(), (x[1024:1324], y[1024:1324]))

    batches = ((x[i : i + 50], y[i : i + 50]) for i in range(1024, 1324, 50))
    real = qgraph.sensitivity(prepared, evaluate, lower_is_better=True)
    found = qgraph.sensitivity(prepared, how="gradient", loss=loss, batches=batches)
    costs = {row.name: row.cost for row in real.layers}
    for row in found.layers:
        assert row.cost == pytest.approx(costs[row.name], rel=0.1, abs=0.05 * max(costs.values())), row.name
    assert found.float_score == pytest.approx(real.float_score, rel=1e-5)
    assert found.quantized_score == pytest.approx(real.quantized_score, rel=1e-5)
    assert switches(prepared) == before and prepared.training and found.lower_is_better and not found.cached
    assert all(parameter.grad is None for parameter in prepared.parameters())


@pytest.mark.parametrize("how", ["quantized", "float"])
def test_only_those_that_the_gradient_ranks_first_are_evaluated(how):
    from torch import nn

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.cut = nn.ModuleList(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 8)

        def forward(self, x):
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x + self.cut(x).detach()  # which no gradient ranks

    torch.manual_seed(0)
    x, y = torch.randn(5, 12, 8), torch.randn(5, 12, 8)
    model = Chain()
    with torch.no_grad():
        model.layers[3].weight[0, 0] = 40  # one value stretches the scale of its row
        model.layers[1].weight[:, 0] = 20
    prepared = qgraph.prepare(model, "W3", (x,))
    runs = []

    def evaluate(m):
        runs.append(0)
        with torch.no_grad():
            return F.mse_loss(m(x), y)

    def loss(m, batch):
        return F.mse_loss(m(batch[0]), batch[1])

    whole = qgraph.sensitivity(prepared, evaluate, how=how, lower_is_better=True)
    runs.clear()
    found = qgraph.sensitivity(
        prepared, evaluate, how=how, lower_is_better=True, loss=loss, batches=iter([(x, y)]), first=2, cache_bytes=0
    )
    order = [row.name for row in qgraph.sensitivity(prepared, how="gradient", loss=loss, batches=[(x, y)]).layers]
    evaluated = {row.name: row.score for row in found.layers}
    unranked = {row.name for row in whole.layers} - set(order)
    assert unranked == {"cut"} and evaluated.keys() == {*order[:2], "cut"} and found.kinds == whole.kinds
    assert evaluated == {row.name: row.score for row in whole.layers if row.name in evaluated}
    assert len(runs) == 2 + len(evaluated)  # float, and quantized, which is what the only kind costs too
    assert found.cached.endswith("not evaluated, behind by gradient: " + ", ".join(order[2:]))


class Convolutions(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["quantized", "float"])
def test_a_sample_of_the_calls_estimates_the_costs(how, tmp_path):
    torch.manual_seed(0)
    model = CNN().eval()
    batches = [torch.randn(4, 3, 16, 16) for _ in range(6)]
    prepared = qgraph.prepare(model, "W2", (batches[0],))
    with torch.no_grad():
        wanted = [model(x) for x in batches]

    def evaluate(m, chosen=range(6)):
        m.eval()
        with torch.no_grad():
            return sum(F.mse_loss(m(x), y) for i, (x, y) in enumerate(zip(batches, wanted, strict=True)) if i in chosen)

    rank = functools.partial(qgraph.sensitivity, prepared, evaluate, how=how, lower_is_better=True)
    with Convolutions() as all_calls:
        whole = rank()
    with Convolutions() as two_calls:
        sampled = rank(calls=2, resume=tmp_path / "scores.json")
    assert two_calls.count < all_calls.count
    assert "by 2 of the calls" in sampled.cached
    assert (sampled.float_score, sampled.quantized_score) == (whole.float_score, whole.quantized_score)
    by_hand = qgraph.sensitivity(prepared, functools.partial(evaluate, chosen=(1, 4)), how=how, lower_is_better=True)
    for estimate, part in zip(sampled.layers, by_hand.layers, strict=True):
        assert estimate.name == part.name and estimate.cost == pytest.approx(3 * part.cost, rel=1e-4)
    for row, same in zip(rank(calls=6).layers, whole.layers, strict=True):
        assert row.name == same.name and row.cost == pytest.approx(same.cost, rel=1e-4)
    assert rank(calls=2, resume=tmp_path / "scores.json").layers == sampled.layers
    assert [row.name for row in rank(resume=tmp_path / "scores.json").layers] == [row.name for row in whole.layers]


def test_wrong_use_of_the_gradient_is_said():
    model, inputs = CNN(), (torch.randn(4, 3, 16, 16),)
    prepared = qgraph.prepare(model, "W2", inputs)
    gradient = functools.partial(qgraph.sensitivity, prepared, how="gradient", batches=[inputs])
    with pytest.raises(InspectError, match=r"Leave resume= out"):
        gradient(loss=lambda m, b: m(*b).sum(), resume="scores.json")
    with pytest.raises(InspectError, match=r"Leave first= out"):
        gradient(loss=lambda m, b: m(*b).sum(), first=3)
    with pytest.raises(InspectError, match=r"Leave calls= out"):
        gradient(loss=lambda m, b: m(*b).sum(), calls=3)
    with pytest.raises(InspectError, match=r"found calls=0. Expected a number of calls"):
        qgraph.sensitivity(prepared, lambda m: 1.0, calls=0)
    with pytest.raises(InspectError, match=r"found first=0. Expected a number of layers"):
        qgraph.sensitivity(prepared, lambda m: 1.0, first=0)
    with pytest.raises(InspectError, match=r"needs loss=.* and batches="):
        qgraph.sensitivity(prepared, lambda m: 1.0, first=3)
    with pytest.raises(InspectError, match="needs evaluate"):
        qgraph.sensitivity(prepared)
    with pytest.raises(InspectError, match=r"needs loss=.* and batches="):
        gradient()
    with pytest.raises(InspectError, match=r"needs loss=.* and batches="):
        gradient(loss=lambda m, b: m(*b).sum(), batches=[])
    with pytest.raises(InspectError, match=r"loss gives nan|loss gives tensor\(nan"):
        gradient(loss=lambda m, b: m(*b).sum() * math.nan)
    with pytest.raises(InspectError, match="Expected one finite number"):
        gradient(loss=lambda m, b: m(*b))
    with pytest.raises(InspectError, match="without a gradient"):
        gradient(loss=lambda m, b: m(*b).sum().detach())
