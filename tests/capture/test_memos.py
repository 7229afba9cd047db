"""Sizes pass through cached functions that compute on them, and tables that the first call of all fills."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

import qgraph
from qgraph.graph import states


@functools.lru_cache
def folded(shape, heads):
    batch, length, width = shape
    return {"split": [batch, length, heads, width // heads], "joined": (batch, length, -1)}


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @functools.lru_cache  # noqa: B019
    def joined(self, batch, length):
        return batch, length, 8

    def split(self, x):
        return x.reshape(folded(x.shape, heads=2)["split"])

    def forward(self, x):
        shapes = folded(x.shape, heads=2)
        h = self.fc(x).reshape(shapes["split"]).softmax(2)
        return h.reshape(*self.joined(*h.shape[:2])) + x.reshape(shapes["joined"])


class _CallsMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.inner = nn.Linear(8, 8), _Layer()

    def forward(self, x):
        return self.fc(self.inner.split(x).flatten(2))


def test_sizes_pass_through_cached_functions():
    folded.cache_clear()
    model = nn.Sequential(_Layer(), _CallsMethod()).eval()
    prepared = qgraph.prepare(copy.deepcopy(model), "W4", (torch.randn(2, 3, 8),))
    assert isinstance(vars(_Layer)["joined"], functools._lru_cache_wrapper)
    assert isinstance(folded, functools._lru_cache_wrapper) and folded.cache_info().currsize == 1
    with qgraph.disabled(prepared):
        for x in (torch.randn(2, 3, 8), torch.randn(4, 5, 8)):
            assert torch.equal(prepared.eval()(x), model(x))
    found = qgraph.inspect(prepared).coverage
    assert not found.guard_misses and not found.opaque


STEPS = [lambda x: x.reshape(folded(x.shape, heads=2)["split"])]  # code that no name leads to


def test_a_cache_keeps_no_size_that_a_capture_has_followed():
    class Layer(_Layer):
        def forward(self, x):
            size = x.shape
            assert x.sum().item() < 1e9 and folded(size, heads=4)  # no graph holds it
            for step in STEPS:
                x = step(self.fc(x))
            return x

    folded.cache_clear()
    model, x = Layer().eval(), torch.randn(2, 3, 8)
    prepared = qgraph.prepare(copy.deepcopy(model), "W4", (x,)).eval()
    split = folded(x.shape, heads=2)["split"]
    assert [type(size) for size in split] == [int] * 4
    with qgraph.disabled(prepared):
        assert torch.equal(prepared(x), model(x))


def test_a_graph_stays_as_it_was_recorded_while_a_cache_keeps_its_sizes():
    @functools.lru_cache
    def enclosed(batch):
        return batch, 2, 4

    class Layer(_Layer):
        def forward(self, x):
            h = self.fc(x).relu()
            return self.fc(h.reshape(enclosed(h.shape[0])).softmax(1).flatten(1))

    model = nn.Sequential(Layer(), Layer()).eval()
    prepared = qgraph.prepare(copy.deepcopy(model), "W4", (torch.randn(3, 8),)).eval()
    with qgraph.disabled(prepared):
        for x in (torch.randn(3, 8), torch.randn(4, 8), torch.randn(3, 8)):
            assert torch.equal(prepared(x), model(x))
    for _, _, state in states(prepared):
        for variant in state.variants:
            variant.graph.lint()


TABLE: dict[type, float] = {}


def gain(x):
    return TABLE.setdefault(type(x), 2.0)


class ByTable(_Layer):
    def forward(self, x):
        return self.fc(x) * gain(x)


def test_a_table_that_the_first_call_fills_costs_no_graph():
    TABLE.clear()
    model, x = nn.Sequential(_Layer(), ByTable()), torch.randn(2, 3, 8)
    prepared = qgraph.prepare(copy.deepcopy(model), "W4", (x,), strict=True)
    found = qgraph.inspect(prepared).coverage
    assert not found.opaque and found.graphs == 2 * found.modules
    with qgraph.disabled(prepared):
        assert torch.equal(prepared(x), model(x))
