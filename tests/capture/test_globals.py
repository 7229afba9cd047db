"""What a forward reads outside of all modules: a graph holds while it is the same."""

from __future__ import annotations

import copy
import pickle
import threading
import types
from contextvars import ContextVar

import pytest
import torch
from torch import nn

import qgraph

SCALE, RECTIFIED = 1.0, False
TABLE: dict[str, float] = {"k": 1.0}
SETTINGS = types.SimpleNamespace(alpha=1.0, step=0)
STRENGTH = ContextVar("STRENGTH", default=1.0)
LOCAL = threading.local()
LOCAL.strength = 1.0


class Options:
    gain = 1.0

    def __init__(self) -> None:
        self.calls, self.alpha = 0, 1.0

    def scaled(self, x):
        return x * self.alpha

    def count(self) -> None:
        self.calls += 1


class OptionsOfClass:
    gain = 1.0


OPTIONS, OPTIONS_OF_CLASS = Options(), OptionsOfClass()


def scaled(x):
    return x * SCALE


def attributes_of(options, x):
    return x * options.alpha


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)


class ByNumber(_Layer):
    def forward(self, x):
        return self.fc(x) * SCALE


class ByFlag(_Layer):
    def forward(self, x):
        return self.fc(x).relu() if RECTIFIED else self.fc(x)


class ByKey(_Layer):
    def forward(self, x):
        return self.fc(x) * TABLE["k"]


class ByAttribute(_Layer):
    def forward(self, x):
        return self.fc(x) * SETTINGS.alpha


class ByClass(_Layer):
    def forward(self, x):
        return self.fc(x) * Options.gain


class ByFunction(_Layer):
    def forward(self, x):
        return scaled(self.fc(x))


class ByMethod(_Layer):
    def forward(self, x):
        return self._scaled(self.fc(x))

    def _scaled(self, x):
        return OPTIONS.scaled(x)


class ByArgument(_Layer):
    def forward(self, x):
        return attributes_of(OPTIONS, self.fc(x))


class ByChild(_Layer):
    def __init__(self):
        super().__init__()
        self.child = ByMethod()

    def forward(self, x):
        return self.child._scaled(self.fc(x))


class ByType(_Layer):
    strength = 1.0

    def forward(self, x):
        return self.fc(x) * type(self).strength


class ByContext(_Layer):
    def forward(self, x):
        return self.fc(x) * STRENGTH.get()


class BySettings(_Layer):
    def __init__(self):
        super().__init__()
        self.options, self.kind = OPTIONS_OF_CLASS, Options

    def forward(self, x):
        return self.fc(x) * self.options.gain * self.kind.gain


class ByThread(_Layer):
    def forward(self, x):
        return self.fc(x) * LOCAL.strength


def by_number(self, x):
    return self.fc(x) * SCALE


class ByOwnForward(_Layer):
    def __init__(self):
        super().__init__()
        self.forward = types.MethodType(by_number, self)


READERS = [
    ByNumber,
    ByFlag,
    ByKey,
    ByAttribute,
    ByClass,
    ByFunction,
    ByMethod,
    ByArgument,
    ByChild,
    ByType,
    ByThread,
    ByOwnForward,
]


def _change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    monkeypatch.setitem(globals(), "RECTIFIED", True)
    monkeypatch.setitem(TABLE, "k", 2.0)
    monkeypatch.setattr(SETTINGS, "alpha", 2.0)
    monkeypatch.setattr(Options, "gain", 2.0)
    monkeypatch.setattr(OPTIONS, "alpha", 2.0)
    monkeypatch.setattr(ByType, "strength", 2.0)
    monkeypatch.setattr(OptionsOfClass, "gain", 2.0)
    monkeypatch.setattr(LOCAL, "strength", 2.0)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_global_that_changes_changes_the_outputs(kind, compiled, monkeypatch):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(3, 4)
    prepared = qgraph.prepare(copy.deepcopy(model), "W4", (x,))
    assert not qgraph.inspect(prepared).coverage.opaque
    torch._dynamo.reset()
    run = torch.compile(prepared, backend="eager") if compiled else prepared
    with qgraph.disabled(prepared):
        for change in (lambda: None, lambda: _change(monkeypatch), monkeypatch.undo):
            change()
            for _ in range(2):
                assert torch.equal(run(x), model(x))
    assert len({tuple(run(x).flatten().tolist()) for _ in range(2)}) == 1


def test_a_context_variable_that_changes_changes_the_outputs():
    model, x = ByContext(), torch.randn(3, 4)
    prepared = qgraph.prepare(copy.deepcopy(model), "W4", (x,))
    with qgraph.disabled(prepared):
        for strength in (1.0, 2.0, 1.0):
            token = STRENGTH.set(strength)
            assert torch.equal(prepared(x), model(x)) and torch.equal(prepared(x), strength * model.fc(x))
            STRENGTH.reset(token)


class ByMode(_Layer):
    def forward(self, x):
        h = self.fc(x)
        if torch.is_grad_enabled():
            h = 2 * h
        if torch.is_inference_mode_enabled():
            h = 3 * h
        return 5 * h if torch.is_autocast_enabled("cpu") else h


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mode_that_the_forward_asks_for_is_a_guard(compiled):
    model, x = ByMode(), torch.randn(3, 4)
    prepared = qgraph.prepare(copy.deepcopy(model), "W4", (x,))
    torch._dynamo.reset()
    run = torch.compile(prepared, backend="eager") if compiled else prepared
    with qgraph.disabled(prepared):
        for _ in range(2):
            assert torch.equal(run(x), model(x))
            with torch.no_grad():
                assert torch.equal(run(x), model(x))
            with torch.inference_mode():
                assert torch.equal(run(x), model(x))
            with torch.autocast("cpu"):
                assert torch.equal(run(x), model(x))


def test_each_value_has_a_graph_of_its_own_and_what_is_not_read_costs_none(monkeypatch):
    x = torch.randn(3, 4)
    prepared = qgraph.prepare(ByAttribute(), "W4", (x,)).eval()
    expected = prepared(x)
    monkeypatch.setattr(SETTINGS, "step", 1)
    assert torch.equal(prepared(x), expected) and qgraph.inspect(prepared).coverage.guard_misses == 0
    monkeypatch.setattr(SETTINGS, "alpha", 2.0)
    assert torch.equal(prepared(x), 2 * expected) and qgraph.inspect(prepared).coverage.guard_misses == 1
    assert not qgraph.inspect(prepared).coverage.opaque


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_ask_for_the_same_globals(copied, monkeypatch):
    x = torch.randn(3, 4)
    prepared = copied(qgraph.prepare(ByNumber(), "W4", (x,)))
    expected = prepared(x)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert torch.equal(prepared(x), 2 * expected)


def test_a_frozen_model_keeps_its_graphs_where_globals_differ(monkeypatch):
    x = torch.randn(3, 4)
    prepared = qgraph.prepare(ByNumber(), "W4", (x,)).eval()
    expected = prepared(x)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    both = qgraph.freeze(prepared) if torch.equal(prepared(x), 2 * expected) else None
    assert both is not None and torch.allclose(both(x), 2 * expected)
    monkeypatch.undo()
    assert torch.allclose(both(x), expected)
    alone = qgraph.freeze(qgraph.prepare(ByNumber(), "W4", (x,)).eval())
    expected = alone(x)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert torch.allclose(alone(x), expected)
