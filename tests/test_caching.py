"""Held weights of a prepared model: how much, how to release it, and that what is trained or copied is right."""

import copy

import pytest
import torch
from torch import nn

import qgraph
from qgraph.ops import memo, native


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.middle = nn.Linear(64, 64)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.middle(self.embed(ids)).relu())


IDS = torch.arange(16).reshape(2, 8)
compiled = pytest.mark.skipif(native.library() is None, reason="no C++ compiler: nothing is held")


def prepared(config="W4-2:4"):
    torch.manual_seed(0)
    return qgraph.prepare(Tied(), config, (IDS,))


@compiled
def test_an_evaluation_holds_a_bounded_number_of_bytes_and_gives_them_back(monkeypatch):
    monkeypatch.setattr(memo, "_account", memo._Account())
    model = prepared("W4").eval()
    with torch.no_grad():
        expected = model(IDS)
        assert torch.equal(model(IDS), expected)
        assert torch.equal(model(IDS), expected)
    weights = 4 * (32 * 64 + 64 * 64)
    assert weights < qgraph.cached_bytes(model) < 1.15 * weights  # and six numbers a channel
    assert qgraph.cached_bytes(copy.deepcopy(model)) == 0
    qgraph.clear_cache(model)
    assert qgraph.cached_bytes(model) == 0
    qgraph.set_cache_limit(0)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(IDS), expected)
    assert qgraph.cached_bytes(model) == 0


@compiled
@pytest.mark.parametrize("config", ["W4", "W4-2:4", "A4W1@32"])
def test_accumulated_training_has_the_losses_of_training_that_holds_nothing(config):
    def run(limit):
        qgraph.set_cache_limit(limit)
        model = prepared(config)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        losses = []
        for step in range(4):
            for _ in range(3):
                loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                model.load_state_dict({name: value * 1.01 for name, value in model.state_dict().items()})
        return losses

    try:
        assert run(memo.DEFAULT_LIMIT) == run(0)
    finally:
        qgraph.set_cache_limit(memo.DEFAULT_LIMIT)


def test_errors_say_what_to_do():
    with pytest.raises(qgraph.CaptureError, match=r"qgraph\.prepare"):
        qgraph.cached_bytes(nn.Linear(2, 2))
    for size in (-1, 1.5, True, None):
        with pytest.raises(qgraph.ConfigError, match="number of bytes"):
            qgraph.set_cache_limit(size)
