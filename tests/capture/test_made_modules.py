"""Modules that a forward makes, or that are put into a prepared model: quantized and counted, and none is left over
from the examples' runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qgraph
from qgraph.graph import coverage, sites


class Lazy(nn.Module):
    """Makes its head at its first call."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 4), None

    def forward(self, x):
        h = torch.relu(self.fc(x))
        if self.head is None:
            torch.manual_seed(1)
            self.head = nn.Linear(4, 2)
        return self.head(h)


class Growing(nn.Module):
    """Gets one layer more at each call in train mode, up to three."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x):
        if self.training and len(self.layers) < 3:
            torch.manual_seed(len(self.layers))
            self.layers.append(nn.Linear(6, 6))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize(("kind", "last"), [(Lazy, "head.weight"), (Growing, "layers.2.weight")])
def test_modules_made_in_forward(kind, last, example):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(3, 6)
    prepared, eager = qgraph.prepare(model, "W2", x if example else None), copy.deepcopy(model)
    assert list(prepared.state_dict()) == list(model.state_dict())
    for training in (False, True, True, False, True):
        with qgraph.disabled(prepared):
            assert torch.equal(prepared.train(training)(x), eager.train(training)(x))
    assert [n for n, _ in prepared.named_parameters()] == [n for n, _ in eager.named_parameters()]
    quantized = prepared(x)
    found = {layer.name: layer.weight for layer in qgraph.inspect(prepared).layers}
    assert found[last] is not None
    with qgraph.disabled(prepared, last):
        assert not torch.equal(prepared(x), quantized)
    assert torch.equal(prepared(x), quantized)


class Stack(nn.Module):
    def __init__(self, python):
        super().__init__()
        self.layers, self.by_name = (
            nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
            nn.ModuleDict({"a": nn.Linear(4, 4)}),
        )
        self.block, self.head, self.python, self.calls = (
            nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
            nn.Linear(4, 4),
            python,
            0,
        )

    def forward(self, x):
        if self.python:
            self.calls += 1
        for layer in self.layers:
            x = layer(x)
        return self.head(self.block(self.by_name["a"](x)) + self.layers[0](x))


@pytest.mark.parametrize("python", [False, True])
def test_layers_put_in_place_of_others_are_quantized_from_their_first_call_on(python):
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    prepared = qgraph.prepare(Stack(python), "A4W2", x)
    prepared.layers[1], prepared.by_name["a"], prepared.block[0], prepared.head = (nn.Linear(4, 4) for _ in range(4))
    other = Stack(python)
    other.load_state_dict(prepared.state_dict())
    expected = qgraph.prepare(other, "A4W2", x)
    for _ in range(2):
        assert torch.equal(prepared(x), expected(x))
    assert [site.name for site in sites(prepared)] == [site.name for site in sites(expected)]
    assert coverage(prepared).guard_misses <= 2  # of the model and of its Sequential, once
    with qgraph.disabled(prepared):
        assert torch.equal(prepared(x), other(x))


def test_a_slice_of_a_sequential_and_another_of_the_model_s_class():
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    prepared = qgraph.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "W2", x)
    assert torch.equal(prepared[1:](prepared[0](x)), prepared(x))
    assert not torch.equal(prepared[:2](x), F.linear(x, prepared[0].weight, prepared[0].bias).relu())
    fresh = type(prepared)(nn.Linear(4, 4))
    assert torch.equal(fresh(x), F.linear(x, fresh[0].weight, fresh[0].bias))
