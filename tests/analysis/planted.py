"""Three small models, each with a place to spoil one layer of it, and ways to do so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import qgraph
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

# "channel": one output channel far larger than the others; "diverged": some weights thrown far off; "outlier": one.
WEIGHT_DEFECTS = ("outlier", "channel", "diverged")
DEFECTS = ("scale", "nan", *WEIGHT_DEFECTS)


def planted(name: str, defect: str) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    """The float model, it prepared with one bad layer, and inputs.

    What is wrong with the weight is so in both: it is the grid that suffers.
    """
    case = PLANTED[name]
    model, inputs = case.make(), case.inputs()
    config = qgraph.QConfig(weight=qgraph.QuantSpec(bits=8, method="lsq"))
    if defect in WEIGHT_DEFECTS:
        config = qgraph.QConfig.parse("W4@tensor").with_rules(*(qgraph.Rule(table, None) for table in case.tables))
        weight = getattr(model.get_submodule(case.layer), case.weight).data
        if defect == "outlier":
            weight.view(-1)[0] = 3.0
        elif defect == "channel":
            weight[0] *= 30
        else:
            weight.view(-1)[::11] *= 30
    prepared = qgraph.prepare(model, config, inputs)
    step = getattr(prepared.get_submodule(f"{case.layer}.qgraph")[case.weight], "step", None)
    if defect == "scale":
        step.data.mul_(1000)
    if defect == "nan":
        step.data[0] = math.nan
    return model, prepared, inputs
