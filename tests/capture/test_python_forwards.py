"""Forwards that no graph holds run as Python, with the quantizers in place, and cost no more than they must."""

import weakref

import torch
from torch import nn

import qgraph


class Branching(nn.Module):
    """Layers behind a choice that the data makes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if x.sum() > 0 else layer(x + 1)
        return x


def test_a_result_is_let_go_when_the_forward_lets_it_go():
    model = qgraph.prepare(Branching().eval(), "A8W4", (torch.ones(2, 8),))
    assert {m.path for m in qgraph.inspect(model).coverage.opaque} == {""}
    results, alive = [], []

    def watch(layer, args, result):
        alive.append([r() is not None for r in results])
        results.append(weakref.ref(result))

    for layer in model.layers:
        layer.register_forward_hook(watch)
    with torch.no_grad():
        model(torch.ones(2, 8))
    assert alive == [[], [True], [False, True], [False, False, True]]
