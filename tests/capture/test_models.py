"""Every model of `tests.models`: float parity bit for bit with the quantizers off, and quantized with them on."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import types

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import qgraph
from qgraph.graph import coverage, sites
from tests.models import CASES, Result


def leaves(value):
    if isinstance(value, Result):
        value = [value.logits, value.parts, value.note]
    return tree_leaves(value)


def run(model, inputs, training, **kwargs):
    """Output leaves and gradients of one forward and backward from the same random state."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(7)
    inputs = tree_map_only(torch.Tensor, lambda t: t.clone(), inputs)
    out = leaves(model(*inputs, **kwargs))
    tensors = [x for x in out if isinstance(x, torch.Tensor) and x.requires_grad]
    sum((t.float() ** 2).sum() for t in tensors).backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def make(name):
    torch.manual_seed(0)
    case = CASES[name]
    return case, case.make(), case.inputs(0), case.inputs(1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("example", [True, False], ids=["example", "lazy"])
def test_with_quantizers_off_outputs_and_gradients_are_bit_for_bit_those_of_the_original(name, example):
    case, model, first, second = make(name)
    prepared = qgraph.prepare(model, "A8W4", first if example else None)
    names = [n for n, _ in model.named_parameters()]
    for inputs in (first, second, first):
        for training in (False, True):
            with qgraph.disabled(prepared):
                out, grads = run(prepared, inputs, training)
            expected, expected_grads = run(copy.deepcopy(model), inputs, training)
            assert len(out) == len(expected) and all(same(a, b) for a, b in zip(out, expected, strict=True))
            assert set(grads) == set(expected_grads)
            assert all(torch.equal(grads[n], expected_grads[n]) for n in names if n in grads)
            model.load_state_dict(prepared.state_dict())  # batch norm statistics went on


@pytest.mark.parametrize("name", CASES)
def test_with_quantizers_on_every_site_is_quantized_and_gradients_are_finite(name):
    case, model, first, second = make(name)
    prepared = qgraph.prepare(model, "A4W2", first)
    found = coverage(prepared)
    assert found.graphs > 0
    assert bool(found.opaque) == case.opaque, found.opaque
    assert found.sites == found.sites_quantized > 0
    for inputs in (first, second):
        expected, expected_grads = run(copy.deepcopy(model), inputs, True)
        out, grads = run(prepared, inputs, True)
        assert not all(same(a, b) for a, b in zip(out, expected, strict=True))
        assert set(expected_grads) <= set(grads)
        assert all(torch.isfinite(g).all() for g in grads.values())
    if not case.opaque and name not in ("self_named",):
        assert coverage(prepared).guard_misses == 0


@pytest.mark.parametrize("name", CASES)
def test_lazy_capture_computes_what_an_early_one_does(name):
    case, model, first, second = make(name)
    early, late = qgraph.prepare(model, "A4W2", first), qgraph.prepare(model, "A4W2")
    for inputs in (first, second, first):
        for training in (False, True):
            a, ga = run(early, inputs, training)
            b, gb = run(late, inputs, training)
            assert all(same(x, y) for x, y in zip(a, b, strict=True))
            assert all(torch.equal(ga[n], gb[n]) for n in ga)
    assert {s.name for s in sites(early)} == {s.name for s in sites(late)}


@pytest.mark.parametrize("name", CASES)
def test_a_first_call_in_inference_mode_is_captured_as_any_other(name):
    _, model, first, _ = make(name)
    ours, other = qgraph.prepare(model.eval(), "A4W2"), qgraph.prepare(model, "A4W2")
    with torch.no_grad():
        expected = leaves(ours(*first))
    with torch.inference_mode():
        out = leaves(other(*tree_map_only(torch.Tensor, lambda t: t.clone(), first)))
    assert all(same(a, b) for a, b in zip(out, expected, strict=True))
    assert coverage(other).graphs == coverage(ours).graphs


class TypeSensitive(torch.nn.Module):
    """Fails while it is recorded, in the middle of its forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        if self.training and type(x.shape[0]) is not int:
            raise ValueError("not an int")
        return self.second(x)


def test_a_forward_that_cannot_be_recorded_is_quantized_all_the_same():
    x = torch.randn(2, 4)
    prepared = qgraph.prepare(TypeSensitive(), "W2", (x,))
    for training in (False, True):
        prepared.train(training)
        with torch.no_grad():
            ours = prepared(x)
            for part in (prepared.first, prepared.second):
                with qgraph.disabled(prepared, part.qgraph.weight.site):
                    assert not torch.equal(ours, prepared(x))


@pytest.mark.parametrize("name", CASES)
def test_keys_class_deepcopy_and_pickle(name):
    case, model, first, second = make(name)
    prepared = qgraph.prepare(model, "A4W2", first)
    assert isinstance(prepared, type(model)) and type(prepared).__name__ == type(model).__name__
    assert list(prepared.state_dict()) == list(model.state_dict())
    assert [n for n, _ in prepared.named_parameters()] == [n for n, _ in model.named_parameters()]
    expected, _ = run(prepared, first, False)
    others = [copy.deepcopy(prepared)]
    if name != "parametrized":  # torch does not pickle those either
        others.append(pickle.loads(pickle.dumps(prepared)))
    for other in others:
        out, _ = run(other, first, False)
        assert all(same(a, b) for a, b in zip(out, expected, strict=True))
        other.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
        assert all(same(a, b) for a, b in zip(run(prepared, first, False)[0], expected, strict=True))


def _no_grad(m, x):
    with torch.no_grad():
        y = m.first(x)
    return y, m.second(y)


def _switch(m, x):
    with torch.set_grad_enabled(False):
        y = m.first(x)
    return y, m.second(y)


def _enable_grad(m, x):
    with torch.enable_grad():
        with torch.no_grad():
            y = m.first(x)
        with torch.enable_grad(), torch.set_grad_enabled(True):
            z = m.first(x)
        w = m.second(z)
    return y, z, w, m.second(z)


@torch.no_grad()
def _decorated(m, x):
    return m.first(x)


def _calls_decorated(m, x):
    return _decorated(m, x), m.second(x)


def _bare_switch(m, x):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    y = m.first(x)
    torch.set_grad_enabled(before)
    return y, m.second(x)


@pytest.mark.parametrize("body", [_no_grad, _switch, _enable_grad, _calls_decorated, _bare_switch])
@pytest.mark.parametrize("recorded", [True, False])
def test_gradients_switched_in_a_forward_are_as_in_eager_whatever_the_caller_has_set(body, recorded):
    class Switching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return body(self, x)

    model, x = Switching(), torch.randn(2, 4)
    with torch.set_grad_enabled(recorded):
        prepared = qgraph.prepare(model, "A8W4", (x,))
    for now in (True, False):
        with torch.set_grad_enabled(now):
            ours = prepared(x)
            assert torch.is_grad_enabled() is now
            assert [y.requires_grad for y in ours] == [y.requires_grad for y in model(x)]


class Configured(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.config = torch.nn.Linear(4, 4), types.SimpleNamespace(scale=2.0, names={"a": 1}, sizes=[1, 2])

    def forward(self, x):
        return self.fc(x) * self.config.scale


class SkipsFullMasks(torch.nn.Module):
    """As masks are made in transformers: looked into, except while compiling."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), Configured()

    def forward(self, x, mask):
        if not torch.compiler.is_compiling() and bool(mask.all()):
            return self.second(self.first(x))
        return self.second(self.first(x) * mask)


def test_a_forward_left_python_compiles_in_one_graph_where_it_has_no_site_itself():
    x, mask = torch.randn(3, 4), torch.ones(3, 1)
    prepared = qgraph.prepare(SkipsFullMasks(), "A8W4", (x, mask))
    assert coverage(prepared).opaque
    torch._dynamo.reset()
    compiled = torch.compile(prepared, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask), prepared(x, mask))


