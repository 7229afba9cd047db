"""The models of benchmarks/export.py, which peers build again from the same seed: imports nothing but torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from training_models import Block, ResNet18


class Mlp(nn.Module):
    """1024 - 4096 - 1024, on (batch, 1, 1024): of three dimensions, a product is the MatMul that peers quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(1024, 4096), nn.Linear(4096, 1024)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (1, 1024)),
    "gpt_block": (lambda: Block(512, 8), (64, 512)),
    "resnet18": (ResNet18, (3, 64, 64)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model in eval mode with random weights, and a batch of two."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
