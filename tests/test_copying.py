"""Copies of models that compute with their own parts."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle

import pytest
import torch
from torch import fx, nn

import qgraph
from qgraph.copying import copied
from qgraph.graph import sites

X = torch.randn(4, 16)


def mlp():
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


class Closing(nn.Module):
    """Functions over its own parts: in an attribute, as a default, in a hook, partially applied, in a list."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.met = {}
        count = itertools.count()
        self.first = lambda x: (next(count), self.a(x))[1]
        self.steps = [lambda x, layer=self.b: layer(x).relu(), functools.partial(lambda layer, x: layer(x), self.d)]
        self.c.register_forward_hook(lambda module, args, out: self.met.update(c=out.detach()))

    def forward(self, x):
        x = self.first(x)
        for step in self.steps:
            x = step(x)
        return self.c(x)


def test_functions_over_the_models_own_parts_are_over_those_of_the_copy(tmp_path):
    model = Closing()
    model(X)
    prepared = qgraph.prepare(model, "W4", X)
    assert {(site.name, site.reason) for site in sites(prepared)} == {(n, None) for n in WEIGHTS_OF_CLOSING}
    prepared(X).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert prepared.met["c"] is not model.met["c"]
    assert copied(model).steps[0] is not model.steps[0]
    report = qgraph.export(prepared.eval(), tmp_path / "closing.onnx", (X,), progress=False)
    assert {f"{layer.path}.{layer.operand}".strip(".") for layer in report.layers} == set(WEIGHTS_OF_CLOSING)
    frozen = qgraph.freeze(prepared)
    assert torch.allclose(frozen(X), prepared(X), atol=1e-5)


WEIGHTS_OF_CLOSING = ("a.weight", "b.weight", "d.weight", "c.weight")


def test_a_copy_shares_what_functions_share_and_keeps_what_is_not_the_models():
    def both(module, log):
        total = 0

        def add(x):
            nonlocal total
            total += 1
            log.append(total)
            return module(x)

        return add, lambda: total

    model, log = mlp(), []
    model.add, model.total = both(model[0], log)
    other = copied(model)
    other.add(X)
    assert (other.total(), model.total(), log) == (1, 0, [1])


def test_results_that_a_model_keeps_in_containers_are_no_hindrance():
    model = mlp()
    model.kept = {"last": [model(X)]}
    prepared = qgraph.prepare(model, "W4", X)
    assert torch.equal(prepared.kept["last"][0], model.kept["last"][0])


def test_a_model_that_cannot_be_copied_says_what_to_do():
    class Settings(dict):
        __getattr__ = dict.__getitem__

    model = mlp()
    model.settings = Settings(width=3)
    with pytest.raises(qgraph.CaptureError, match=r"Sequential cannot be copied.*inplace=True"):
        qgraph.prepare(model, "W4", X)
    assert qgraph.prepare(model, "W4", X, inplace=True) is model


class Rebuilt(nn.Module):
    """Is copied and pickled by its own methods, which make it anew."""

    def __init__(self):
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(16, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(x @ self.w)

    def __deepcopy__(self, memo):
        return self.__reduce__()[0](*self.__reduce__()[1])

    def __reduce__(self):
        return rebuilt, (self.state_dict(),)


def rebuilt(state):
    made = Rebuilt()
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("make", [Rebuilt, lambda: fx.symbolic_trace(Rebuilt())], ids=["own", "fx"])
@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("below", [False, True])
def test_a_class_that_copies_itself_stays_quantized(make, copy_of, below):
    prepared = qgraph.prepare(nn.Sequential(make(), nn.ReLU()) if below else make(), "W2", X)
    made = copy_of(prepared)
    assert torch.equal(made(X), prepared(X))
    assert [s.name for s in sites(made)] == [s.name for s in sites(prepared)]
    with qgraph.disabled(made):
        floating = made(X)
    assert torch.equal(made(X), prepared(X))  # the copy has been switched on again, the model has never been off
    assert not torch.equal(floating, prepared(X))