class Experts(torch.nn.Module):
    """As in transformers: a grouped product, except while compiling, which takes none in float32."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x, ends):
        if torch.compiler.is_compiling():
            return torch.cat([x[:3] @ self.w[0], x[3:] @ self.w[1]])
        return torch.nn.functional.grouped_mm(x, self.w, offs=ends)


def test_a_graph_with_a_grouped_product_runs_under_compile():
    args = torch.randn(6, 8), torch.tensor([3, 6], dtype=torch.int32)
    prepared = qgraph.prepare(Experts(), "W4", args)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(prepared, backend="eager")(*args), prepared(*args))


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


class TakesPair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, pair):
        return self.fc(pair.x) + pair.y


class GivesPair(torch.nn.Module):
    """The weight's other operand comes from a child whose tensors are inside of an object."""

    def __init__(self, branches):
        super().__init__()
        self.child, self.w, self.branches = TakesPair(), torch.nn.Parameter(torch.randn(4, 4)), branches

    def forward(self, x):
        y = self.child(Pair(x, x)) @ self.w
        return y if not self.branches or y.sum() > 0 else -y


@pytest.mark.parametrize("branches", [True, False])
def test_what_a_child_makes_of_an_object_with_tensors_is_data(branches):
    prepared = qgraph.prepare(GivesPair(branches), "A8W4", torch.randn(2, 4))
    assert {s.name: s.reason for s in sites(prepared)} == {"child.fc.weight": None, "w": None}
    assert bool(coverage(prepared).opaque) is branches
