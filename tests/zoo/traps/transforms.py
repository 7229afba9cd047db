"""How torch itself runs a forward: checkpoints, function transforms, functional calls, scripts, gradients inside."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.traps.registry import rows, trap


@trap(rows(4), opaque=True)
class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(checkpoint(self.a, x, use_reentrant=False))


@trap(rows(4), opaque=True)
class Vmapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.vmap(lambda row: torch.tanh(row @ self.w))(x))


@trap(rows(4), opaque=True)
class Ensembled(nn.Module):
    """One network's forward, batched over the stacked parameters of several."""

    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(3))

    def forward(self, x):
        named = [dict(member.named_parameters()) for member in self.members]
        stacked = {name: torch.stack([own[name] for own in named]) for name in named[0]}
        first = self.members[0]
        return torch.vmap(lambda own: torch.func.functional_call(first, own, (x,)))(stacked).mean(0)


@trap(rows(4))
class Functionalized(nn.Module):
    """A hypernetwork: the weights of one network are computed by another."""

    def __init__(self):
        super().__init__()
        self.hyper, self.main = nn.Linear(4, 4 * 2 + 2), nn.Linear(4, 2)

    def forward(self, x):
        p = self.hyper(x.mean(0))
        weights = {"weight": p[:8].view(2, 4), "bias": p[8:]}
        return torch.func.functional_call(self.main, weights, (x,))


@trap(lambda i: (torch.randn(2 + i, 6),))
class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.script = torch.jit.script(nn.Sequential(nn.Tanh(), nn.Softmax(-1)))

    def forward(self, x):
        return self.script(self.fc(x))


class RowProduct(torch.autograd.Function):
    """`x w^T + b` with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return torch.addmm(b, x, w.t())

    @staticmethod
    def backward(ctx, h):
        x, w = ctx.saved_tensors
        return h @ w, h.t() @ x, h.sum(0)


class NormedProduct(torch.autograd.Function):
    """`x w / mean |x|`, in the form with a context of its own: the input is not only multiplied."""

    @staticmethod
    def forward(x, w):
        return x @ w / x.abs().mean(-1, keepdim=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, h):
        x, w = ctx.saved_tensors
        h = h / x.abs().mean(-1, keepdim=True)  # the magnitude taken as constant
        return h @ w.t(), x.t() @ h


@trap(rows(4))
class CustomFunctions(nn.Module):
    """Products inside of autograd Functions: their operands are weights of sites, their backward stays."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
        self.v, self.fc = nn.Parameter(torch.randn(6, 5)), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(RowProduct.apply(x, self.w, self.b))
        return self.fc(NormedProduct.apply(h, self.v))


@trap(rows(4))
class EnableGrad(nn.Module):
    """Forces: the gradient of an energy, taken inside the forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.b(torch.tanh(self.a(x))).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return energy, -force


@trap(rows(4))
class FrozenSwapped(nn.Module):
    """`functional_call` with a weight made of a frozen parameter: a tensor that asks for no gradient."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.w = nn.Parameter(torch.randn(4, 4), requires_grad=False)

    def forward(self, x):
        return self.head(torch.func.functional_call(self.fc, {"weight": self.w.tanh(), "bias": self.fc.bias}, (x,)))


@trap(rows(4), opaque=True)
class Tangents(nn.Module):
    """A derivative along a direction, by forward-mode differentiation of a layer."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h, slope = torch.func.jvp(lambda t: torch.tanh(self.fc(t)), (x,), (torch.ones_like(x),))
        return self.head(h), self.head(slope)


@trap(rows(6), opaque=True)
class BatchedWeights(nn.Module):
    """A vmap over the members of one parameter, which the function inside gets as its argument."""

    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(3, 6, 4)), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(torch.vmap(lambda w: x @ w, out_dims=1)(self.w).flatten(1))
