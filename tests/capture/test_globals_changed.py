"""What a forward changes outside of all modules, or without setting it, is changed at every call."""

from __future__ import annotations

import collections
import copy
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qgraph

TABLE: dict[str, float] = {"k": 1.0}


class Options:
    gain = 1.0

    def __init__(self) -> None:
        self.calls = 0

    def count(self) -> None:
        self.calls += 1


OPTIONS = Options()


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)


MAPS: list[Any] = []


LAST: Any = None


def keep(x):
    MAPS.append(x.detach())


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


def test_sizes_that_a_forward_leaves_outside_are_plain_numbers():
    class Sized(_Layer):
        def forward(self, x):
            global LAST
            LAST = OPTIONS.calls = x.shape[0]
            TABLE[x.shape] = x.shape[1]
            MAPS.append(x.shape[0])
            self.seen = {x.shape[0]: LAST}
            return self.fc(x)

    MAPS.clear()
    prepared = qgraph.prepare(Sized(), "W4", (torch.randn(3, 4),))
    for _ in range(2):
        key, value = TABLE.popitem()
        left = [LAST, OPTIONS.calls, value, *key, *MAPS, *prepared.__dict__.get("seen", {})]
        assert {type(number) for number in left} == {int}
        prepared(torch.randn(5, 4))
    OPTIONS.calls = 0
    MAPS.clear()


def test_what_a_forward_changes_around_itself_is_changed_at_every_call():
    kind, seen = _enclosing()
    x = torch.randn(3, 4)
    prepared = qgraph.prepare(kind(), "W4", (x,))
    seen.clear()
    for _ in range(3):
        prepared(x)
    assert seen == list(range(seen[0], seen[0] + 3))


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
