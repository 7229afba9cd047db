"""Tensors that a forward writes into: what they derive from then; weights are quantized as they are where used."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qgraph
from qgraph import QConfig, QuantSpec
from qgraph.graph import coverage, sites


def scattered(x, w):
    return torch.zeros(x.shape[0], 4).scatter_(1, x.argmax(1, keepdim=True), 1.0) @ w


def assigned(x, w):
    rows = torch.zeros(x.shape[0], 4)
    rows[:, :2] = x[:, 2:]
    return rows.flatten(1) @ w


def through_a_view(x, w):
    rows = torch.zeros(x.shape[0], 4)
    flat = rows.view(-1)
    flat[:4] = x[0]
    return torch.einsum("bi,ij->bj", rows, w)


def given_out(x, w):
    rows = torch.zeros(x.shape[0], 4)
    torch.mul(x, 2, out=rows)
    return rows @ w


def assembled(x, w):
    whole = torch.empty(2, 2, w.shape[1])
    whole[0], whole[1] = w[:2], w[2:] * 2
    return F.linear(x, whole.flatten(0, 1))


def clipped(x, w):
    w.data[0].clamp_(-0.5, 0.5)
    return F.linear(x, w)


def normalized(x, w):
    with torch.no_grad():
        w.copy_(F.normalize(w + 1, dim=1))
    return x @ w.t()


def replaced(x, w):
    w.data = w.data * 1.5
    w.data[1] = 0
    return F.linear(x, w)


def between(x, w):
    before = F.linear(x, w)
    with torch.no_grad():
        w[1].add_(1.0)
    return before.detach() + F.linear(x, w)


WRITES = [scattered, assigned, through_a_view, given_out, assembled, clipped, normalized, replaced, between]


class Writes(nn.Module):
    def __init__(self, write, python=False):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.write, self.python, self.calls = nn.Parameter(torch.randn(4, 4)), write, python, 0

    def forward(self, x):
        if self.python:
            self.calls += 1  # no graph holds it
        return self.write(x if self.write is not given_out else x.detach(), self.w)


@pytest.mark.parametrize("config", ["W2", "A4W1-2:4"])
@pytest.mark.parametrize("write", WRITES)
def test_a_graph_quantizes_what_python_does(write, config):
    x, kept = torch.randn(3, 4), Writes(write).state_dict()
    graph, python = (qgraph.prepare(Writes(write, python), config, x) for python in (False, True))
    assert coverage(python).opaque and not coverage(graph).opaque
    assert [site.name for site in sites(graph)] == [site.name for site in sites(python)]
    assert coverage(graph).sites == coverage(python).sites_quantized == 1
    for training in (False, True):
        results = []
        for model in (graph, python):
            model.load_state_dict(kept)
            model.train(training).zero_grad()
            out = model(x)
            out.sum().backward()
            results.append((out, model.w.grad, model.w))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        with qgraph.disabled(graph):
            graph.load_state_dict(kept)
            assert torch.equal(graph(x), Writes(write)(x))


def test_a_learned_step_starts_from_the_weight_that_was_assembled():
    model = Writes(assembled)
    config = QConfig(weight=QuantSpec(4, method="lsq"))
    prepared = qgraph.prepare(model, config, torch.randn(3, 4))
    same = qgraph.prepare(Writes(assembled, python=True), config, torch.randn(3, 4))
    steps = [[q.step for q in m.modules() if getattr(q, "step", None) is not None] for m in (prepared, same)]
    assert len(steps[0]) == 1 and torch.equal(steps[0][0], steps[1][0]) and bool((steps[0][0] > 0).all())
    assert torch.equal(prepared.w, model.w)


class Replaces(nn.Module):
    """A codebook that its training gives new parameters."""

    def __init__(self):
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x):
        out = self.fc(x @ self.w)
        if self.training:
            self.w = nn.Parameter(self.w * 0.9)
            self.fc.weight.data.mul_(1.1)
        return out


def test_prepare_takes_back_what_its_runs_do_to_parameters():
    model = Replaces()
    prepared = qgraph.prepare(model, "W4", torch.randn(3, 4))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in prepared.state_dict().items())
