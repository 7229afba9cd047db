"""A call that a graph was not recorded for: another variant, or Python under the same quantizers; never wrong, never
silently float, and counted."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qgraph
from qgraph.graph import coverage, quantizer_modules


def both(prepared, model, *args, **kwargs):
    """The prepared model is the original with its quantizers off, and is not with them on."""
    with qgraph.disabled(prepared):
        assert torch.equal(prepared(*args, **kwargs), model(*args, **kwargs))
    assert not torch.equal(prepared(*args, **kwargs), model(*args, **kwargs))
    assert all(quantizer.enabled for quantizer in quantizer_modules(prepared))


class Child(nn.Module):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.fc, self.gate, self.flag, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), True, 2.0
        self.extra = None

    def forward(self, x):
        return self.fc(x)


class Reads(nn.Module):
    """Its Python decides by what it finds in itself, its children and the objects that they hold."""

    kind = "plain"

    def __init__(self):
        super().__init__()
        self.child, self.out = Child(), nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.config = SimpleNamespace(use_gate=False, inner=SimpleNamespace(power=1), widths=[1, 2])
        self.child.config = self.config
        self.options = {"shift": 0.5, "nested": [1, [2]]}
        self.activation = F.relu
        self.norm = None

    def forward(self, x):
        y = self.child(x) * self.child.scale * self.child.factor
        if self.child.flag:
            y = y + self.options["shift"] * self.options["nested"][1][0]
        if self.child.config.use_gate:
            y = y * torch.sigmoid(self.child.gate(x))
        for layer in self.layers:
            y = layer(y)
        y = self.activation(y) ** self.config.inner.power + len(self.config.widths)
        if self.kind == "double":
            y = y * 2
        if self.norm is not None:
            y = self.norm(y)
        if getattr(self, "bonus", None) is not None:
            y = y + self.bonus
        return self.out(y + vars(self).get("offset", 0))


def set_on(path, value):
    def change(model):
        *holders, name = path.split(".")
        for holder in holders:
            model = getattr(model, holder)
        setattr(model, name, value)

    return change


CHANGES = {
    "a flag of a child": set_on("child.flag", False),
    "a number of a child": set_on("child.scale", 3.0),
    "a class attribute, on the instance": set_on("child.factor", 0.5),
    "the same of the module itself": set_on("kind", "double"),
    "a field of a config": set_on("config.use_gate", True),
    "a field of an object inside the config": set_on("config.inner.power", 2),
    "a list in the config": lambda model: model.config.widths.append(3),
    "another config": set_on("child.config", SimpleNamespace(use_gate=True)),
    "an item of a dict": lambda model: model.options.update(shift=2.0),
    "an item of a nested list": lambda model: model.options["nested"][1].__setitem__(0, 7),
    "another function": set_on("activation", torch.tanh),
    "a child where there was none": set_on("norm", nn.LayerNorm(4)),
    "one layer less": lambda model: model.layers.__delitem__(2),
    "one layer more": lambda model: model.layers.append(copy.deepcopy(model.layers[0])),
    "an attribute that was not there": set_on("bonus", 1.5),
    "one that is looked up in vars(self)": set_on("offset", 4.0),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("copied", [False, True], ids=["", "deepcopy"])
def test_an_attribute_that_the_forward_reads_is_changed(name, copied):
    torch.manual_seed(0)
    model = Reads().eval()
    prepared = qgraph.prepare(model, "W4", (torch.randn(2, 4),))
    if copied:
        prepared = copy.deepcopy(prepared)
    both(prepared, model, torch.randn(3, 4))
    assert coverage(prepared).guard_misses == 0
    for changed in (prepared, model):
        CHANGES[name](changed)
    x = torch.randn(3, 4)
    both(prepared, model, x)
    assert coverage(prepared).guard_misses == 1
    both(prepared, model, x)  # by the variant that the miss has left
    assert coverage(prepared).guard_misses == 1 and not coverage(prepared).opaque


def test_what_no_forward_reads_is_no_guard():
    prepared = qgraph.prepare(Reads().eval(), "W4", (torch.randn(2, 4),))
    prepared.child.note, prepared.child.extra, prepared.child.fc.in_features = "mine", 3, 5
    prepared(torch.randn(3, 4))
    assert coverage(prepared).guard_misses == 0


def test_guards_come_along_in_a_pickle():
    torch.manual_seed(0)
    model = Reads().eval()
    prepared = pickle.loads(pickle.dumps(qgraph.prepare(model, "W4", (torch.randn(2, 4),))))
    both(prepared, model, torch.randn(3, 4))
    for changed in (prepared, model):
        changed.child.scale = 5.0
    both(prepared, model, torch.randn(3, 4))
    assert coverage(prepared).guard_misses == 1


class Sets(nn.Module):
    """Leaves a number for its parent."""

    def __init__(self):
        super().__init__()
        self.fc, self.found = nn.Linear(4, 4), 0.0

    def forward(self, x):
        self.found = 2.0 if x.shape[0] > 2 else 1.0
        return self.fc(x)


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.child, self.out = Sets(), nn.Linear(4, 4)

    def forward(self, x):
        y = self.child(x)
        return self.out(y) * self.child.found


def test_a_number_that_a_child_sets_in_the_same_call():
    torch.manual_seed(0)
    model = Asks().eval()
    prepared = qgraph.prepare(model, "W4", (torch.randn(2, 4),))
    for rows in (2, 3, 2, 3, 5, 1):
        both(prepared, model, torch.randn(rows, 4))
    reasons = {found.reason for found in coverage(prepared).opaque if found.path == ""}
    assert reasons == {"reads self.child.found, which a child has set in this call"}


class Branches(nn.Module):
    """A size, a None and a mode decide; the second weight is met on one side alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x, mask=None, mode="sum"):
        y = self.a(x)
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        if x.shape[0] > 3:
            y = F.linear(y, self.b)
        return y.mean(1) if mode == "mean" else y.sum(1)


