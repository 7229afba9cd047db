"""Tensors that no module holds, globals and what a memo returns, are in the graph."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import qgraph


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)


MEAN = torch.tensor([1.0, 2.0, 3.0, 4.0])


KERNELS = {"row": torch.tensor([0.5, 1.0, 0.5]).view(1, 1, 3)}


@functools.cache
def angles(size):
    return torch.arange(size).float().sin(), torch.arange(size).float().cos()


class FromGlobals(_Layer):
    def forward(self, x):
        return nn.functional.conv1d((self.fc(x) - MEAN)[:, None], KERNELS["row"])


class FromMemo(_Layer):
    def forward(self, x):
        sine, cosine = angles(x.shape[-1])
        return self.fc(x) * sine + cosine


class FromMemoizedMethod(_Layer):
    @staticmethod
    @functools.lru_cache(maxsize=4)
    def table(size):
        return torch.ones(size) * 2

    def forward(self, x):
        return self.fc(x) * FromMemoizedMethod.table(x.shape[-1]) + self.table(1)


class FromClass(_Layer):
    shift = torch.ones(4) * 3

    def forward(self, x):
        return self.fc(x) - self.shift


@pytest.mark.parametrize("kind", [FromGlobals, FromMemo, FromMemoizedMethod, FromClass])
def test_tensors_that_no_module_holds_are_in_the_graph(kind, tmp_path):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(3, 4)
    model(x)  # memos are filled
    prepared = qgraph.prepare(copy.deepcopy(model), "W4", (x,)).eval()
    assert not qgraph.inspect(prepared).coverage.opaque
    torch._dynamo.reset()
    compiled = torch.compile(prepared, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), prepared(x))
    qgraph.export(prepared, tmp_path / "f.onnx", (x,))
    for same in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        with qgraph.disabled(same):
            assert torch.equal(same(x), model(x))


def test_a_global_tensor_is_read_at_every_call(monkeypatch):
    x = torch.randn(3, 4)
    model = FromGlobals()
    prepared = qgraph.prepare(copy.deepcopy(model), "W4", (x,))
    monkeypatch.setitem(globals(), "MEAN", MEAN * 2)
    with qgraph.disabled(prepared):
        assert torch.equal(prepared(x), model(x)) and qgraph.inspect(prepared).coverage.guard_misses == 0
        monkeypatch.setitem(globals(), "MEAN", 0.0)
        assert torch.equal(prepared(x), model(x)) and qgraph.inspect(prepared).coverage.guard_misses == 1
