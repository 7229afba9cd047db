"""What `prepare` takes as examples, and that their runs leave no trace."""

from __future__ import annotations

import copy
import gc
import types
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import qgraph
from qgraph.graph import coverage
from tests.models import CNN


@pytest.mark.parametrize("mapping", [dict, UserDict, types.MappingProxyType])
def test_examples_are_positional_or_a_mapping_of_keywords(mapping):
    """As a tokenizer gives them, and as `export` and `compare` take them."""

    class Masked(CNN):
        def forward(self, x, scale):
            return super().forward(x) * scale

    x, scale = torch.randn(2, 3, 8, 8), torch.ones(())
    for examples in (mapping({"x": x, "scale": scale}), [x, scale], (x, scale)):
        found = coverage(qgraph.prepare(Masked(), "W4", examples))
        assert found.graphs == coverage(qgraph.prepare(Masked(), "W4", (x,), example_kwargs={"scale": scale})).graphs


def test_not_inplace_leaves_the_original_untouched():
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(5, 16)
    before = copy.deepcopy(model.state_dict())
    qgraph.prepare(model, "W4", x)
    assert type(model) is nn.Sequential and type(model[0]) is nn.Linear
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any("qgraph" in n for n, _ in model.named_modules())


def test_prepare_leaves_random_state_buffers_and_mode_as_they_were():
    model = CNN().eval()
    x = torch.randn(2, 3, 16, 16)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    prepared = qgraph.prepare(model, "W4", x)
    assert torch.equal(torch.rand(1), expected)
    assert not prepared.training and not prepared.bn1.training
    assert all(torch.equal(a, b) for a, b in zip(prepared.buffers(), model.buffers(), strict=True))


def test_what_the_examples_made_is_let_go_at_once():
    """Not when Python next looks for cycles: it knows nothing of the size of tensors."""
    storages = []
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 4)))
    for module in net.modules():
        module.register_forward_hook(lambda _, args, y: storages.append(StorageWeakRef(y.untyped_storage())))
    gc.collect()
    gc.disable()
    try:
        model = qgraph.prepare(net, "A4W2", (torch.randn(2, 4),))
        first = len(storages)
        model(torch.randn(3, 2, 4))
        alive = [storage for storage in storages if not storage.expired()]
    finally:
        gc.enable()
    assert 5 <= first < len(storages)
    assert not alive