def test_another_none_pattern_size_or_word_is_another_variant():
    torch.manual_seed(0)
    model = Branches().eval()
    x, long = torch.randn(2, 4), torch.randn(5, 4)
    prepared = qgraph.prepare(model, "W4", (x,))
    both(prepared, model, torch.randn(3, 4))
    assert coverage(prepared).guard_misses == 0  # as the example branched
    calls = [((x, x > 0), {}), ((long,), {}), ((x,), {"mode": "mean"}), ((long, long > 0), {"mode": "mean"})]
    for misses, (args, kwargs) in enumerate(calls, start=1):
        both(prepared, model, *args, **kwargs)
        both(prepared, model, *args, **kwargs)
        assert coverage(prepared).guard_misses == misses
    found = coverage(prepared)
    assert found.sites == found.sites_quantized == 2 and not found.opaque


def test_more_variants_than_are_kept_run_as_python_under_the_same_quantizers():
    torch.manual_seed(0)
    model = Branches().eval()
    prepared = qgraph.prepare(model, "W4", (torch.randn(5, 4),))
    for i in range(12):
        x = torch.randn(5, 4)
        both(prepared, model, x, mode=f"mode {i}")
    assert coverage(prepared).guard_misses > 12  # those without a graph are counted each time


class Inner(nn.Module):
    """Branches on a size that no argument has: its guard stands inside the graph."""

    def __init__(self):
        super().__init__()
        self.halves, self.fc = Halves(), nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += 1
        y = self.halves(x)
        y = self.fc(y)
        return y * 2 if y.shape[0] > 2 else y


