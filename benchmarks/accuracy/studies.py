"""The studies: a model, its data, a recipe, and what a score is. Sizes are for minutes on one core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import data
from benchmarks.accuracy.methods import SETTINGS
from benchmarks.accuracy.models import CharacterModel, ResidualNetwork

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Task:
    """A study with its data loaded."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    held_out: list[Batch]  # fixed; the first `quick` of them make the curve
    quick: int


@dataclass(frozen=True, slots=True)
class Study:
    """`rates` is swept for every method alike; `keep` are modules that stay float in every method."""

    load: Callable[[Path], Task]
    steps: int
    rates: tuple[float, ...]
    settings: tuple[str, ...]
    keep: tuple[str, ...]
    score: str  # "loss" (nats a character) or "accuracy"
    weight_decay: float = 0.01
    description: str = ""


def _text_task(text: data.Text, width: int, context: int, batch: int, held_out: int) -> Task:
    def cut(source: Tensor, starts: Tensor) -> Batch:
        windows = source[starts[:, None] + torch.arange(context + 1)]
        return windows[:, :-1], windows[:, 1:]

    def sample(generator: torch.Generator) -> Batch:
        return cut(text.train, torch.randint(len(text.train) - context - 1, (batch,), generator=generator))

    fixed = torch.Generator().manual_seed(1)
    starts = [torch.randint(len(text.held_out) - context - 1, (64,), generator=fixed) for _ in range(held_out)]
    return Task(
        lambda: CharacterModel(text.symbols, width, layers=2, heads=4, context=context),
        sample,
        [cut(text.held_out, s) for s in starts],
        quick=max(1, held_out // 6),
    )


def _image_task(images: data.Images, widths: tuple[int, ...], batch: int) -> Task:
    x, labels = images.train

    def sample(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(x), (batch,), generator=generator)
        return x[chosen], labels[chosen]

    held_out = [b for b in zip(*(part.split(250) for part in images.held_out), strict=True) if len(b[0]) == 250]
    return Task(lambda: ResidualNetwork(images.classes, widths), sample, held_out, quick=max(1, len(held_out) // 20))


STUDIES = {
    "shakespeare": Study(
        lambda cache: _text_task(data.shakespeare(cache), width=96, context=32, batch=16, held_out=24),
        steps=400,
        rates=(3e-3, 1e-2, 3e-2),
        settings=tuple(SETTINGS),
        keep=("embed",),
        score="loss",
        description="transformer over characters, 2 layers of 96, 0.24 M parameters, 400 steps of 16 x 32 characters; "
        "the embedding stays float",
    ),
    "fashion-mnist": Study(
        lambda cache: _image_task(data.fashion_mnist(cache), widths=(16, 32, 64), batch=64),
        steps=300,
        rates=(2e-3, 6e-3, 2e-2),
        settings=tuple(SETTINGS),
        keep=("stem", "head"),
        score="accuracy",
        description="residual network, 5 convolutions of 16 to 64 channels and a stem, 74 k parameters, 300 steps of "
        "64 images; stem and head stay float",
    ),
}

SMOKE = {
    "smoke-text": Study(
        lambda cache: _text_task(data.own_text(), width=16, context=16, batch=4, held_out=2),
        steps=4,
        rates=(1e-2,),
        settings=("A1W1",),
        keep=("embed",),
        score="loss",
    ),
    "smoke-images": Study(
        lambda cache: _image_task(data.digits(), widths=(4, 8), batch=8),
        steps=4,
        rates=(1e-2,),
        settings=("A2W2",),
        keep=("stem", "head"),
        score="accuracy",
    ),
}


def score(study: Study, outputs: Tensor, targets: Tensor) -> float:
    """The mean score of a batch: nats a character, or the fraction of images that is right."""
    if study.score == "loss":
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten()).item()
    return (outputs.argmax(-1) == targets).float().mean().item()
