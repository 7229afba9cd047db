"""The trained models of `benchmarks.allocate`: what is scored, on which data, and how each is trained on.

The two of `qgraph demo` are trained here. EfficientNet-Lite0 has the weights of ImageNet and is fine-tuned to emoji of
nine categories, MiniLM is as it comes (`benchmarks.accuracy.pretrained`, which fetches both and their data).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import data, pretrained
from benchmarks.accuracy.studies import INDEX_LENGTH, TEMPERATURE
from qgraph.demo import MODELS as DEMO
from qgraph.demo import _digits

Samples = tuple[Tensor, Tensor]
HELD_OUT = 300
BATCH = 64
SCORED = 100  # samples at once
BLOCK = 2  # images that stay together: two vendors draw each emoji
VERSES = 4000  # in all, each the answer to one query
QUERY_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model with data that it was not trained on.

    Parameters
    ----------
    model : nn.Module
        In float.
    known, held_out, test : pairs of inputs and class numbers
        What it was trained on, where it was; what bits are chosen by; what they are judged by.
    logits : callable
        Of its outputs.
    """

    model: nn.Module
    held_out: Samples
    test: Samples
    known: Samples | None = None
    logits: Callable[[Tensor], Tensor] = lambda outputs: outputs

    @property
    def example(self) -> tuple[Tensor]:
        """What it is prepared with."""
        return (self.held_out[0][:2],)

    @torch.no_grad()
    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits in eval mode, over all the inputs."""
        model.eval()
        return self.logits(torch.cat([model(part) for part in inputs.split(SCORED)]))

    def scores(self, model: nn.Module, samples: Samples) -> tuple[float, float]:
        """Loss and accuracy."""
        inputs, classes = samples
        found = self.outputs(model, inputs)
        return float(F.cross_entropy(found, classes)), float((found.argmax(1) == classes).float().mean())


def demo(name: str, seed: int, epochs: int) -> Trained:
    """One of the two of `qgraph demo`, on scikit-learn's digits."""
    found = _digits(seed)
    held_out, known = ((found.train_x[s], found.train_y[s]) for s in (slice(HELD_OUT), slice(HELD_OUT, None)))
    torch.manual_seed(seed)
    model = DEMO[name]()
    train(model, known, epochs * (len(known[0]) // BATCH), 2e-3, seed)
    return Trained(model, held_out, (found.test_x, found.test_y), known)


def lite0(cache: Path, seed: int, steps: int = 200) -> Trained:
    """EfficientNet-Lite0, fine-tuned in float on emoji."""
    emoji = data.emoji(cache, side=48)
    x, y = emoji.train
    blocks = torch.arange(len(x)) // BLOCK
    order = torch.randperm(int(blocks[-1]) + 1, generator=torch.Generator().manual_seed(seed))
    held = torch.isin(blocks, order[: HELD_OUT // BLOCK])
    known = (x[~held], y[~held])
    model = pretrained.lite0(cache, emoji.classes)
    torch.manual_seed(seed)
    train(model, known, steps, 1e-3, seed)
    return Trained(model, (x[held], y[held]), emoji.held_out, known)


def minilm(cache: Path, seed: int) -> Trained:
    """MiniLM as it comes: verses of 1611 are to be found among modern ones, as the float encoder sees those."""
    encoder, tokens = pretrained.minilm(cache)
    verses = data.verses(cache)
    places = torch.randperm(len(verses), generator=torch.Generator().manual_seed(0))[:VERSES]
    index_file = cache / f"verses-{VERSES}x{INDEX_LENGTH}.pt"
    of_new = tokens([verses[i][1] for i in places.tolist()], INDEX_LENGTH)
    index = pretrained.embedded(encoder, of_new, index_file)
    asked = torch.randperm(VERSES, generator=torch.Generator().manual_seed(1 + seed))[: 4 * HELD_OUT]
    queries = tokens([verses[i][0] for i in places[asked].tolist()], QUERY_LENGTH)
    held_out, test = ((queries[s], asked[s]) for s in (slice(HELD_OUT), slice(HELD_OUT, None)))
    return Trained(encoder, held_out, test, logits=lambda found: found @ index.T / TEMPERATURE)


def train(model: nn.Module, known: Samples, steps: int, rate: float, seed: int) -> None:
    """AdamW with a rate that decays to 0."""
    x, y = known
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            batches = [*torch.randperm(len(x), generator=order)[: len(x) // BATCH * BATCH].split(BATCH)][::-1]
        batch = batches.pop()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
