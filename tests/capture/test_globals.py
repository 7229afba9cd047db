"""What a forward reads and changes outside of all modules: a graph holds while it is the same; a change is made."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import pickle
import random
import threading
import types
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qgraph

SCALE, RECTIFIED = 1.0, False
TABLE: dict[str, float] = {"k": 1.0}
SETTINGS = types.SimpleNamespace(alpha=1.0, step=0)
MAPS: list[Any] = []
LAST: Any = None
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


OPTIONS = Options()


def scaled(x):
    return x * SCALE


def keep(x):
    MAPS.append(x.detach())


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


class ToList(_Layer):
    def forward(self, x):
        h = self.fc(x)
        MAPS.append(h.detach())
        return h


class ToListElsewhere(_Layer):
    def forward(self, x):
        h = self.fc(x)
        keep(h)
        return h


class ToKey(_Layer):
    def forward(self, x):
        TABLE["calls"] = TABLE.get("calls", 0) + 1
        return self.fc(x)


class ToGlobal(_Layer):
    def forward(self, x):
        global LAST
        LAST = self.fc(x)
        return LAST


class ToObject(_Layer):
    def forward(self, x):
        OPTIONS.count()
        return self.fc(x)


class ToClass(_Layer):
    def forward(self, x):
        Options.gain += 1
        return self.fc(x)


def _enclosing() -> tuple[type, list[int]]:
    calls = 0
    seen: list[int] = []

    class ToEnclosed(_Layer):
        def forward(self, x):
            nonlocal calls
            calls += 1
            seen.append(calls)
            return self.fc(x)

    return ToEnclosed, seen


def _left_by(run: Any, x: torch.Tensor) -> Any:
    """What two runs leave outside of the model."""
    globals()["LAST"], OPTIONS.calls, Options.gain = None, 0, 1.0
    MAPS.clear()
    TABLE.pop("calls", None)
    for _ in range(2):
        run(x)
    return [m.tolist() for m in MAPS], dict(TABLE), LAST is not None and LAST.tolist(), OPTIONS.calls, Options.gain


@pytest.mark.parametrize("kind", [ToList, ToListElsewhere, ToKey, ToGlobal, ToObject, ToClass])
def test_what_a_forward_changes_outside_is_changed_at_every_call(kind):
    model, x = kind(), torch.randn(3, 4)
    prepared = qgraph.prepare(copy.deepcopy(model), "W4", (x,))
    with qgraph.disabled(prepared):
        assert _left_by(prepared, x) == _left_by(model, x) != _left_by(lambda _: None, x)
    (opaque, *_) = qgraph.inspect(prepared).coverage.opaque
    assert "outside of the model" in opaque.reason and __file__ in opaque.where


def test_what_a_forward_changes_around_itself_is_changed_at_every_call():
    kind, seen = _enclosing()
    x = torch.randn(3, 4)
    prepared = qgraph.prepare(kind(), "W4", (x,))
    seen.clear()
    for _ in range(3):
        prepared(x)
    assert seen == list(range(seen[0], seen[0] + 3))


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


class ToDefault(_Layer):
    def forward(self, x, calls=[]):  # noqa: B006
        calls.append(0)
        return self.fc(x) * len(calls)


class ToIterator(_Layer):
    def __init__(self):
        super().__init__()
        self.state = itertools.count()

    def forward(self, x):
        return self.fc(x) * next(self.state)


class ToSet(_Layer):
    def __init__(self):
        super().__init__()
        self.state: set[int] = set()

    def forward(self, x):
        self.state.add(len(self.state))
        return self.fc(x) * len(self.state)


class ToQueue(_Layer):
    def __init__(self):
        super().__init__()
        self.state: Any = collections.deque(maxlen=20)

    def forward(self, x):
        self.state.append(self.fc(x).detach())
        return self.state[-1] * len(self.state)


class ToArray(_Layer):
    def __init__(self):
        super().__init__()
        self.state = np.zeros(2)

    def forward(self, x):
        self.state[0] += 1
        return self.fc(x) * float(self.state[0])


class ToRandom(_Layer):
    def __init__(self):
        super().__init__()
        self.state = random.Random(0)

    def forward(self, x):
        return self.fc(x) * self.state.random()


class ToGenerator(_Layer):
    def __init__(self):
        super().__init__()
        self.state = np.random.default_rng(0)

    def forward(self, x):
        return self.fc(x) * float(self.state.random())


@pytest.mark.parametrize("kind", [ToDefault, ToIterator, ToSet, ToQueue, ToArray, ToRandom, ToGenerator])
def test_what_changes_without_being_set_changes_at_every_call(kind):
    model, x = kind(), torch.randn(3, 4)
    prepared = qgraph.prepare(copy.deepcopy(model), "W4", (x,))
    (opaque, *_) = qgraph.inspect(prepared).coverage.opaque
    assert opaque.reason in ("changes self.state in forward", "changes the default of an argument")
    defaults = ToDefault.forward.__defaults__[0]
    outputs, state = [], copy.deepcopy(vars(prepared).get("state"))
    for run in (prepared, model):
        run.state = copy.deepcopy(state)
        defaults.clear()
        with qgraph.disabled(prepared):
            outputs.append([run(x) for _ in range(3)])
    assert all(map(torch.equal, *outputs)) and not torch.equal(outputs[0][0], outputs[0][1])


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


def test_a_tensor_of_an_earlier_call_is_no_constant():
    class Remembering(_Layer):
        def forward(self, x):
            h = self.fc(x)
            if MAPS:
                h = h + MAPS[-1]
            MAPS.append(h.detach())
            return h

    MAPS.clear()
    x = torch.randn(3, 4)
    prepared = qgraph.prepare(Remembering(), "W4", (x,)).eval()
    with qgraph.disabled(prepared):
        MAPS.clear()
        once = prepared(x)
        assert torch.allclose(prepared(x), 2 * once) and torch.allclose(prepared(x), 3 * once)
    MAPS.clear()
