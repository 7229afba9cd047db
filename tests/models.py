"""Small models for the tests, one trap or family each, with example inputs and a second shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(self.relu(self.bn2(self.conv2(x))), 2)
        return self.fc(self.drop(x.mean((2, 3))))


class Block(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(cout), nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.down = None
        if stride != 1 or cin != cout:
            self.down = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += identity
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layers = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1))
        self.fc = nn.Linear(16, 7)

    def forward(self, x):
        x = self.layers(self.stem(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)])
        self.mid = nn.Conv2d(8, 16, 3, padding=1)
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)])
        self.fuse = nn.ModuleList([nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)])
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        skips = []
        for conv in self.down:
            x = F.silu(conv(x))
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = F.silu(self.mid(x))
        for up, fuse in zip(self.up, self.fuse, strict=True):
            x = F.silu(fuse(torch.cat([up(x), skips.pop()], dim=1)))
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(24, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, ids):
        y, (h, c) = self.lstm(self.emb(ids))
        z, _ = self.gru(y.transpose(0, 1))
        return self.head(z[-1]) + (h.mean() + c.mean())


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.drop = 0.1
        self.register_buffer("mask", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64), persistent=False)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.qkv(x).split(C, dim=2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        att = F.dropout(F.softmax(att, dim=-1), self.drop, self.training)
        return self.proj((att @ v).transpose(1, 2).contiguous().view(B, T, C))


class GPT(nn.Module):
    def __init__(self, vocab=33, dim=16, depth=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, dim), nn.Embedding(64, dim)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "ln1": nn.LayerNorm(dim), "attn": Attention(dim, 4), "ln2": nn.LayerNorm(dim),
                "mlp": nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)),
            })
            for _ in range(depth)
        )  # fmt: skip
        self.ln, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids, targets=None):
        b, t = ids.shape
        x = self.wte(ids) + self.wpe(torch.arange(t, device=ids.device))
        for block in self.blocks:
            x = x + block["attn"](block["ln1"](x))
            x = x + block["mlp"](block["ln2"](x))
        logits = self.head(self.ln(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x, memory):
        return self.mha(x, memory, memory)[0] + self.mha(x, x, x, need_weights=False)[0]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8) * 0.3)
        self.k = nn.Parameter(torch.randn(4, 1, 3, 3) * 0.3)
        self.m = nn.Parameter(torch.randn(6, 5) * 0.3)
        self.e = nn.Parameter(torch.randn(5, 4) * 0.3)

    def forward(self, x):
        h = F.conv2d(x, self.k, padding=1).mean((2,))
        y = F.linear(h[:, :, :8], weight=self.w, bias=None)
        return torch.einsum("bcd,de->bce", y @ self.m, self.e)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8) * 0.2)

    def forward(self, x):
        if x.sum() > 0:
            x = self.a(x)
        else:
            x = self.b(x) * 2
        return F.linear(x, self.w)


@dataclasses.dataclass
class Batch:
    ids: Tensor
    scale: float = 1.0
    extra: Tensor | None = None


@dataclasses.dataclass
class Result:
    logits: Tensor
    parts: dict[str, Tensor]
    note: str = "ok"


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.fc = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, batch, options):
        h = self.emb(batch.ids) * batch.scale
        if batch.extra is not None:
            h = h + batch.extra
        return Result(self.fc(h) + options["bias"], {"h": h, "n": h.mean(-1)})


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.fc(torch.tanh(self.fc(x))))


class Positive(nn.Module):
    def forward(self, w):
        return F.softplus(w)


def parametrized():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    parametrize.register_parametrization(model[0], "weight", Positive())
    return model


class SelfNamed(nn.Module):
    """A child called `self`, a list that grows, a size in Python, a context manager, an in-place write."""

    def __init__(self):
        super().__init__()
        self.add_module("self", nn.Linear(4, 4))
        self.steps = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, *, flip=False):
        outs = [x]
        for step in self.steps:
            outs.append(step(torch.stack(outs).mean(0)))
        with torch.no_grad():
            gate = self.self(x).sigmoid()
        y = outs[-1] * gate + x.new_zeros(x.shape[0], 4)
        y[:, 0] = 0
        y += 1
        if x.shape[0] > 2:
            y = y * 2
        return y.flip(0) if flip else y


class Mutating(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.calls = 0
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        self.calls += 1
        return self.fc(x) @ self.w


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class CustomFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 5)

    def forward(self, x):
        return self.fc(StraightThrough.apply(self.fc(x)))


class Children(nn.Module):
    """A forward that loops over its children, and owns a weight itself."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Tanh()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return F.linear(x, self.w)


@dataclasses.dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]  # of a size: 0 the example, 1 the second shape
    opaque: bool = False


def _images(channels, sizes=((2, 16), (3, 24))):
    return lambda i: (torch.randn(sizes[i][0], channels, sizes[i][1], sizes[i][1]),)


def _ids(vocab, sizes=((2, 7), (3, 11))):
    return lambda i: (torch.randint(0, vocab, sizes[i]),)


def _floats(width, sizes=((2, 7), (3, 11))):
    return lambda i: (torch.randn(*sizes[i], width),)


CASES: dict[str, Case] = {
    "cnn": Case(CNN, _images(3)),
    "resnet": Case(ResNet, _images(3)),
    "unet": Case(UNet, _images(1)),
    "recurrent": Case(Recurrent, _ids(20)),
    "gpt": Case(GPT, _ids(33)),
    "encoder": Case(Encoder, _floats(16)),
    "cross_attention": Case(CrossAttention, lambda i: (torch.randn(2, 5 + i, 16), torch.randn(2, 3 + i, 16))),
    "functional": Case(Functional, lambda i: (torch.randn(2 + i, 1, 9, 9),)),
    "branching": Case(Branching, lambda i: (torch.rand(2 + i, 8),), opaque=True),
    "structured": Case(
        Structured,
        lambda i: (Batch(torch.randint(0, 9, (2, 3 + i)), 2.0), {"bias": torch.randn(8)}),
    ),
    "twice": Case(Twice, lambda i: (torch.randn(3 + i, 6),)),
    "parametrized": Case(parametrized, lambda i: (torch.randn(3 + i, 6),)),
    "self_named": Case(SelfNamed, lambda i: (torch.randn(2 + i, 4),)),
    "mutating": Case(Mutating, lambda i: (torch.randn(2 + i, 4),), opaque=True),
    "custom_function": Case(CustomFunction, lambda i: (torch.randn(2 + i, 5),)),
    "children": Case(Children, lambda i: (torch.randn(2 + i, 4),)),
}
