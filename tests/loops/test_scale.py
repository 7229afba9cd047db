"""Large models: prepared on the meta device, in time that is linear in the number of layers."""

from __future__ import annotations

import sys

import torch
from torch import nn

import qgraph
from tests.models import GPT


def test_a_model_without_memory_is_prepared_and_filled_later():
    ids = torch.randint(0, 33, (2, 7), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    expected = qgraph.prepare(GPT(), "A8W4@8", ids).eval()
    for examples in (None, ids.to("meta")):
        with torch.device("meta"):
            model = GPT()
        prepared = qgraph.prepare(model, "A8W4@8", examples).eval()
        assert all(tensor.is_meta for tensor in (*prepared.parameters(), *prepared.buffers()))
        prepared.to_empty(device="cpu").load_state_dict(expected.state_dict())
        for ours, theirs in zip(prepared.buffers(), expected.buffers(), strict=True):
            ours.copy_(theirs)  # the masks are in no state_dict
        assert torch.equal(prepared(ids), expected(ids))


def calls_of_prepare(layers: int) -> int:
    """How many functions run, Python's and C's: a measure that no other process disturbs."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(layers)))
    count = 0

    def profile(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(profile)
    try:
        qgraph.prepare(model, "A8W4", torch.randn(2, 4))
    finally:
        sys.setprofile(None)
    return count


def test_the_work_of_prepare_is_linear_in_the_layers():
    calls_of_prepare(2)  # caches
    assert calls_of_prepare(60) < 2.2 * calls_of_prepare(30)
