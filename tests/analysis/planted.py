"""Three small models, each with a place to spoil one layer of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.models import CNN, GPT


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.lstm, self.head = nn.Linear(6, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.lstm(torch.tanh(self.inp(x)))[0])


@dataclass(frozen=True)
class Planted:
    """`layer`: what is spoiled; `weight`: its parameter; `tables`: layers that 4 bits a tensor spoil by themselves."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    layer: str
    weight: str
    tables: tuple[str, ...] = ()


PLANTED = {
    "cnn": Planted(CNN, lambda: (torch.randn(4, 3, 16, 16),), "conv2", "weight"),
    "lstm": Planted(Sequence, lambda: (torch.randn(3, 5, 6),), "lstm", "weight_ih_l0"),
    "transformer": Planted(
        GPT, lambda: (torch.randint(0, 33, (2, 9)),), "blocks.1.mlp.0", "weight", ("wte", "wpe", "head")
    ),
}
