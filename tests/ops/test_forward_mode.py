"""Forward-mode differentiation of a prepared model: the same derivative as backward gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qgraph


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("config", ["A4W2", "W4-2:4", "A8W1.58", "A8W8"])
def test_the_derivative_along_a_direction_is_that_of_backward(config, captured):
    torch.manual_seed(0)
    x, along = torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    prepared = qgraph.prepare(nn.Linear(8, 3).double(), config, x if captured else None).eval()
    value, slope = torch.func.jvp(prepared, (x,), (along,))
    torch.testing.assert_close(value, prepared(x))
    jacobian = torch.autograd.functional.jacobian(prepared, x)
    torch.testing.assert_close(slope, (jacobian * along).sum((2, 3)))
    assert not torch.equal(value, nn.functional.linear(x, prepared.weight, prepared.bias))


def test_the_derivative_along_a_weight_is_that_of_backward():
    torch.manual_seed(0)
    x, layer = torch.randn(2, 8, dtype=torch.float64), nn.Linear(8, 4).double()
    prepared = qgraph.prepare(layer, "W2-2:4", x).eval()

    def of_weight(weight):
        return torch.func.functional_call(prepared, {"weight": weight}, (x,))

    weight = layer.weight.detach()
    slope = torch.func.jvp(of_weight, (weight,), (torch.ones_like(weight),))[1]
    jacobian = torch.autograd.functional.jacobian(of_weight, weight)
    torch.testing.assert_close(slope, jacobian.sum((2, 3)))


@pytest.mark.parametrize("derivative", ["grad", "jvp"])
def test_a_derivative_by_a_weight_inside_a_forward_goes_through_its_quantizer(derivative):
    class Slopes(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 4, dtype=torch.float64))

        def forward(self, x):
            def energy(w):
                return torch.tanh(x @ w).sum()

            if derivative == "grad":
                return torch.func.grad(energy)(self.w)
            return torch.func.jvp(energy, (self.w,), (torch.ones_like(self.w),))[1]

    torch.manual_seed(0)
    x = torch.randn(2, 8, dtype=torch.float64)
    prepared = qgraph.prepare(Slopes(), "W2", x).eval()
    w = prepared.w.detach().requires_grad_()
    (slope,) = torch.autograd.grad(torch.tanh(x @ prepared.qgraph["w"](w)).sum(), w)
    torch.testing.assert_close(prepared(x).detach(), slope if derivative == "grad" else slope.sum())


@pytest.mark.parametrize("captured", [True, False])
def test_second_derivatives_are_those_of_backward_twice(captured):
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    prepared = qgraph.prepare(net, "A4W2", x if captured else None).eval()

    def energy(row):
        return prepared(row[None]).sum()

    twice = torch.autograd.functional.hessian(energy, x[0])
    torch.testing.assert_close(torch.func.hessian(energy)(x[0]), twice)
    torch.testing.assert_close(torch.func.vmap(torch.func.hessian(energy))(x)[0], twice)
    slopes = torch.func.vmap(torch.func.jacfwd(energy))(x)
    torch.testing.assert_close(slopes[0], torch.autograd.functional.jacobian(energy, x[0]))
