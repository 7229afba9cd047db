"""Layers with quantizers placed by hand, many to a model, so that one export covers many cells of the
matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.modules import ActivationQuantizer, Sparsifier, WeightQuantizer
from qgraph.ops import Groups


@dataclass(frozen=True)
class Cell:
    """One combination: weight width, weight granularity, sparsity, activation quantizer.

    The specs are those of the notation: affine levels hold no 0, so pruned weights are linear, and so are those beside
    a static activation from 3 bits up.
    """

    bits: float = 4
    granularity: str = "channel"  # tensor, channel, or the length of a block
    sparsity: str | None = None
    activation: str | None = None  # A8@32 as "8@32", A8s as "8s"

    def weight_spec(self) -> QuantSpec:
        block = int(self.granularity) if self.granularity.isdigit() else None
        symmetric = self.activation is not None and self.activation.endswith("s") and self.bits >= 3
        scheme = "linear" if self.sparsity or self.bits == 1.58 or symmetric else None
        return QuantSpec(self.bits, scheme, "block" if block else self.granularity, block)

    def activation_spec(self) -> QuantSpec | None:
        if self.activation is None:
            return None
        if self.activation.endswith("s"):
            return QuantSpec(float(self.activation[:-1]), granularity="tensor", method="ste", range="static")
        bits, _, block = self.activation.partition("@")
        if block and bits == "8":
            return QuantSpec(8, "linear", "block", int(block), method="ste")
        if block:
            return QuantSpec(float(bits), granularity="block", group_size=int(block))
        return QuantSpec(float(bits), granularity="token")


class Weight(nn.Module):
    """A parameter behind its sparsifier and quantizer."""

    def __init__(self, shape: tuple[int, ...], cell: Cell, site: str, axis: int = 0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(shape) * 0.3 + 0.05)
        spec = cell.weight_spec()
        groups = Groups.for_weight(spec, axis)
        sparsity = None if cell.sparsity is None else SparsitySpec.parse(cell.sparsity)
        self.sparsifier = None if sparsity is None else Sparsifier(sparsity, groups.sparsity_rows(), site)
        self.quantizer = WeightQuantizer(spec, groups, site)

    def forward(self) -> Tensor:
        if self.sparsifier is None:
            return self.quantizer(self.value)
        return self.quantizer(self.sparsifier(self.value), self.value)


class Layer(nn.Module):
    """What all kinds share: `self.weight()` and `self.act(x)`."""

    conv = False

    def __init__(self, cell: Cell, path: str, shape: tuple[int, ...], axis: int = 0) -> None:
        super().__init__()
        self.weight = Weight(shape, cell, f"{path}.weight", axis)
        spec = cell.activation_spec()
        groups = Groups.for_activation(spec, self.conv)
        self.quantize = None if spec is None else ActivationQuantizer(spec, groups, f"{path}.input")

    def act(self, x: Tensor) -> Tensor:
        return x if self.quantize is None else self.quantize(x)


class Linear(Layer):
    def __init__(self, cell: Cell, path: str, size: int) -> None:
        super().__init__(cell, path, (72, size))
        self.bias = nn.Parameter(torch.randn(72))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act(x), self.weight(), self.bias)


class Matmul(Layer):
    def __init__(self, cell: Cell, path: str, size: int) -> None:
        super().__init__(cell, path, (size, 72), axis=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) @ self.weight()


class Conv1d(Layer):
    conv = True

    def __init__(self, cell: Cell, path: str, size: int) -> None:
        super().__init__(cell, path, (8, size, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(self.act(x), self.weight(), padding=1)


class Conv2d(Layer):
    conv = True

    def __init__(self, cell: Cell, path: str, size: int) -> None:
        super().__init__(cell, path, (8, size, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.act(x), self.weight(), stride=2, groups=2)


class Conv3d(Layer):
    conv = True

    def __init__(self, cell: Cell, path: str, size: int) -> None:
        super().__init__(cell, path, (6, size, 2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(self.act(x), self.weight())


class ConvTranspose2d(Layer):
    conv = True

    def __init__(self, cell: Cell, path: str, size: int) -> None:
        super().__init__(cell, path, (size, 8, 3, 3), axis=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(self.act(x), self.weight(), stride=2)


class Embedding(Layer):
    def __init__(self, cell: Cell, path: str, size: int) -> None:
        super().__init__(replace(cell, activation=None), path, (50, size))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight())


class Recurrent(nn.Module):
    """Two layers, both directions, batch first, with initial states."""

    gates = 4

    def __init__(self, cell: Cell, path: str, size: int) -> None:
        super().__init__()
        self.hidden = 20
        sizes = {"ih_l0": size, "hh_l0": 20, "ih_l0_reverse": size, "hh_l0_reverse": 20}
        sizes |= {"ih_l1": 40, "hh_l1": 20, "ih_l1_reverse": 40, "hh_l1_reverse": 20}
        rows = self.gates * self.hidden
        self.weights = nn.ModuleDict(
            {name: Weight((rows, size), cell, f"{path}.weight_{name}") for name, size in sizes.items()}
        )
        self.biases = nn.ParameterDict({name: nn.Parameter(torch.randn(rows) * 0.1) for name in sizes})
        spec = cell.activation_spec()
        self.quantize = None
        if spec is not None:
            self.quantize = ActivationQuantizer(spec, Groups.for_activation(spec, False), f"{path}.input")

    def flat(self) -> list[Tensor]:
        weights: list[Tensor] = []
        for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
            names = (f"ih_{suffix}", f"hh_{suffix}")
            weights += [self.weights[name]() for name in names]
            weights += [self.biases[name] for name in names]
        return weights

    def act(self, x: Tensor) -> Tensor:
        return x if self.quantize is None else self.quantize(x)

    def state(self, x: Tensor) -> Tensor:
        return x.new_full((4, x.shape[0], self.hidden), 0.25)


class LSTM(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        h = self.state(x)
        y, last, cell = torch._VF.lstm(self.act(x), (h, h * 2), self.flat(), True, 2, 0.0, False, True, True)
        return torch.cat([y.mean(1), last[0], cell[-1]], -1)


class GRU(Recurrent):
    gates = 3

    def forward(self, x: Tensor) -> Tensor:
        h = self.state(x)
        y, last = torch._VF.gru(self.act(x), h, self.flat(), True, 2, 0.0, False, True, True)
        return torch.cat([y.mean(1), last[0]], -1)


@dataclass(frozen=True)
class Kind:
    """A kind of layer and its input of `size` features or channels (of one group).

    `ragged` leaves a part of a block of 32 at the end of each row of weights; with `whole`, blocks of up to 256 fit.
    """

    make: type[nn.Module]
    example: Callable[[int], Tensor]
    ragged: int
    whole: int = 256


KINDS = {
    "linear-2d": Kind(Linear, lambda size: torch.randn(5, size), 80),
    "linear-3d": Kind(Linear, lambda size: torch.randn(3, 7, size), 80),
    "matmul": Kind(Matmul, lambda size: torch.randn(3, 7, size), 80),
    "conv1d": Kind(Conv1d, lambda size: torch.randn(3, size, 15), 12),
    "conv2d": Kind(Conv2d, lambda size: torch.randn(3, 2 * size, 9, 9), 6),
    "conv3d": Kind(Conv3d, lambda size: torch.randn(3, size, 4, 6, 6), 4, 128),
    "conv-transpose2d": Kind(ConvTranspose2d, lambda size: torch.randn(3, size, 5, 5), 12),
    "embedding": Kind(Embedding, lambda size: torch.randint(0, 50, (3, 7)), 44),
    "lstm": Kind(LSTM, lambda size: torch.randn(3, 7, size), 36),
    "gru": Kind(GRU, lambda size: torch.randn(3, 7, size), 36),
}


class Many(nn.Module):
    """One layer of a kind per cell, all fed the same input; one output each."""

    def __init__(self, kind: Kind, cells: tuple[Cell, ...], size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind.make(cell, f"layers.{i}", size) for i, cell in enumerate(cells))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def settled(model: Many, x: Tensor) -> Many:
    """The model in eval mode, its static ranges those of one step of training."""
    with torch.no_grad():
        model.train()(x)
    return model.eval()