class Halves(nn.Module):
    def forward(self, x):
        return x[: x.shape[0] // 2]


def test_a_guard_inside_a_graph_that_misses_takes_back_what_ran_before():
    torch.manual_seed(0)
    model = Inner().eval()
    prepared, other = qgraph.prepare(model, "W4", (torch.randn(4, 4),)), copy.deepcopy(model)
    with qgraph.disabled(prepared):
        for rows in (4, 8, 4, 8, 9):
            x = torch.randn(rows, 4)
            assert torch.equal(prepared(x), other(x))
            assert torch.equal(prepared.seen, other.seen)
    both(prepared, other, torch.randn(8, 4))
    assert coverage(prepared).guard_misses > 0


class MayReturnTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.second = nn.Linear(4, 4), False

    def forward(self, x):
        y = self.fc(x)
        return y, (y * 2 if self.second else None)


class TakesTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.child, self.out = MayReturnTwo(), nn.Linear(4, 4)

    def forward(self, x):
        first, second = self.child(x)
        return self.out(first if second is None else first - second)


def test_a_child_that_returns_something_else_at_sizes_that_held_before():
    torch.manual_seed(0)
    model = TakesTwo().eval()
    x = torch.randn(2, 4)
    prepared = qgraph.prepare(model, "W4", (x,))
    for second in (False, False, True, False, True):
        model.child.second = prepared.child.second = second
        both(prepared, model, x)
    assert not coverage(prepared).opaque


def test_quantizers_switched_off_one_by_one():
    torch.manual_seed(0)
    model = Child().eval()
    x = torch.randn(2, 4)
    prepared = qgraph.prepare(model, "A4W4", (x,))
    weight, activation = prepared.fc.qgraph.weight, prepared.fc.qgraph["input"]
    results = []
    for weight.enabled in (True, False):
        for activation.enabled in (True, False):
            results.append(prepared(x))
    assert torch.equal(results[-1], model(x))
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])
    qgraph.set_enabled(prepared, True)
    assert torch.equal(prepared(x), results[0])


class RoundedSizes(nn.Module):
    """Sizes that `math` rounds: as the length of a result, and to decide by."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        n = x.shape[1]
        y = F.pad(self.fc(x), (0, 0, 0, math.ceil(n / 4) * 4 - n))[:, : math.floor(n * 0.75)]
        half = y[:, : math.trunc(y.shape[1] / 2)]
        return half * 2 if math.ceil(n / 4) > 2 else half


def test_sizes_that_math_rounds_stay_sizes():
    model = RoundedSizes().eval()
    prepared = qgraph.prepare(model, "W4", torch.randn(2, 7, 4)).eval()
    with qgraph.disabled(prepared):
        for n, misses in ((7, 0), (5, 0), (8, 0), (9, 1), (20, 1), (6, 1)):  # from 9 on, the other branch
            x = torch.randn(2, n, 4)
            for same in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
                assert torch.equal(same(x), model(x))
            assert coverage(prepared).guard_misses == misses


class SizeTimesTensor(nn.Module):
    def __init__(self, calculate):
        super().__init__()
        self.fc, self.w, self.calculate = nn.Linear(4, 4), nn.Parameter(torch.rand(4) + 1), calculate

    def forward(self, x):
        return self.fc(x) + self.calculate(x.shape[0], self.w)


SIZE_FIRST = [
    lambda n, w: n * w,
    lambda n, w: n + (n - w),
    lambda n, w: n / w + n // w + n % w,
    lambda n, w: n**w,
    lambda n, w: w * (n * np.float64(2.0)),
    lambda n, w: w * (n * 1j).imag,
    lambda n, w: w * float((n / 2 * np.ones(3)).sum()) + float((np.ones(3) * (n / 2)).sum()),
]


@pytest.mark.parametrize("calculate", SIZE_FIRST)
def test_a_size_on_the_left_of_a_tensor_an_array_or_a_complex_number(calculate):
    model = SizeTimesTensor(calculate)
    prepared = qgraph.prepare(model, "W2", torch.randn(2, 4))
    assert not coverage(prepared).opaque
    for rows in (2, 5, 3):
        both(prepared, model, torch.randn(rows, 4))
