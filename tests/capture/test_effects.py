"""Forwards that change objects: arguments, their module, children, objects they make; replayed by the graph."""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn

import qgraph
from qgraph.graph import coverage


class Slot:
    def __init__(self):
        self.keys, self.ready, self.count = None, False, 0

    def update(self, new):
        if not self.ready:
            self.keys, self.ready = new.new_zeros(0, new.shape[1]), True
        self.count += new.shape[0]
        self.keys = torch.cat([self.keys, new])
        return self.keys


class Store:
    def __init__(self, size):
        self.slots = [Slot() for _ in range(size)]


class Layer(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.fc, self.index = nn.Linear(4, 4), index

    def forward(self, x, store):
        seen = store.slots[self.index].update(self.fc(x))
        return x + seen.mean(0) * store.slots[self.index].count


class Stack(nn.Module):
    """Makes its store itself where none is given, and returns it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(0), Layer(1)])

    def forward(self, x, store=None):
        if store is None:
            store = Store(2)
        for layer in self.layers:
            x = layer(x, store)
        return x + store.slots[0].keys.sum(), store


def same_store(a, b):
    return all(
        torch.equal(x.keys, y.keys) and (x.count, x.ready) == (y.count, y.ready) and type(x.count) is int
        for x, y in zip(a.slots, b.slots, strict=True)
    )


def test_a_store_made_inside_grows_over_calls_as_in_eager():
    torch.manual_seed(0)
    model = Stack().eval()
    prepared = qgraph.prepare(model, "A8W4", (torch.randn(3, 4),))
    assert not coverage(prepared).opaque
    with qgraph.disabled(prepared):
        met = 0
        for turn in range(3):
            ours = theirs = None
            for rows in (3, 2, 2, 5):
                x = torch.randn(rows + turn, 4)
                (a, ours), (b, theirs) = prepared(x, ours), model(x, theirs)
                assert torch.equal(a, b) and same_store(ours, theirs)
            met = met if turn else coverage(prepared).guard_misses  # the store given, for the first time
            assert coverage(prepared).guard_misses == met
    a, _ = prepared(x)
    assert not coverage(prepared).opaque and not torch.equal(a, model(x)[0])


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.memory = nn.Linear(4, 4), None

    def forward(self, x):
        out = self.fc(x) if self.memory is None else self.fc(x) + self.memory
        self.memory = out.detach()
        return out


class Rewinds(nn.Module):
    """Sets a child's attribute, and reads what the child has left behind."""

    def __init__(self):
        super().__init__()
        self.child = Child()

    def forward(self, x, fresh=True):
        if fresh:
            self.child.memory = torch.ones_like(x)
        y = self.child(x)
        return y * 2 + self.child.memory


class Results(nn.Module):
    """Changes what a child returned, and a list and a dict that it was given."""

    def __init__(self):
        super().__init__()
        self.inner = Pairs()

    def forward(self, x, log, table):
        out = self.inner(x)
        out["more"] = out["y"] + 1
        log.append(out["y"])
        table["last"] = x * 2
        del table["old"]
        return out


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return {"y": self.fc(x)}


@pytest.mark.parametrize("training", [False, True])
def test_a_child_that_is_assigned_to(training):
    torch.manual_seed(0)
    model = Rewinds().train(training)
    prepared, other = qgraph.prepare(model, "A8W4", (torch.randn(3, 4),)), copy.deepcopy(model)
    assert not coverage(prepared).opaque
    with qgraph.disabled(prepared):
        for fresh in (True, True, False, False, True):
            x = torch.randn(3, 4)
            assert torch.equal(prepared(x, fresh), other(x, fresh))
            assert torch.equal(prepared.child.memory, other.child.memory)


def test_containers_that_are_changed():
    torch.manual_seed(0)
    model = Results()

    def example(rows):
        return torch.randn(rows, 4), [torch.zeros(1)], {"old": torch.zeros(1), "kept": torch.ones(1)}

    prepared = qgraph.prepare(model, "A8W4", example(2))
    assert not coverage(prepared).opaque
    with qgraph.disabled(prepared):
        for rows in (2, 5):
            x, log, table = example(rows)
            x2, log2, table2 = copy.deepcopy((x, log, table))
            a, b = prepared(x, log, table), model(x2, log2, table2)
            assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
            assert len(log) == 2 and torch.equal(log[1], log2[1])
            assert list(table) == list(table2) and torch.equal(table["last"], table2["last"])


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x) * self.calls


def test_a_counter_of_the_module_stays_python():
    model = Counts()
    prepared, other = qgraph.prepare(model, "A8W4", (torch.randn(3, 4),)), copy.deepcopy(model)
    assert coverage(prepared).opaque[0].reason == "counts in self.calls"
    assert "test_effects.py" in coverage(prepared).opaque[0].where
    with qgraph.disabled(prepared):
        for _ in range(12):
            x = torch.randn(3, 4)
            assert torch.equal(prepared(x), other(x))


