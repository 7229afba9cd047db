"""What a forward does around its products: loops, buffers, randomness, containers, several methods, odd arguments."""

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

from tests.zoo.traps.registry import rows, trap


@trap(rows(6))
class LazyLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.LazyLinear(8), nn.LazyLinear(3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


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


@trap(rows(4))
class SequentialSlice(nn.Module):
    """A slice of a Sequential is a new module of the captured class, made by the forward."""

    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4))

    def forward(self, x):
        return self.seq[2:](torch.relu(self.seq[:2](x)))


@trap(lambda i: (torch.randn(5, 2 + i, 8), torch.randn(4 + i, 2 + i, 8)), opaque=True)
class Translator(nn.Module):
    """torch's own encoder and decoder, which look into a mask to find out that it is the causal one."""

    def __init__(self):
        super().__init__()
        self.stacks, self.head = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, norm_first=True), nn.Linear(8, 3)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[0])
        return self.head(self.stacks(source, target, tgt_mask=mask))
