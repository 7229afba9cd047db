"""Modules that a forward makes: quantized and counted, and none is left over from the examples' runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qgraph


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