class Sized(nn.Module):
    def forward(self, x):
        return x.flatten(1), (x.shape[1], (x.shape[2],))


class Unflattens(nn.Module):
    """Sizes that a child returns inside tuples are no constants."""

    def __init__(self):
        super().__init__()
        self.sized, self.fc = Sized(), nn.Linear(1, 2)

    def forward(self, x):
        flat, (rows, (columns,)) = self.sized(x)
        return self.fc(flat.view(-1, rows, columns, 1))


def test_sizes_in_nested_results():
    model = Unflattens()
    prepared = qgraph.prepare(model, "A8W4", (torch.randn(2, 3, 4),))
    with qgraph.disabled(prepared):
        for shape in ((2, 3, 4), (2, 5, 6)):
            x = torch.randn(shape)
            assert torch.equal(prepared(x), model(x))
    assert coverage(prepared).guard_misses == 0


class Window(nn.Module):
    """Reads the size that its caller leaves in it, and asks for it."""

    def __init__(self):
        super().__init__()
        self.fc, self.rows, self.scale = nn.Linear(4, 4), None, 1.0

    def forward(self, x):
        y = self.fc(x).view(self.rows, -1, 4) * self.scale
        return y * 2 if self.rows > 3 else y


class TellsSizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.windows = nn.ModuleList([Window(), Window()])

    def forward(self, x):
        self.sizes = (x.shape[0], x.shape[1])
        for window in self.windows:
            window.rows, window.scale = x.shape[0], x.shape[1] / 2
            x = window(x)
        return x.reshape(*self.sizes[::-1], 4)


def test_sizes_that_a_forward_leaves_in_modules_are_set_anew_at_each_call():
    model = TellsSizes()
    prepared = qgraph.prepare(model, "W4", torch.randn(2, 3, 4))
    with qgraph.disabled(prepared):
        for shape in ((2, 3, 4), (2, 3, 4), (5, 6, 4), (2, 3, 4), (5, 3, 4)):  # the second finds what it will set
            x = torch.randn(*shape)
            assert torch.equal(prepared(x), model(x))
            assert prepared.sizes == shape[:2] and prepared.windows[1].scale == shape[1] / 2
            assert type(prepared.sizes[0]) is int and type(prepared.windows[0].rows) is int
    assert not coverage(prepared).opaque


class Lazily:
    """Computes when it is called, by a size."""

    def __init__(self, x, rows):
        self.x, self.rows, self.sizes = x, rows, {"all": (rows, 4), "torch": torch.Size((rows, 4))}

    def __call__(self):
        return self.x.expand(self.rows, -1)


class ReturnsObjects(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        rows, y = x.shape[0], self.fc(x).mean(0, keepdim=True)
        return [Lazily(y, rows)], lambda: y.expand(rows, -1)


def test_no_size_stays_traced_in_what_a_forward_returns():
    prepared = qgraph.prepare(ReturnsObjects(), "W4")
    (lazily,), function = prepared(torch.randn(3, 4))  # recorded
    assert type(lazily.rows) is int and type(lazily.sizes["all"][0]) is int
    assert type(lazily.sizes["torch"][0]) is int
    assert lazily().shape == function().shape == (3, 4)


class Plain:
    def __init__(self, hidden, length):
        self.hidden, self.length = hidden, length


class Named(NamedTuple):
    hidden: torch.Tensor
    length: int


@dataclasses.dataclass
class Data:
    hidden: torch.Tensor
    length: int


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: torch.Tensor
    length: int


@pytest.mark.parametrize("kind", [Plain, Named, Data, Frozen])
def test_a_size_in_what_a_child_returns_stays_a_size(kind):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return kind(self.fc(x), x.shape[0])

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Encoder()

        def forward(self, x):
            encoded = self.encoder(x)
            return encoded.hidden.sum(0) / encoded.length, encoded.length

    model, x = Mean(), torch.randn(3, 4)
    prepared = qgraph.prepare(copy.deepcopy(model), "W4", (x,))
    assert type(prepared.encoder(x).length) is int
    with qgraph.disabled(prepared):
        for other in (x, torch.randn(5, 4)):
            mean, length = prepared(other)
            assert torch.equal(mean, model(other)[0]) and length == len(other)
    found = qgraph.inspect(prepared).coverage
    assert not found.guard_misses and not found.opaque


def test_hooks_that_a_forward_registers_once_are_taken_back():
    class Records(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.seen, self.hooked = nn.Linear(4, 4), [], False

        def forward(self, x):
            self.seen.clear()
            if not self.hooked:
                self.fc.register_forward_hook(lambda _, __, out: self.seen.append(out))
                self.hooked = True
            return self.fc(x), len(self.seen)

    x = torch.randn(3, 4)
    prepared = qgraph.prepare(Records(), "W4", (x,))
    assert not prepared.fc._forward_hooks
    assert [prepared(x)[1] for _ in range(2)] == [Records()(x)[1]] * 2
