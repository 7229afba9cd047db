"""Hand-written models, one trap of graph capture each: a factory, example inputs and a second shape."""

from __future__ import annotations

import collections
import math
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from tests.models import Case

TRAPS: dict[str, Case] = {}


def trap(inputs, opaque=False):
    def add(cls):
        TRAPS[cls.__name__] = Case(cls, inputs, opaque)
        return cls

    return add


def rows(width, a=3, b=5):
    return lambda i: (torch.randn((a, b)[i], width),)


@trap(rows(6))
class LazyLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.LazyLinear(8), nn.LazyLinear(3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


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


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@trap(rows(4))
class NamedOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return Pair(self.fc(x), x * 2)


@trap(rows(4))
class OrderedOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return collections.OrderedDict(a=self.fc(x), b=None, c=[x, (x + 1,)])


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
class Functionalized(nn.Module):
    """A hypernetwork: the weights of one network are computed by another."""

    def __init__(self):
        super().__init__()
        self.hyper, self.main = nn.Linear(4, 4 * 2 + 2), nn.Linear(4, 2)

    def forward(self, x):
        p = self.hyper(x.mean(0))
        weights = {"weight": p[:8].view(2, 4), "bias": p[8:]}
        return torch.func.functional_call(self.main, weights, (x,))


@trap(lambda i: (torch.randn(3, 6 + i, 4), torch.tensor([6, 3, 2])), opaque=True)
class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.fc(y)


@trap(lambda i: (torch.randn(4 + i, 5), torch.randint(0, 4, (2, 9 + i))))
class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.message, self.update = nn.Linear(10, 6), nn.Linear(11, 5)

    def forward(self, nodes, edges):
        source, target = edges
        m = torch.relu(self.message(torch.cat([nodes[source], nodes[target]], -1)))
        total = nodes.new_zeros(nodes.shape[0], m.shape[1]).index_add_(0, target, m)
        return self.update(torch.cat([nodes, total], -1))


@trap(rows(6))
class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 6))

    def couple(self, x):
        a, b = x.chunk(2, -1)
        s, t = self.net(a).chunk(2, -1)
        return a, b, s, t

    def inverse(self, y):
        a, b, s, t = self.couple(y)
        return torch.cat([a, (b - t) * torch.exp(-s)], -1)

    def forward(self, x):
        a, b, s, t = self.couple(x)
        y = torch.cat([a, b * torch.exp(s) + t], -1)
        return y, self.inverse(y), s.sum(-1)


@trap(rows(6))
class Capsules(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 4) * 0.3)

    def forward(self, x):
        u = torch.einsum("bi,kij->bkj", x, self.w)
        logits = torch.zeros(x.shape[0], 3, 1)
        for _ in range(3):
            c = logits.softmax(1)
            s = (c * u).sum(1, keepdim=True)
            v = s / (1 + s.norm(dim=-1, keepdim=True))
            logits = logits + (u * v).sum(-1, keepdim=True)
        return v.squeeze(1)


@trap(lambda i: (torch.randn(2, 4 + 2 * i, 3),))
class Scan(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(3, 5), nn.Linear(5, 2)
        self.decay = nn.Parameter(torch.rand(5))

    def forward(self, x):
        state = x.new_zeros(x.size(0), 5)
        outs = []
        for t in range(x.size(1)):
            state = state * self.decay.sigmoid() + self.inp(x[:, t])
            outs.append(self.out(state))
        return torch.stack(outs, 1)


@trap(lambda i: (torch.randn(2, 3 + i, 4),))
class CellLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.fc = nn.LSTMCell(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = c = torch.zeros(x.shape[0], 6)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        return self.fc(h)


@trap(rows(4), opaque=True)
class NumpyNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            if not self.training or (np.random.rand() > 0.3 and random.random() > 0.1):
                x = layer(x)
        return x


@trap(rows(4))
class RunningMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.fc(x - self.mean)


@trap(rows(4))
class InPlaceBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.fc(x - self.mean)


@trap(lambda i: (torch.randn(2 + i, 8),))
class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(5, dtype=torch.cfloat)), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(torch.fft.irfft(torch.fft.rfft(x) * self.w, n=x.shape[-1]))


@trap(lambda i: (torch.randn(2 + i, 6),))
class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.script = torch.jit.script(nn.Sequential(nn.Tanh(), nn.Softmax(-1)))

    def forward(self, x):
        return self.script(self.fc(x))


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


@trap(lambda i: ([torch.randn(2, 4), torch.randn(3, 4)], {"scale": 2.0 + i}))
class ListInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, xs, options):
        return [self.fc(x) * options["scale"] for x in xs]


