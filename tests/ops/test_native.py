"""The compiled passes: the same numbers as the general ones, in every layout, and torch operations where they fail."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from ops_cases import SHAPES, groupings, seeds, sparsities, specs, values

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.ops import Groups, ddt_cpu, fake_quantize, native, quantize, reference, sparsify, sparsity_mask

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler: torch operations run alone")
cases = st.sampled_from((*SHAPES, (2, 4200))).flatmap(lambda s: st.tuples(st.just(s), groupings(s), seeds))


def value_and_gradient(x, spec, groups, sparsity=None):
    x = x.clone().requires_grad_()
    pruned = x if sparsity is None else sparsify(x, sparsity, groups)
    y = fake_quantize(pruned, spec, groups, dense=None if sparsity is None else x)
    h = torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x.dtype)
    return y.detach(), torch.autograd.grad(y, x, h)[0]


@given(cases, specs(methods=("ddt", "ste")), st.one_of(st.none(), sparsities()))
def test_values_and_gradients_are_those_of_float64(case, spec, sparsity):
    """Which torch operations compute. Where codes are equal: a value on a tie may fall on either side."""
    shape, groups, seed = case
    spec, x = replace(spec, lam=max(spec.lam, 0.01)), values(seed, shape, torch.float32)
    sparsity = sparsity if spec.scheme == "linear" else None
    results = []
    for w in (x, x.double()):
        pruned = w if sparsity is None else sparsify(w, sparsity, groups)
        codes = quantize(pruned, spec, groups, dense=None if sparsity is None else w).codes
        results.append((codes, *value_and_gradient(w, spec, groups, sparsity)))
    (codes, y, grad), (codes64, y64, grad64) = results
    assume(torch.equal(codes, codes64))
    torch.testing.assert_close(y.double(), y64, rtol=0, atol=2e-6 * max(float(x.abs().max()), 1.0))
    # A position f = (x - b) / s carries an error of eps |x| / s, up to levels * eps * |x| / range.
    torch.testing.assert_close(grad.double(), grad64, rtol=1e-3, atol=1e-3)


@given(cases, specs(methods=("ddt",)), st.sampled_from((torch.float32, torch.bfloat16)))
def test_deployed_codes_are_those_of_training(case, spec, dtype):
    shape, groups, seed = case
    x = values(seed, shape, dtype)
    y, deployed = fake_quantize(x, spec, groups), quantize(x, spec, groups)
    # Distinct values of a group are distinct codes: both tell the same values apart.
    for found, codes in zip(groups.pieces(y.float()), groups.pieces(deployed.codes.float()), strict=True):
        for row, code in zip(found.flatten(0, 1), codes.flatten(0, 1), strict=True):
            assert len(torch.stack([row, code]).unique(dim=1)[0]) == len(code.unique()) or dtype == torch.bfloat16


@given(cases, sparsities(), st.sampled_from((torch.float32, torch.bfloat16)))
def test_pruning_is_a_product_with_the_mask(case, sparsity, dtype):
    shape, groups, seed = case
    w = values(seed, shape, dtype)
    mask = reference.sparsity_mask(w, sparsity, groups)
    assert torch.equal(sparsity_mask(w, sparsity, groups), mask)
    pruned, product = sparsify(w, sparsity, groups), w * mask
    assert torch.equal(pruned, product)
    assert torch.equal(pruned.signbit(), product.signbit())


@pytest.mark.parametrize("pattern", ["2:4", "3:5", "60%"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pruned_infinity_shows(pattern, dtype):
    w = torch.full((2, 20), float("inf")).to(dtype)
    w[1] = float("nan")
    pruned = sparsify(w, SparsitySpec.parse(pattern), Groups("channel"))
    assert pruned[0].isnan().any() and pruned[0].isinf().any() and pruned[1].isnan().all()


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(1.58), QuantSpec(1, "linear")], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(spec, monkeypatch):
    monkeypatch.setattr(native, "VALUES_A_THREAD", 16)
    x = torch.randn(37, 50, generator=torch.Generator().manual_seed(0))
    alone = value_and_gradient(x, spec, Groups("channel"))
    previous = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        together = value_and_gradient(x, spec, Groups("channel"))
    finally:
        torch.set_num_threads(previous)
    assert all(map(torch.equal, alone, together))


def test_a_group_gives_the_same_wherever_it_stands():
    """Bit for bit: alone, among others, in blocks of a longer row."""
    x, spec = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), QuantSpec(3)
    whole = value_and_gradient(x, spec, Groups("channel", 0, 16))[0]
    for i in range(6):
        assert torch.equal(value_and_gradient(x[i : i + 1], spec, Groups("token", 0, 16))[0][0], whole[i])


def test_a_sum_over_millions_keeps_its_digits():
    x = torch.rand(1, 3_000_000, generator=torch.Generator().manual_seed(0)) + 100
    y = fake_quantize(x, QuantSpec(8), Groups("tensor"))
    assert abs(float((y.double() - x.double()).mean())) < 3.9e-6  # the mean is carried, rounded to half an ulp of 100


def test_threads_may_ask_at_once():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    expected, found = fake_quantize(x, QuantSpec(4), Groups("channel")), []
    workers = [
        threading.Thread(target=lambda: found.append(fake_quantize(x, QuantSpec(4), Groups("channel"))))
        for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 8
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.parametrize("found", [None, native.library()], ids=["torch", "compiled"])
def test_the_default_device_plays_no_part(found, monkeypatch):
    monkeypatch.setattr(native, "_loaded", [found])
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    expected = value_and_gradient(x, QuantSpec(4), Groups("channel"))
    h, leaf = torch.linspace(-1, 1, 60).reshape(3, 20), x.clone().requires_grad_()
    with torch.device("meta"):
        y = fake_quantize(leaf, QuantSpec(4), Groups("channel"))
        y.backward(h)
    assert torch.equal(y, expected[0]) and torch.equal(leaf.grad, expected[1])


def test_a_negated_view_is_read_as_what_it_stands_for():
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    expected = fake_quantize(-x, QuantSpec(4), Groups("channel"))
    torch.testing.assert_close(fake_quantize(torch._neg_view(x), QuantSpec(4), Groups("channel")), expected)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As at the start of a process, with a cache folder of its own."""
    monkeypatch.setattr(native, "_loaded", [])
    monkeypatch.setenv("QGRAPH_CACHE", str(tmp_path))
    return tmp_path


