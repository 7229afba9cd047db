"""Where weights meet data: rarer products, experts, embeddings, complex numbers, helpers that call them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.traps.registry import rows, trap


@trap(lambda i: (torch.randint(0, 20, (2 + i, 5)),))
class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.bi = nn.EmbeddingBag(20, 6, mode="sum"), nn.Bilinear(6, 6, 4)

    def forward(self, ids):
        h = self.bag(ids)
        return self.bi(h, h.flip(0))


@trap(lambda i: (torch.randn(2, 3, 8 + 4 * i, 8 + 4 * i),))
class FoldUnfold(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 3 * 4) * 0.3)

    def forward(self, x):
        cols = F.unfold(x, 2, stride=2)
        y = self.w @ cols
        return F.fold((self.w.t() @ y), x.shape[-2:], 2, stride=2)


@trap(lambda i: (torch.randn(2 + i, 8),))
class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(5, dtype=torch.cfloat)), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(torch.fft.irfft(torch.fft.rfft(x) * self.w, n=x.shape[-1]))


@trap(lambda i: (torch.randn(4 + i, 6),), opaque=True)
class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.up = nn.Parameter(torch.randn(3, 6, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 8, 6) * 0.3)

    def forward(self, x):
        top = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for e in range(3):
            where = torch.where(top == e)[0]
            if where.numel():
                out[where] = torch.relu(x[where] @ self.up[e]) @ self.down[e]
        return out


@trap(lambda i: (torch.randn(2 + i, 5, 6),))
class BatchedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 4) * 0.3)

    def forward(self, x):
        y = torch.bmm(x.flatten(0, 1).expand(3, -1, -1), self.w)
        return y.sum(0).view(x.shape[0], 5, 4)


@trap(lambda i: (torch.randn(2, 5 + i, 8),))
class SdpaCausal(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, dropout_p=0.1 if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))


@trap(lambda i: (torch.randn(2 + i, 6),))
class Helpers(nn.Module):
    """Calls another module's plain method, a module kept outside, an activation by name and F.linear on a child."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.acts = {"gelu": nn.GELU()}

    def forward(self, x):
        x = self.acts["gelu"](self.a.forward(x))
        return getattr(torch, "tanh")(F.linear(x, self.b.weight, self.b.bias))  # noqa: B009


@trap(rows(8, 6, 9))
class GroupedExperts(nn.Module):
    """One product for all experts, their weights stacked; the rows of each expert end at an offset."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 16, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(2, 16, 8) * 0.3)

    def forward(self, x):
        offsets = torch.full((2,), x.shape[0], dtype=torch.int32) - torch.tensor([2, 0], dtype=torch.int32)
        h = torch.relu(F.grouped_mm(x, self.up.transpose(-2, -1), offs=offsets))
        return F.grouped_mm(h, self.down, offs=offsets)


@trap(lambda i: (torch.randn(2 + i, 5, 4),))
class Latents(nn.Module):
    """Attention whose keys and values are parameters, and a product of three factors."""

    def __init__(self):
        super().__init__()
        self.k, self.v = nn.Parameter(torch.randn(1, 6, 4)), nn.Parameter(torch.randn(1, 6, 4))
        self.gate, self.experts = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 4, 4) * 0.5)

    def forward(self, x):
        k, v = (p.expand(x.shape[0], -1, -1) for p in (self.k, self.v))
        x = x + F.scaled_dot_product_attention(x, k, v)
        return torch.einsum("bte,btd,edf->btf", self.gate(x).softmax(-1), x, self.experts)


@trap(rows(4))
class Products(nn.Module):
    """Products of more kinds: tensordot and a chain of matrices."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 5) * 0.5), nn.Parameter(torch.randn(4, 5) * 0.5)
        self.c = nn.Parameter(torch.randn(5, 3, 2) * 0.5)

    def forward(self, x):
        x = torch.linalg.multi_dot([x, self.a, self.b.t()])
        return torch.tensordot(torch.tensordot(self.a, x, dims=([0], [1])), self.c, ([0], [0]))


@trap(rows(4), opaque=True)
class NormedOpaque(nn.Module):
    """A parametrized layer that stays Python, since its gradients are computed by a checkpoint."""

    def __init__(self):
        super().__init__()
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x):
        return checkpoint(self.fc, x, use_reentrant=False)


@trap(rows(6))
class Spellings(nn.Module):
    """Products by their rarer names: of vectors, of the linalg namespace, torch's operators themselves; a keyword."""

    def __init__(self):
        super().__init__()
        self.v, self.u, self.r = (nn.Parameter(torch.randn(6) * 0.5) for _ in range(3))
        self.w = nn.ParameterList([nn.Parameter(torch.randn(6, 6) * 0.5) for _ in range(5)])
        self.c, self.d = nn.Parameter(torch.randn(2, 1, 3)), nn.Parameter(torch.randn(2, 2, 3))

    def forward(self, x):
        h = torch.linalg.matmul(torch.ops.aten.mm.default(x, self.w[0]), self.w[1])
        h = torch.chain_matmul(torch.ops.aten.linear(h, self.w[2]), self.w[3], self.w[4])
        ends = torch.dot(h[0], self.v) + torch.vdot(self.u, h[1]) + torch.linalg.vecdot(h, self.r)
        y = torch.convolution(h[:, None], self.c, None, [1], [0], [1], False, [0], 1)
        y = torch.repeat_interleave(y, dim=2, repeats=2)
        return ends[:, None], torch.ops.aten.convolution(y, self.d, None, [1], [0], [1], True, [0], 1)
