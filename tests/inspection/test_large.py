"""A thousand layers: linear work; the times are printed, not asserted."""

from __future__ import annotations

import time

import torch
from torch import nn

import qgraph


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def test_a_thousand_layers():
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(500)))
    prepared = qgraph.prepare(model, "W4", (torch.randn(2, 8),))
    times = {}

    def timed(name, function):
        start = time.perf_counter()
        result = function()
        times[name] = time.perf_counter() - start
        return result

    found = timed("inspect", lambda: qgraph.inspect(prepared))
    text = timed("text", lambda: found.text(120))
    graphs = timed("graphs", lambda: found.graphs)
    network = timed("networkx", found.to_networkx)
    timed("eager", lambda: qgraph.inspect(model))
    print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items()))
    assert len(found.layers) == 1000 and found.totals.bytes_after == 1000 * (32 + 64)
    assert "499.down.weight" in text and len(graphs) == 1501
    # A block: norm, relu, add, and twice weight, bias, quantizer, linear; the model: input and output
    assert len(network) == 500 * 11 + 2
    assert found.last.site == "499.down.weight"
