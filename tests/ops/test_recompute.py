"""What products of quantized operands keep for backward: none of them, and the same gradients to the bit."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import SHAPES, groupings, seeds, sparsities, specs, values
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import qgraph
from qgraph.ops import native, recompute, sparsify
from qgraph.ops.ddt import DDT

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler: nothing is computed again")
cases = st.sampled_from((*SHAPES, (2, 4200))).flatmap(lambda s: st.tuples(st.just(s), groupings(s), seeds))


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(recompute, "LARGE", 1)


@given(
    cases, specs(methods=("ddt",)), st.one_of(st.none(), sparsities()), st.sampled_from((torch.float32, torch.bfloat16))
)
def test_values_come_back_bit_for_bit(case, spec, sparsity, dtype):
    shape, groups, seed = case
    x = values(seed, shape, dtype)
    pruned = None if sparsity is None else groups.pieces(sparsify(x, sparsity, groups))
    for i, piece in enumerate(groups.pieces(x)):
        sparse = None if pruned is None else pruned[i]
        y, stats = DDT.apply(piece, sparse, spec, None)
        again = native.restored(piece, sparse, stats, spec)
        assert again.stride() == y.stride()
        torch.testing.assert_close(again, y, rtol=0, atol=0, equal_nan=True)


class Products(nn.Module):
    """A linear layer, convolutions of both directions, and a matrix of the model's own, used transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv, self.up = nn.Linear(6, 8), nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 2, 2)
        self.w = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        y = self.up(self.conv(x)).flatten(2)
        return self.fc(y[..., :6]) @ self.w.t()


def prepared(config):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 5, 5, requires_grad=True)
    return qgraph.prepare(Products(), config, (x,)), x


def gradients(model, x, **options):
    return torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()], **options)


def plain(run, monkeypatch):
    """`run()` with everything kept."""
    with monkeypatch.context() as patch:
        patch.setattr(recompute, "LARGE", 1 << 60)
        return run()


@pytest.mark.parametrize("config", ["W4", "A8W4", "A4W1", "A2W2@128", "A8W4@4", "A1W1-2:4", "W1.58@4"])
def test_gradients_are_those_of_kept_operands(config, monkeypatch):
    model, x = prepared(config)
    expected = plain(lambda: gradients(copy.deepcopy(model), x), monkeypatch)
    for found, kept in zip(gradients(copy.deepcopy(model), x), expected, strict=True):
        assert torch.equal(found, kept)


@pytest.mark.parametrize("config", ["A4W1", "A8W4@18"])
def test_no_quantized_operand_is_alive_between_the_passes(config):
    model, x = prepared(config)
    storages = {}

    def note(name):
        return lambda module, args, result: storages.update({name: StorageWeakRef(result.untyped_storage())})

    names = [name for name, module in model.named_modules() if re.search(r"qgraph\.\w", name)]
    for name in names:
        model.get_submodule(name).register_forward_hook(note(name))
    loss = model(x).square().sum()
    assert len(storages) == len(names) == 8
    assert all(storage.expired() for storage in storages.values())
    loss.backward()


def test_a_second_backward_and_a_second_derivative(monkeypatch):
    model, x = prepared("A4W1")
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, [x, *model.parameters()])))

    def curvature():
        return torch.autograd.grad(gradients(copy.deepcopy(model), x, create_graph=True)[0].square().sum(), x)[0]

    assert torch.equal(curvature(), plain(curvature, monkeypatch))
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_operands_that_change_before_backward_are_an_error():
    weight = nn.Parameter(torch.randn(4, 4))
    spec, groups = qgraph.QuantSpec(4), qgraph.ops.Groups("channel")
    for changed in ("input", "weight"):
        x = torch.randn(3, 4)
        y = recompute.recomputing(F.linear)(x, qgraph.ops.fake_quantize(weight, spec, groups))
        with torch.no_grad():
            (x if changed == "input" else weight).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_hooks_of_others_are_left_theirs(monkeypatch):
    model, x = prepared("A4W1")
    monkeypatch.setattr(DDT, "restored", None)
    expected = plain(lambda: gradients(copy.deepcopy(model), x), monkeypatch)

    def checkpointed():
        loss = checkpoint(model, x, use_reentrant=False).square().sum()
        return torch.autograd.grad(loss, [x, *model.parameters()])

    assert all(map(torch.equal, checkpointed(), expected))
    for hooks in (save_on_cpu(), disable_saved_tensors_hooks("none here")):
        with hooks:
            loss = model(x).square().sum()
        assert all(map(torch.equal, torch.autograd.grad(loss, [x, *model.parameters()]), expected))