@trap(lambda i: (torch.randn(2, 4), 3 + i))
class IntInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 12)

    def forward(self, x, n):
        return self.fc(x).view(2, -1)[:, : n * 2].reshape(2, n, 2) / math.sqrt(n)


@trap(lambda i: (torch.randn(2, 5 + i, 8),))
class SdpaCausal(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, dropout_p=0.1 if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))


@trap(rows(4))
class Hooked(nn.Module):
    """A forward that relies on what a hook of its child has collected."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        seen = []
        handle = self.a.register_forward_hook(lambda m, i, o: seen.append(o))
        y = self.b(self.a(x))
        handle.remove()
        return y + seen[0]


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


@trap(lambda i: (torch.randn(1, 2, 6 + 2 * i, 6 + 2 * i),))
class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        y = self.head(F.silu(self.conv(x)))
        b, _, h, w = y.shape
        y = y.view(b, 1, 6, h, w).permute(0, 1, 3, 4, 2).contiguous()
        grid = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"), -1).to(y)
        out = y.sigmoid().clone()
        out[..., 0:2] = (out[..., 0:2] * 2 + grid) * 8
        out[..., 2:4] = (out[..., 2:4] * 2) ** 2
        return out.view(b, -1, 6)


@trap(lambda i: (torch.randn(2, 3 + i, 4), torch.randn(2, 4 + i, 4)))
class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True)

    def forward(self, src, tgt):
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.size(1))
        return self.net(src, tgt, tgt_mask=mask, tgt_is_causal=True)


@trap(lambda i: (torch.randint(0, 9, (2, 4 + i)),))
class Decoder(nn.Module):
    """Greedy decoding inside a teacher-forced forward."""

    def __init__(self):
        super().__init__()
        self.emb, self.cell, self.out = nn.Embedding(9, 6), nn.GRUCell(6, 6), nn.Linear(6, 9)

    def forward(self, ids):
        h = torch.zeros(ids.size(0), 6)
        logits = []
        token = ids[:, 0]
        for t in range(ids.size(1)):
            h = self.cell(self.emb(token), h)
            logits.append(self.out(h))
            token = ids[:, t] if self.training else logits[-1].argmax(-1)
        return torch.stack(logits, 1)


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


@trap(lambda i: (torch.randn(2 + i, 4),))
class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
        self.items = nn.Parameter(torch.randn(4, 4))

    def features(self, x):
        for name, layer in self.layers.items():
            x = layer(x)
            yield name, x

    def forward(self, x):
        return dict(self.features(x)) | {"own": F.linear(x, self.items)}


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


@trap(rows(4))
class SequentialSlice(nn.Module):
    """A slice of a Sequential is a new module of the captured class, made by the forward."""

    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4))

    def forward(self, x):
        return self.seq[2:](torch.relu(self.seq[:2](x)))


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
class FrozenSwapped(nn.Module):
    """`functional_call` with a weight made of a frozen parameter: a tensor that asks for no gradient."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.w = nn.Parameter(torch.randn(4, 4), requires_grad=False)

    def forward(self, x):
        return self.head(torch.func.functional_call(self.fc, {"weight": self.w.tanh(), "bias": self.fc.bias}, (x,)))


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
    """Products by their rarer names: of vectors, of the linalg namespace, and torch's operators themselves."""

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
        return ends[:, None], torch.ops.aten.convolution(y, self.d, None, [1], [0], [1], True, [0], 1)


@trap(rows(4), opaque=True)
class Tangents(nn.Module):
    """A derivative along a direction, by forward-mode differentiation of a layer."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h, slope = torch.func.jvp(lambda t: torch.tanh(self.fc(t)), (x,), (torch.ones_like(x),))
        return self.head(h), self.head(slope)