def test_a_compiler_that_fails_is_a_warning_and_no_error(fresh, monkeypatch):
    failing = fresh / "c++"
    failing.write_text("#!/bin/sh\necho 'kernels.cpp: no such instruction' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        assert native.library() is None
    assert fake_quantize(torch.randn(2, 8), QuantSpec(4), Groups("channel")).shape == (2, 8)
    assert not list((fresh / "qgraph").iterdir())


@pytest.mark.parametrize("names", [{"QGRAPH_NATIVE": "0"}, {"CXX": "no-such-compiler"}], ids=str)
@pytest.mark.filterwarnings("error")
def test_without_a_compiler_nothing_is_said(fresh, monkeypatch, names):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert native.library() is None
    found = value_and_gradient(torch.randn(3, 20), QuantSpec(4), Groups("channel"))
    assert found[0].shape == (3, 20)


def test_a_library_that_does_not_load_is_built_anew(fresh, monkeypatch):
    built = native._opened
    path = fresh / "qgraph" / f"kernels-{native._digest(native._command())}.so"
    path.parent.mkdir()
    path.write_bytes(b"cut short")
    compiled = []

    def pretend(command, target):
        compiled.append(target)
        return target

    monkeypatch.setattr(native, "_built", pretend)
    monkeypatch.setattr(native, "_opened", lambda p: built(p) if not compiled else "the new one")
    assert native.library() == "the new one"
    assert compiled == [path]


def test_fallback_is_covered_too():
    """The chunked torch operations stay the ones that the tests of the formulas know."""
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "applies", lambda *_: False)
        calls = []
        forward = ddt_cpu.forward
        patch.setattr(ddt_cpu, "forward", lambda *args: calls.append(1) or forward(*args))
        fake_quantize(copy.deepcopy(x), QuantSpec(4), Groups("channel"))
    assert calls
