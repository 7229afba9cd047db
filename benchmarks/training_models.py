"""The two models of benchmarks/training.py, in torch alone: a peer's environment imports them too."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a two-layer perceptron, normalized before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Gpt(nn.Module):
    """A decoder of 6 blocks of 512 features."""

    def __init__(self, width: int = 512, depth: int = 6, vocabulary: int = 512, length: int = 128) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, width // 64) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(ids) + self.place)))


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.b, self.norm_b = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        plain = stride == 1 and inner == outer
        short = (nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        self.short = nn.Identity() if plain else nn.Sequential(*short)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        return F.relu(y + self.short(x))


class ResNet18(nn.Module):
    """ResNet-18 as for ImageNet, its first stage too."""

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        pairs = itertools.pairwise(widths)
        stages = [(Residual(i, o, 1 + (i != o)), Residual(o, o, 1)) for i, o in pairs]
        self.stages = nn.Sequential(*(block for stage in stages for block in stage))
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(self.stages(x).mean(dim=(2, 3)))


def gpt() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, a batch and its targets."""
    ids = torch.randint(0, 512, (16, 129), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return Gpt(), ids[:, :-1], ids[:, 1:]


def resnet18() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, a batch and its targets."""
    generator = torch.Generator().manual_seed(0)
    images, classes = torch.randn(64, 3, 64, 64, generator=generator), torch.randint(0, 100, (64,), generator=generator)
    torch.manual_seed(0)
    return ResNet18(), images, classes


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {"gpt": gpt, "resnet18": resnet18}


class Step:
    """One training step of a model: forward, backward, AdamW."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.model, self.inputs, self.targets = model, inputs, targets
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def __call__(self) -> None:
        self.gradients()
        self.update()

    def gradients(self) -> None:
        """Add the gradients of the batch."""
        output = self.model(self.inputs)
        F.cross_entropy(output.flatten(0, -2), self.targets.flatten()).backward()

    def update(self) -> None:
        """Let the optimizer take them."""
        self.optimizer.step()
        self.optimizer.zero_grad()
