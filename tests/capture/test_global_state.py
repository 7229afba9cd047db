"""Capture leaves nothing behind: no patch, no mode, no random number drawn, whatever happens and on any thread."""

from __future__ import annotations

import copy
import random
import sys
import threading

import numpy as np
import pytest
import torch
import torch._dynamo.eval_frame  # so that there is a compiler to keep still
from torch import nn
from torch.nn import functional as F

import qgraph
from qgraph.capture.opaque import Running
from qgraph.capture.patches import _INHERITED, PATCHED
from qgraph.capture.session import active, capturing, current
from qgraph.graph import coverage


def attributes():
    """What stands at each of the patched attributes now."""
    owners = [(sys.modules[owner] if isinstance(owner, str) else owner, name) for owner, name in PATCHED]
    return [owner.__dict__.get(name, _INHERITED) for owner, name in owners]


def modes():
    return (
        torch._C._len_torch_function_stack(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(), active.count, Running.count, current(),
    )  # fmt: skip


def random_numbers():
    return random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture(autouse=True)
def nothing_is_left():
    before, found = attributes(), modes()
    yield
    assert all(a is b for a, b in zip(attributes(), before, strict=True))
    assert modes() == found


class Net(nn.Module):
    """Reads, assigns, draws, and branches on a size."""

    def __init__(self, width=4):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(width, width), nn.Linear(width, width), None
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.last = x.shape[0] > 2
        self.seen += 1
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            noise = F.dropout(torch.ones_like(x), 0.5, self.training)
        return self.b(torch.relu(self.a(x)) * noise) * (2 if x.shape[0] > 2 else 1)


def test_inside_a_capture_the_list_is_what_is_replaced():

    before = attributes()
    with capturing(quantize=False):
        assert not any(a is b for a, b in zip(attributes(), before, strict=True))
        with capturing(quantize=False) as inner:
            assert current() is inner
        assert current() is not None and not any(a is b for a, b in zip(attributes(), before, strict=True))
    assert current() is None


def test_what_is_not_on_the_list_is_not_replaced():
    from qgraph.capture.patches import _patches

    with pytest.raises(KeyError, match="list it in PATCHED"):
        _patches.replace(nn.Module, "train", None)


def test_capturing_draws_no_random_number_and_leaves_buffers_and_attributes():
    model, x = Net(), torch.randn(3, 4)
    drawn = random_numbers()
    prepared = qgraph.prepare(model, "A8W4", (x,), inplace=True)
    assert random_numbers() == drawn
    assert model is prepared and model.last is None and model.seen == 0 and model.training


class Fails(nn.Module):
    """Raises in the middle of its own code, below an autocast block, after a child has run."""

    def __init__(self):
        super().__init__()
        self.first, self.fail = nn.Linear(4, 4), True

    def forward(self, x):
        x = self.first(x)
        with torch.autocast("cpu"), torch.no_grad():
            if self.fail:
                raise ValueError("as asked")
        return x * x.shape[0]


def test_a_forward_that_raises_while_it_is_captured():
    model = nn.Sequential(nn.Linear(4, 4), Fails())
    x = torch.randn(2, 4)
    before = attributes()
    with pytest.raises(qgraph.CaptureError, match="ValueError: as asked"):
        qgraph.prepare(model, "W4", (x,))
    assert all(a is b for a, b in zip(attributes(), before, strict=True))
    prepared = qgraph.prepare(model, "W4")
    for _ in range(2):
        with pytest.raises(ValueError, match="as asked"):
            prepared(x)
        assert all(a is b for a, b in zip(attributes(), before, strict=True))
    model[1].fail = prepared[1].fail = False
    with qgraph.disabled(prepared):
        assert torch.equal(prepared(x), model(x))
    assert not torch.equal(prepared(x), model(x))


class Stops(nn.Module):
    """Stops in its forward until another thread is in its own."""

    def __init__(self, net):
        super().__init__()
        self.net, self.out = net, nn.Linear(4, 4)

    def forward(self, x):
        x = self.net(x)
        if MEETINGS:
            MEETINGS[-1].wait(60)
        return self.out(x)


MEETINGS: list[threading.Barrier] = []


def on_threads(*functions):
    """The results of functions that ran at the same time."""
    results: dict[int, object] = {}

    def run(i, function):
        try:
            results[i] = function()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(isinstance(result, BaseException) for result in results.values()), results
    return [results[i] for i in range(len(functions))]


def right(prepared, model, x):
    with qgraph.disabled(prepared):
        assert torch.equal(prepared(x), model(x))
    assert not torch.equal(prepared(x), model(x))
    found = coverage(prepared)
    assert not found.opaque and found.sites == found.sites_quantized == 3


@pytest.fixture
def meeting():
    MEETINGS.append(threading.Barrier(2))
    yield
    MEETINGS.clear()


@pytest.mark.parametrize("example", [True, False], ids=["example", "lazy"])
def test_two_models_are_captured_on_two_threads_at_once(meeting, example):
    torch.manual_seed(0)
    models = [Stops(Net()).eval() for _ in range(2)]
    x = torch.randn(3, 4)

    def prepare(model):
        prepared = qgraph.prepare(model, "W4", (x,) if example else None)
        return prepared, None if example else prepared(x)

    done = on_threads(*(lambda m=model: prepare(m) for model in models))
    MEETINGS.clear()
    for model, (prepared, result) in zip(models, done, strict=True):
        right(prepared, model, x)
        assert result is None or torch.equal(result, prepared(x))


@pytest.mark.parametrize("method", ["ddt", "lsq"])
def test_one_model_is_captured_by_two_threads_at_once(meeting, method):
    torch.manual_seed(0)
    model = Stops(Net()).eval()
    weight = qgraph.QuantSpec(4, method=method)
    prepared = qgraph.prepare(model, qgraph.QConfig(weight=weight))
    x = torch.randn(3, 4)
    results = on_threads(lambda: prepared(x), lambda: prepared(x))
    MEETINGS.clear()
    assert all(torch.equal(result, prepared(x)) for result in results)
    right(prepared, model, x)
    assert all(len(module._qgraph.variants) == 1 for module in (prepared, prepared.out))


def test_a_thread_that_captures_nothing_goes_on_undisturbed(meeting):
    torch.manual_seed(0)
    model, other = Stops(Net()).eval(), Net().eval()
    x = torch.randn(3, 4)
    expected = copy.deepcopy(other)(x)

    def plain():
        MEETINGS[-1].wait(60)  # the other thread is in the middle of its capture
        return other(x)

    prepared = qgraph.prepare(model, "W4")
    captured, found = on_threads(lambda: prepared(x), plain)
    MEETINGS.clear()
    assert torch.equal(found, expected) and torch.equal(captured, prepared(x))


class Frozen(dict):
    def clear(self):
        raise TypeError("frozen")

    update = clear


class Remembers(nn.Module):
    """Keeps its last result under a private name, and a config that takes no change."""

    def __init__(self):
        super().__init__()
        self.fc, self._config = nn.Linear(8, 8), Frozen(width=8)

    def forward(self, x):
        self._last = self.fc(x)
        return self._last


def test_private_attributes_are_put_back_too():
    prepared = qgraph.prepare(nn.Sequential(Remembers()), "W2", torch.ones(2, 8))
    assert "_last" not in vars(prepared[0])
    copy.deepcopy(prepared)  # torch copies no result that has a gradient
