"""Graphs that do not hold for a call, errors in the middle of one, and models that torch itself does not copy."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import qgraph
from qgraph.graph import STATE, coverage


class Once(nn.Module):
    """Its own length is a list's, so a graph of it is tried and taken back; a hook sees that."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return torch.stack([row * 2 for row in self.fc(x).unbind(0)])


def test_a_graph_that_did_not_hold_for_a_size_is_not_tried_again():
    model, calls = Once(), []
    prepared = qgraph.prepare(model, "A8W4", (torch.randn(3, 4),))
    prepared.fc.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 4)
    with qgraph.disabled(prepared):
        for turn in range(3):
            calls.clear()
            assert torch.equal(prepared(x), model(x))
            assert len(calls) == (2 if turn == 0 else 1)
    assert coverage(prepared).guard_misses == 1 and not coverage(prepared).opaque


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.both = nn.Linear(4, 4), False

    def forward(self, x):
        return (self.fc(x), x) if self.both else (self.fc(x), None)


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = Switched()

    def forward(self, x):
        with torch.no_grad():
            y, z = self.child(x)
        return self.child.fc(x) + (y if z is None else y * z)


def test_a_child_that_returns_another_structure_after_its_parent_was_captured():
    model, x = Asks(), torch.randn(2, 4)
    prepared = qgraph.prepare(model, "A8W4", (x,))
    with qgraph.disabled(prepared):
        for both in (False, False, True, True, False):
            model.child.both = prepared.child.both = both
            ours, theirs = prepared(x), model(x)
            assert torch.equal(ours, theirs) and ours.requires_grad and torch.is_grad_enabled()


class SometimesPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        return y if x.sum() > 0 else (y, x)


class Around(nn.Module):
    """A graph between the child that data decides about and the one that takes what it returns apart."""

    def __init__(self):
        super().__init__()
        self.child = SometimesPair()

    def forward(self, x):
        return self.child(x)


class Takes(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child, self.norm = child, nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.child(self.norm(x).abs() * x)
        return y if isinstance(y, torch.Tensor) else y[0] + y[1]


@pytest.mark.parametrize("make", [SometimesPair, Around])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("config", ["A8W4", "W4"])
def test_a_child_whose_data_decide_between_a_tensor_and_a_pair(make, sign, config):
    model = Takes(make())
    x = sign * torch.rand(3, 4).add(1)
    prepared = qgraph.prepare(model, config, (x,))
    with qgraph.disabled(prepared):
        for now in (x, -x, -x, x, -x):
            assert torch.equal(prepared(now), model(now))
    for now in (x, -x, x):
        prepared(now).sum().backward()
    assert coverage(prepared).sites == coverage(prepared).sites_quantized == 1


def test_a_child_that_is_a_graph_is_not_asked_for_its_structure():
    prepared = qgraph.prepare(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), "A8W4", torch.randn(2, 4))
    assert coverage(prepared).graphs and not coverage(prepared).opaque
    assert all(v.late_guards == 0 for m in prepared.modules() for v in getattr(vars(m).get(STATE), "variants", ()))


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, y):
        with torch.no_grad():
            z = x + y
        return self.fc(z)


def test_an_error_inside_a_block_leaves_gradients_as_they_were():
    prepared = qgraph.prepare(Fails(), "A8W4", (torch.randn(2, 4), torch.randn(2, 4)))
    with pytest.raises(RuntimeError, match="must match"):
        prepared(torch.randn(2, 4), torch.randn(3, 4))
    assert torch.is_grad_enabled()


class Keeps(nn.Module):
    """Torch's older weight_norm keeps a computed weight, which deepcopy refuses."""

    def __init__(self):
        super().__init__()
        self.fc = nn.utils.weight_norm(nn.Linear(4, 4))
        self.fc.requires_grad_(False)

    def forward(self, x):
        return self.fc(x)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_keeps_results_of_its_forward():
    model, x = Keeps(), torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    prepared = qgraph.prepare(model, "A8W4", (x,))
    assert not torch.equal(prepared(x), model(x))
    with qgraph.disabled(prepared):
        assert torch.equal(prepared(x), model(x))
    assert coverage(prepared).sites == coverage(prepared).sites_quantized == 1


class TensorOrPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.both = nn.Linear(4, 4), False

    def forward(self, x):
        y = self.fc(x)
        return (y, x) if self.both else y


class Twice(nn.Module):
    """Two graphs around one child: the second meets its new structure after the first."""

    def __init__(self, child):
        super().__init__()
        self.first, self.second = Takes(child), Takes(child)

    def forward(self, x):
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("config", ["A8W4", "W4"])
def test_a_child_switched_from_a_tensor_to_a_pair(config):
    model, x = Twice(TensorOrPair()), torch.rand(3, 4) + 1
    model.first.norm.momentum = model.second.norm.momentum = 0.0
    prepared = qgraph.prepare(model, config, (x,))
    with qgraph.disabled(prepared):
        for both in (False, True, True, False, True, False):
            model.first.child.both = prepared.first.child.both = both
            assert torch.equal(prepared(x), model(x))
    prepared.first.child.both = True
    prepared(x).sum().backward()
    assert prepared.first.child.fc.weight.grad.isfinite().all()
    assert coverage(prepared).sites == coverage(prepared).sites_quantized == 1
    copied = pickle.loads(pickle.dumps(prepared))
    for both in (False, True):
        prepared.first.child.both = copied.first.child.both = both
        assert torch.equal(copied.eval()(x), prepared.eval()(x))


class Sizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return {"y": self.fc(x), "rows": x.shape[0]}


class AsksForRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = Sizes()

    def forward(self, x):
        found = self.child(x)
        return found["y"] * found["rows"]


def test_a_size_in_a_dict_of_a_child_gets_a_graph_for_each_size():
    model, calls = AsksForRows(), []
    prepared = qgraph.prepare(model, "A8W4", (torch.randn(3, 4),))
    prepared.child.fc.register_forward_hook(lambda *_: calls.append(1))
    with qgraph.disabled(prepared):
        for turn in range(3):
            for rows in (2, 3, 5):
                x = torch.randn(rows, 4)
                calls.clear()
                assert torch.equal(prepared(x), model(x))
                assert len(calls) == 1 or turn == 0
    assert len(getattr(prepared, STATE).variants) == 4  # three in train, one in eval


class ClassOfResults(nn.Module):
    """Its result is held by a class that the forward makes."""

    def __init__(self, kind):
        super().__init__()
        self.fc, self.kind = nn.Linear(4, 4), kind

    def forward(self, x):
        result = self.fc(x)
        if self.kind == "type":
            return type("Output", (), {"y": result})()
        if self.kind == "class":
            return type("Output", (), {"y": result})

        class Held:
            y = result

        class Closure:
            @property
            def y(self):
                return result

        return Held() if self.kind == "attribute" else Closure()


@pytest.mark.parametrize("kind", ["type", "attribute", "closure", "class"])
def test_a_class_made_by_the_forward_is_not_replayed(kind):
    model = ClassOfResults(kind)
    prepared = qgraph.prepare(model, "A8W4", (torch.randn(3, 4),))
    with qgraph.disabled(prepared):
        for rows in (3, 3, 2):
            x = torch.randn(rows, 4)
            assert torch.equal(prepared(x).y, model(x).y)
    assert coverage(prepared).sites == coverage(prepared).sites_quantized == 1
