"""Remembered weights: computed once, the same values and gradients, and never a stale one."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from ops_cases import groupings, seeds, specs, values
from torch import nn

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.modules import Sparsifier, WeightQuantizer
from qgraph.ops import Groups, fake_quantize, memo, native, sparsify

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler: nothing is remembered")
SPEC, CHANNELS = QuantSpec(4), Groups("channel")


@pytest.fixture
def count(monkeypatch):
    """How often the compiled forward pass ran."""
    calls = []
    forward = native.forward
    monkeypatch.setattr(native, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    return calls


def make(shape=(6, 32), spec=SPEC):
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return weight, WeightQuantizer(spec, CHANNELS, "weight")


def fresh(weight, spec=SPEC):
    return fake_quantize(weight.detach().clone(), spec, CHANNELS)


@given(specs(methods=("ddt",)), st.sampled_from(((3, 10), (4, 33), (3, 4, 3, 3))).flatmap(
    lambda shape: st.tuples(st.just(shape), groupings(shape))), seeds, st.booleans())  # fmt: skip
def test_a_remembered_value_has_the_same_bits_and_gradient(spec, case, seed, sparse):
    shape, groups = case
    weight = values(seed, shape, torch.float32).requires_grad_()
    assume(native.quantizes(spec, weight))
    quantizer = WeightQuantizer(spec, groups, "weight")
    sparsifier = Sparsifier(SparsitySpec.parse("2:4"), groups, "weight") if sparse and spec.scheme == "linear" else None
    h, found = torch.linspace(-1, 1, weight.numel()).reshape(shape), []
    for _ in range(5):
        y = quantizer(weight) if sparsifier is None else quantizer(sparsifier(weight), weight)
        found.append((y.detach().clone(), *torch.autograd.grad(y, weight, h)))
    assert quantizer.memo.bytes >= weight.numel() * 4
    assert sparsifier is None or sparsifier.memo.bytes == weight.numel() * 4
    for value, grad in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(grad, found[0][1], rtol=0, atol=0, equal_nan=True)


def test_an_evaluation_quantizes_once_and_a_plain_loop_holds_nothing(count):
    weight, quantizer = make()
    with torch.no_grad():
        for _ in range(10):
            quantizer(weight)
    assert len(count) == 2  # once to meet it, once to keep it
    assert quantizer.memo.bytes == weight.numel() * 4 + 6 * 6 * 4
    optimizer = torch.optim.SGD([weight], 0.1)
    for _ in range(5):
        quantizer(weight).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(count) == 6  # the first batch met the weight of the evaluation
    assert quantizer.memo.bytes == 0


def test_accumulated_gradients_quantize_once_a_step(count):
    weight, quantizer = make()
    twin = nn.Parameter(weight.detach().clone())
    optimizer = torch.optim.AdamW([weight, twin], 0.05)
    for _ in range(4):
        del count[:]
        for batch in range(3):
            h = torch.full_like(weight, 1.0 + batch)
            (quantizer(weight).square() * h).sum().backward()
            (fake_quantize(twin, SPEC, CHANNELS).square() * h).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(weight, twin)
    assert len(count) == 3 + 1  # the twin's, and one


def edit_data(weight):
    weight.data[0, 0] += 0.5


def assign_data(weight):
    weight.data = weight.data * 2


def copy_without_a_trace(weight):
    weight.detach().numpy()[1, 3] = 7.0


def swap_rows(weight):
    weight.data.copy_(weight.data.flip(0))


def negate(weight):
    weight.data.neg_()


def in_place(weight):
    with torch.no_grad():
        weight.clamp_(-0.5, 0.5)


def load(weight):
    module = nn.Module()
    module.weight = weight
    module.load_state_dict({"weight": torch.full_like(weight, 0.25) + torch.arange(32)})


def step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], 0.1, fused=True).step()
    weight.grad = None


def back_and_forth(weight):
    """Memory that is freed and given out again must not pass for the memory that was."""
    for _ in range(3):
        weight.data = weight.data + 1
        gc.collect()


EDITS = (edit_data, assign_data, copy_without_a_trace, swap_rows, negate, in_place, load, step, back_and_forth)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("grad", [False, True], ids=["eval", "train"])
def test_every_change_of_the_weight_is_seen(edit, grad):
    weight, quantizer = make()
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            quantizer(weight)
        assert quantizer.memo.bytes
        before = fresh(weight)
        edit(weight)
        for _ in range(3):
            y = quantizer(weight)
            assert torch.equal(y, fresh(weight))
            assert not torch.equal(y, before)


def test_a_change_of_the_spec_or_of_what_was_given_out_is_seen():
    weight, quantizer = make()
    with torch.no_grad():
        for _ in range(3):
            y = quantizer(weight)
        y.zero_()
        assert torch.equal(quantizer(weight), fresh(weight))
        quantizer.spec = QuantSpec(2)
        assert torch.equal(quantizer(weight), fresh(weight, QuantSpec(2)))


def test_a_new_ratio_is_seen_by_the_sparsifier_and_by_what_follows():
    weight, quantizer = make(spec=QuantSpec(4, "linear"))
    sparsifier = Sparsifier(SparsitySpec.parse("50%"), CHANNELS, "weight")
    with torch.no_grad():
        for pattern in ("50%", "50%", "50%", "75%", "75%", "50%"):
            sparsifier.sparsity = SparsitySpec.parse(pattern)
            pruned = sparsify(weight.detach().clone(), sparsifier.sparsity, CHANNELS)
            expected = fake_quantize(pruned, quantizer.spec, CHANNELS, dense=weight.detach().clone())
            assert torch.equal(quantizer(sparsifier(weight), weight), expected)


def test_masks_that_are_frozen_are_seen():
    weight, _ = make()
    sparsifier = Sparsifier(SparsitySpec.parse("50%"), CHANNELS, "weight")
    sparsifier.frozen = True
    with torch.no_grad():
        for first in (True, False):
            sparsifier.mask = torch.arange(weight.numel()).reshape(weight.shape) % 2 == int(first)
            for _ in range(3):
                assert torch.equal(sparsifier(weight), weight * sparsifier.mask)
            assert sparsifier.memo.bytes
        weight.data[0, 0] += 1
        assert torch.equal(sparsifier(weight), weight * sparsifier.mask)


def test_train_after_inference_mode():
    weight, quantizer = make()
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(quantizer(weight), fresh(weight))
    y = quantizer(weight)
    y.sum().backward()
    expected = weight.detach().clone().requires_grad_()
    fake_quantize(expected, SPEC, CHANNELS).sum().backward()
    assert torch.equal(weight.grad, expected.grad)


def test_checkpointing_and_second_derivatives():
    weight, quantizer = make()
    reference = weight.detach().clone().requires_grad_()
    for _ in range(3):
        y = torch.utils.checkpoint.checkpoint(lambda: quantizer(weight).pow(3), use_reentrant=False)
        (found,) = torch.autograd.grad(y.sum(), weight)
        (expected,) = torch.autograd.grad(fake_quantize(reference, SPEC, CHANNELS).pow(3).sum(), reference)
        assert torch.equal(found, expected)
        (first,) = torch.autograd.grad(quantizer(weight).pow(3).sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        (first,) = torch.autograd.grad(
            fake_quantize(reference, SPEC, CHANNELS).pow(3).sum(), reference, create_graph=True
        )
        assert torch.equal(second, torch.autograd.grad(first.square().sum(), reference)[0])


def test_copies_and_pickles_hold_nothing():
    weight, quantizer = make()
    with torch.no_grad():
        for _ in range(3):
            quantizer(weight)
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert other.memo.bytes == 0
        assert torch.equal(other(weight), quantizer(weight))


def test_memory_is_bounded_and_given_back(monkeypatch):
    account = memo._Account()
    monkeypatch.setattr(memo, "_account", account)
    weight, quantizer = make()
    other, second = make()
    size = weight.numel() * 4 + 6 * 6 * 4
    memo.set_limit(size)
    with torch.no_grad():
        for _ in range(3):
            quantizer(weight)
            second(other)
        assert (quantizer.memo.bytes, second.memo.bytes, account.held) == (size, 0, size)
        quantizer.memo.clear()
        assert account.held == 0
        second(other)
        assert second.memo.bytes == account.held == size
        del second
        gc.collect()
        assert account.held == 0


def test_a_fingerprint_sees_every_bit():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(70_003, generator=generator).to(dtype)
        known = {native.fingerprint(x)}
        for _ in range(200):
            place = int(torch.randint(0, x.numel(), (), generator=generator))
            y = x.clone()
            bits = y.view(torch.int32 if dtype == torch.float32 else torch.int16)
            bits[place] ^= 1 << int(torch.randint(0, 31 if dtype == torch.float32 else 15, (), generator=generator))
            assert not torch.equal(bits, x.view(bits.dtype))
            known.add(native.fingerprint(y))
        assert len(known) > 199  # a place and bit may be drawn twice
        assert native.fingerprint(-x) not in known
        assert native.fingerprint(x.flip(0)) not in known
        assert native.fingerprint(x[:-1].contiguous()) not in known
