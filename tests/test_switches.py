"""`disabled` and `set_enabled`: a prepared model with some or all of its quantizers off."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import qgraph
from qgraph.errors import CaptureError


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def test_disabled_by_glob_and_set_enabled():
    prepared = qgraph.prepare(mlp(), "W1", X)
    on = prepared(X)
    with qgraph.disabled(prepared, "0"):
        first_off = prepared(X)
    with qgraph.disabled(prepared):
        off = prepared(X)
    assert torch.equal(prepared(X), on)
    assert not torch.equal(first_off, on) and not torch.equal(first_off, off)
    qgraph.set_enabled(prepared, False, "0")
    assert torch.equal(prepared(X), first_off)
    qgraph.set_enabled(prepared, True)
    assert torch.equal(prepared(X), on)


@pytest.mark.parametrize(
    "around",
    [
        nn.DataParallel,
        AveragedModel,
        lambda m: nn.Sequential(m, nn.Identity()),
        functools.partial(torch.compile, backend="eager"),
    ],
)
def test_what_switches_quantizers_takes_a_model_inside_another(around):
    model = around(qgraph.prepare(mlp(), "W2", (X,)))
    with qgraph.disabled(model):
        assert torch.equal(model(X), mlp()(X))
    assert not torch.equal(model(X), mlp()(X))
    qgraph.set_enabled(model, False, "0.*")
    assert not torch.equal(model(X), mlp()(X))
    qgraph.set_enabled(model, False)
    assert torch.equal(model(X), mlp()(X))
    qgraph.clear_cache(model)
    assert qgraph.cached_bytes(model) == 0
    with pytest.raises(CaptureError, match="is not prepared"):
        qgraph.set_enabled(around(mlp()), False)
