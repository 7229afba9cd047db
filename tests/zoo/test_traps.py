"""The traps: bit for bit eager with the quantizers off, every site quantized and trainable with them on."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import qgraph
from qgraph.graph import coverage
from tests.zoo.traps import TRAPS


def run(model, inputs, training):
    model.train(training)
    model.zero_grad()
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    out = tree_leaves(model(*tree_map_only(torch.Tensor, lambda t: t.clone(), inputs)))
    tensors = [t for t in out if isinstance(t, torch.Tensor) and t.requires_grad]
    sum(t.abs().square().sum() for t in tensors).backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def make(name):
    torch.manual_seed(0)
    case = TRAPS[name]
    first, second = case.inputs(0), case.inputs(1)
    model = case.make()
    model(*tree_map_only(torch.Tensor, lambda t: t.clone(), first))  # lazy layers take their sizes
    return case, model, first, second


@pytest.mark.parametrize("name", TRAPS)
def test_off_is_eager(name):
    case, model, first, second = make(name)
    for example in (first, None):
        other = copy.deepcopy(model)
        prepared = qgraph.prepare(model, "A8W4", example)
        for inputs in (first, second, first):
            for training in (False, True):
                with qgraph.disabled(prepared):
                    out, grads = run(prepared, inputs, training)
                expected, expected_grads = run(other, inputs, training)
                assert len(out) == len(expected) and all(same(a, b) for a, b in zip(out, expected, strict=True))
                assert set(grads) == set(expected_grads)
                assert all(torch.equal(grads[n], expected_grads[n]) for n in grads)


@pytest.mark.parametrize("name", TRAPS)
def test_on_is_quantized(name):
    case, model, first, second = make(name)
    prepared = qgraph.prepare(model, "A4W2", first)
    found = coverage(prepared)
    assert bool(found.opaque) == case.opaque, found.opaque
    assert found.sites == found.sites_quantized > 0 and found.graphs > 0
    for inputs in (first, second):
        expected, expected_grads = run(copy.deepcopy(model), inputs, True)
        out, grads = run(prepared, inputs, True)
        assert not all(same(a, b) for a, b in zip(out, expected, strict=True))
        assert set(expected_grads) <= set(grads) and all(torch.isfinite(g).all() for g in grads.values())
