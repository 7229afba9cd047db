"""Methods that are called beside the forward: quantized at the same sites as in it, and at sites of their own."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qgraph
from qgraph.graph import sites


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.embedding = nn.Linear(4, 4), nn.Embedding(5, 4)
        self.projection, self.kernel = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    @property
    def scaled(self):
        return self.kernel * 2

    def encode(self, x):
        return self.fc(x) @ self.projection

    def logits(self, x):
        return F.linear(self.encode(x), self.embedding.weight)

    @torch.no_grad()
    def score(self, x):
        return torch.matmul(self.encode(x), self.scaled)

    def similarity(self, a, b):
        return a @ b.T

    def forward(self, x):
        return self.encode(x).relu()


class Calls(nn.Module):
    """A model of which `name` is the forward."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        return getattr(self.model, self.name)(x)


@pytest.mark.parametrize("name", ["encode", "logits", "score"])
def test_a_method_computes_what_it_would_as_a_forward(name):
    torch.manual_seed(0)
    model, x = Encoder(), torch.randn(3, 4)
    prepared = qgraph.prepare(model, "A4W2", x)
    expected = qgraph.prepare(Calls(model, name), "A4W2", x)(x)
    for same in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(getattr(same, name)(x), expected)
        assert torch.equal(same(x), expected.relu()) == (name == "encode")
    assert torch.allclose(torch.compile(getattr(prepared, name), backend="eager")(x), expected)
    with qgraph.disabled(prepared):
        assert torch.equal(getattr(prepared, name)(x), getattr(model, name)(x))


def test_sites_of_methods_are_reported_and_what_multiplies_no_weight_is_left_alone():
    model, x = Encoder(), torch.randn(3, 4)
    prepared = qgraph.prepare(model, "A4W2", x)
    assert [site.name for site in sites(prepared)] == ["projection", "fc.weight"]
    prepared.logits(x).sum().backward()
    prepared.score(x)
    assert {site.name for site in sites(prepared)} == {"projection", "fc.weight", "embedding.weight", "kernel.derived"}
    assert prepared.embedding.weight.grad is not None and prepared.projection.grad is not None
    assert torch.equal(prepared.similarity(x, x), model.similarity(x, x))


def test_a_frozen_model_says_that_it_has_no_weight_for_a_method():
    model, x = Encoder(), torch.randn(3, 4)
    frozen = qgraph.freeze(qgraph.prepare(model, "A4W2", x).eval())
    with pytest.raises(qgraph.CaptureError, match=r"Encoder\.encode uses projection, which qgraph\.freeze has packed"):
        frozen.encode(x)
    assert torch.equal(frozen.similarity(x, x), model.similarity(x, x))
