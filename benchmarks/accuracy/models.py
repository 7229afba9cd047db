"""The models of the studies. Nothing in them is made for low bits but the place of the residual network's ReLU."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CharacterModel(nn.Module):
    """A pre-norm transformer over characters, as in nanoGPT."""

    def __init__(self, symbols: int, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        nn.init.normal_(self.embed.weight, std=0.1)  # with torch's 1 the layers hardly add to it in few steps
        self.position = nn.Parameter(torch.randn(context, width) * 0.1)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class ResidualNetwork(nn.Module):
    """Convolutions between batch norm and ReLU, each with a shortcut of its own.

    What a convolution sees is the output of a batch norm, not of a ReLU: signs would all be +1 there, and methods with
    symmetric levels would be compared at a disadvantage (as in Bi-Real Net).
    """

    def __init__(self, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, stride=2, padding=1)
        steps = [*itertools.pairwise(widths)]
        self.body = nn.Sequential(
            _Convolution(widths[0], widths[0], 1),
            *(
                _Convolution(a, b, stride)
                for before, after in steps
                for a, b, stride in ((before, after, 2), (after, after, 1))
            ),
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.stem(images))).mean(dim=(2, 3)))


class _Convolution(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(before)
        self.convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.widens, self.stride = after // before, stride

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.convolution(self.norm(x)))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return y + torch.cat([x] * self.widens, dim=1)


class MovementModel(nn.Module):
    """Two convolutions over time, a GRU over what they find, and a layer on its last state."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv1d(channels, width // 2, 5, stride=2, padding=2)
        self.convolution = nn.Conv1d(width // 2, width, 3, stride=2, padding=1, bias=False)
        self.stem_norm, self.norm = nn.BatchNorm1d(width // 2), nn.BatchNorm1d(width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, windows: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(windows))
        x = self.norm(F.relu(self.convolution(x)))
        states, _ = self.recurrent(x.transpose(1, 2))
        return self.head(states[:, -1])
