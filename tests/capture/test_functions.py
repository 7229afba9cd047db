"""Products inside of autograd Functions: their operands are quantized before the call."""

import copy

import pytest
import torch
from torch import nn

import qgraph
from qgraph.modules import Quantizer


class Product(torch.autograd.Function):
    """`dropout(x) w^T`; counts its runs, and shows what backward meets."""

    runs = 0
    met = None

    @staticmethod
    def forward(ctx, x, w, rate):
        Product.runs += 1
        kept = torch.rand_like(x) >= rate
        ctx.save_for_backward(x, w, kept)
        return (x * kept) @ w.t()

    @staticmethod
    def backward(ctx, h):
        x, w, kept = ctx.saved_tensors
        Product.met = w
        return h @ w * kept, h.t() @ (x * kept), None


class Written(torch.autograd.Function):
    """Adds a product to its first argument, in place."""

    @staticmethod
    def forward(ctx, total, x, w):
        ctx.mark_dirty(total)
        ctx.save_for_backward(x, w)
        return total.add_(x.mm(w))

    @staticmethod
    def backward(ctx, h):
        x, w = ctx.saved_tensors
        return h, h @ w.t(), x.t() @ h


class Model(nn.Module):
    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.a, self.w, self.v = nn.Linear(6, 6), nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 4))
        self.rate = rate

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return Written.apply(Product.apply(h, self.w, self.rate) * 2, h, self.v)


def test_forward_and_backward_meet_the_quantized_weight():
    x = torch.randn(5, 6)
    prepared = qgraph.prepare(Model(), "A8W1", (x,))
    prepared(x).square().sum().backward()
    assert all(len(row.unique()) == 2 for row in Product.met)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prepared.parameters())
    # Multiplied after a dropout, the input of the first is no operand; that of the second is.
    sites = {m.site for m in prepared.modules() if isinstance(m, Quantizer)}
    assert sites == {"a.weight", "a.input", "w", "v", "v.input"}


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_first_call_is_quantized_as_the_next_ones(rate):
    x = torch.randn(5, 6)
    prepared = qgraph.prepare(Model(rate), "W1")
    results = []
    for _ in range(3):
        torch.manual_seed(0)
        results.append((prepared(x), torch.rand(2)))
    assert all(torch.equal(*pair) for later in results[1:] for pair in zip(results[0], later, strict=True))
    assert qgraph.inspect(prepared).coverage.sites_quantized == 3


def test_switched_off_it_is_the_function_itself_random_numbers_included():
    x, model = torch.randn(5, 6), Model(0.5)
    prepared = copy.deepcopy(qgraph.prepare(model, "A4W2", (x,)))
    found = []
    with qgraph.disabled(prepared):
        for m in (model, prepared):
            torch.manual_seed(1)
            y = m(x)
            found.append((y, torch.rand(3), torch.autograd.grad(y.sum(), [m.w, m.v, m.a.weight])))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert all(map(torch.equal, found[0][2], found[1][2]))


def test_after_its_first_call_a_function_runs_once():
    x = torch.randn(5, 6)
    prepared = qgraph.prepare(Model(), "W2", (x,))
    Product.runs = 0
    prepared(x)
    assert Product.runs == 1
