"""`divergence`: the distance from the float model, how `sensitivity` and `allocate` take it, and wrong use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraph
from qgraph.errors import ConfigError, InspectError
from qgraph.graph import quantizer_modules


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(16, 24), nn.Dropout(), nn.Linear(24, 8)

    def forward(self, x, scale=1.0):
        return {"logits": self.last(self.drop(torch.relu(self.first(x * scale)))), "other": x}


class Listed(Net):
    def forward(self, x):
        return []


def test_it_is_the_mean_over_rows_of_the_distance_from_the_float_model():
    model, x = Net(), torch.randn(20, 16)
    prepared = qgraph.prepare(model, "A4W2", x[:2])
    distance = qgraph.divergence(prepared, iter([x[:6], (x[6:11],), {"x": x[11:], "scale": 1.0}]))
    with torch.no_grad():
        ours, theirs = (m.eval()(x)["logits"].double().log_softmax(1) for m in (prepared, model))
    expected = (theirs.exp() * (theirs - ours)).sum(1).mean()
    prepared.train()
    assert distance(prepared) == pytest.approx(float(expected), rel=1e-4) and prepared.training
    with qgraph.disabled(prepared):
        assert distance(prepared) == 0
    squared = qgraph.divergence(prepared, [x], loss="mse", select=lambda out: out["logits"][:, :2])
    with torch.no_grad():
        expected = F.mse_loss(prepared.eval()(x)["logits"][:, :2], model(x)["logits"][:, :2])
    assert squared(prepared) == pytest.approx(float(expected))


def test_sensitivity_and_allocate_know_that_lower_is_better():
    model, x = Net(), torch.randn(64, 16)
    prepared = qgraph.prepare(model, "W2@tensor", x[:2])
    report = qgraph.sensitivity(prepared, qgraph.divergence(prepared, [x]))
    assert report.lower_is_better and report.float_score == 0 and all(row.cost > 0 for row in report.layers)
    found = qgraph.allocation(prepared, "6 bits", qgraph.divergence(prepared, [x]), candidates=(2, 4, 8))
    assert all(layer.costs[2] > layer.costs[4] > 0 for layer in found.layers)


def test_bits_are_right_where_the_labels_of_a_few_samples_reward_noise():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    x, unseen = torch.randn(8, 32), torch.randn(512, 32)
    with torch.no_grad():
        model[2].weight[0, 0] = 3.0  # stretches its grid: it needs more bits than the others
        model[4].weight *= 20
        rough = qgraph.QConfig.parse("W8@tensor").with_rules(qgraph.Rule("2", "W1@tensor"))
        labels = qgraph.prepare(model, rough, x[:2]).eval()(x).argmax(1)  # what its noise happens to say
    prepared = qgraph.prepare(model, "W8@tensor", x[:2])

    def loss(candidate):
        with torch.no_grad():
            return F.cross_entropy(candidate.eval()(x), labels)

    by_loss, by_distance = (
        qgraph.allocation(prepared, "5 bits", evaluate, lower_is_better=True, candidates=(1, 2, 3, 4, 6, 8))
        for evaluate in (loss, qgraph.divergence(prepared, [x]))
    )
    assert by_loss.layers[1].bits < by_distance.layers[1].bits
    far = qgraph.divergence(prepared, [unseen])
    good, bad = (far(qgraph.prepare(model, found.config, x[:2])) for found in (by_distance, by_loss))
    assert 2 * good < bad


def test_wrong_use_is_said():
    model, x = Net(), torch.randn(4, 16)
    prepared = qgraph.prepare(model, "W2", x)
    with pytest.raises(InspectError, match="divergence: Net is not prepared"):
        qgraph.divergence(model, [x])
    with pytest.raises(InspectError, match=r"found no batches.*generator"):
        qgraph.divergence(prepared, [])
    with pytest.raises(InspectError, match="found a batch of type str"):
        qgraph.divergence(prepared, ["x"])
    with pytest.raises(ConfigError, match="divergence: loss is 'kl', 'mse'"):
        qgraph.divergence(prepared, [x], loss="l1")
    with pytest.raises(ConfigError, match="divergence: no tensor to compare in an output of type list"):
        qgraph.divergence(qgraph.prepare(Listed(), "W2", x), [x])
    with pytest.raises(ConfigError, match="select returned str"):
        qgraph.divergence(prepared, [x], select=str)
    other = qgraph.prepare(nn.Linear(16, 3), "W2", x)
    with pytest.raises(InspectError, match=r"found an output of \(4, 3\), expected one of \(4, 8\)"):
        qgraph.divergence(prepared, [x])(other)
    assert all(quantizer.enabled for quantizer in quantizer_modules(prepared))
