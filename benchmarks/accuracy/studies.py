"""The studies: a model, its data, a recipe, and what a score is. Sizes are for minutes on one core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import data, pretrained
from benchmarks.accuracy.methods import SETTINGS
from benchmarks.accuracy.models import CharacterModel, MovementModel, ResidualNetwork

Batch = tuple[Tensor, Tensor]
# The later studies: fewer settings, so that all of them are run in hours on one core.
BREADTH = ("A1W1", "W1", "A2W2", "W4", "A8W4", "A4W1-2:4", "A8W1.58")
INDEX_LENGTH = 32  # tokens of a verse that is searched for
TEMPERATURE = 0.05  # of the search's softmax: the cosines of unit vectors times 20


@dataclass(frozen=True, slots=True)
class Task:
    """A study with its data loaded."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    held_out: list[Batch]  # fixed; the first `quick` of them make the curve
    quick: int
    logits: Callable[[Tensor], Tensor] = lambda outputs: outputs  # what the loss reads, of the model's outputs
    similarity: Callable[[Callable[[Tensor], Tensor]], float] | None = (
        None  # a second score, of the model as a function
    )


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
    fine_tunes: bool = False  # a pretrained model
    description: str = ""


def _text_task(text: data.Text, width: int, context: int, batch: int, held_out: int, layers: int = 2) -> Task:
    def cut(source: Tensor, starts: Tensor) -> Batch:
        windows = source[starts[:, None] + torch.arange(context + 1)]
        return windows[:, :-1], windows[:, 1:]

    def sample(generator: torch.Generator) -> Batch:
        return cut(text.train, torch.randint(len(text.train) - context - 1, (batch,), generator=generator))

    fixed = torch.Generator().manual_seed(1)
    starts = [torch.randint(len(text.held_out) - context - 1, (64,), generator=fixed) for _ in range(held_out)]
    return Task(
        lambda: CharacterModel(text.symbols, width, layers, heads=4, context=context),
        sample,
        [cut(text.held_out, s) for s in starts],
        quick=max(1, held_out // 6),
    )


def _labelled_task(
    found: data.Labelled, build: Callable[[], nn.Module], batch: int, held_out: int = 250, quick: int = 2
) -> Task:
    """`held_out`: examples a batch; `quick`: batches of the curve."""
    x, labels = found.train

    def sample(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(x), (batch,), generator=generator)
        return x[chosen], labels[chosen]

    batches = zip(*(part.split(held_out) for part in found.held_out), strict=True)
    return Task(build, sample, [b for b in batches if len(b[0]) == held_out], quick)


def _image_task(images: data.Labelled, widths: tuple[int, ...], batch: int) -> Task:
    quick = max(1, len(images.held_out[0]) // 250 // 20)
    return _labelled_task(images, lambda: ResidualNetwork(images.classes, widths), batch, quick=quick)


def _movement_task(windows: data.Labelled, width: int, batch: int) -> Task:
    channels = windows.train[0].shape[1]
    return _labelled_task(windows, lambda: MovementModel(channels, width, windows.classes), batch)


def _emoji_task(images: data.Labelled, network: Callable[[int], nn.Module], batch: int) -> Task:
    return _labelled_task(images, pretrained.fresh(network(images.classes)), batch, held_out=100, quick=1)


def _sentence_task(cache: Path, count: int, length: int, batch: int) -> Task:
    """Verses of 1611 to be found among modern ones, whose embeddings the float encoder made; reports to be compared."""
    encoder, tokens = pretrained.minilm(cache)
    known = data.verses(cache)
    chosen = [known[i] for i in torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:count].tolist()]
    old, new = map(list, zip(*chosen, strict=True))
    of_new = tokens(new, INDEX_LENGTH)
    index = pretrained.embedded(encoder, of_new, cache / f"verses-{count}x{INDEX_LENGTH}.pt")
    documents, rated = data.rated_documents(cache)
    return _search_task(
        encoder, tokens(old, length), index, (tokens(documents, length), torch.from_numpy(rated)), batch
    )


def _search_task(encoder: nn.Module, queries: Tensor, index: Tensor, documents: Batch, batch: int) -> Task:
    """The last sixth of the queries is held out; they come in batches of as many as there are documents."""
    cut = len(queries) - len(queries) // 6
    places = torch.arange(len(queries))
    found = data.Labelled((queries[:cut], places[:cut]), (queries[cut:], places[cut:]), len(index))
    texts, rated = documents

    def similarity(call: Callable[[Tensor], Tensor]) -> float:
        embedded = call(texts)
        pairs = torch.triu_indices(len(texts), len(texts), 1)
        alike, judged = ((x[pairs[0], pairs[1]]).numpy() for x in (embedded @ embedded.T, rated))
        return rank_correlation(alike, judged)

    task = _labelled_task(found, pretrained.fresh(encoder), batch, held_out=len(texts), quick=1)
    return replace(task, logits=lambda embedded: embedded @ index.T / TEMPERATURE, similarity=similarity)


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
    "shakespeare-1m": Study(
        lambda cache: _text_task(data.shakespeare(cache), width=168, context=128, batch=8, held_out=6, layers=3),
        steps=300,
        rates=(3e-3, 1e-2, 3e-2),
        settings=("A1W1", "W1", "A2W2", "A4W1-2:4", "W4"),
        keep=("embed",),
        score="loss",
        description="transformer over characters, 3 layers of 168, 1.07 M parameters, 300 steps of 8 x 128 characters; "
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
    "watch": Study(
        lambda cache: _movement_task(data.watch(cache, length=100), width=96, batch=64),
        steps=300,
        rates=(2e-3, 6e-3, 2e-2),
        settings=BREADTH,
        keep=("stem", "head"),
        score="accuracy",
        description="two convolutions over time and a GRU of 96, 72 k parameters, 300 steps of 64 windows of two "
        "seconds; stem and head stay float",
    ),
    "emoji": Study(
        lambda cache: _emoji_task(data.emoji(cache, side=48), lambda n: pretrained.lite0(cache, n), batch=32),
        steps=40,
        rates=(3e-4, 1e-3, 3e-3),
        settings=BREADTH,
        keep=("network._conv_stem", "*_depthwise_conv", "head"),
        score="accuracy",
        fine_tunes=True,
        description="EfficientNet-Lite0 from its ImageNet weights, 3.4 M parameters, 40 steps of 32 images; stem, "
        "depthwise convolutions and head stay float",
    ),
    "verses": Study(
        lambda cache: _sentence_task(cache, count=1200, length=16, batch=16),
        steps=30,
        rates=(1e-4, 3e-4, 1e-3),
        settings=BREADTH,
        keep=("bert.embeddings",),
        score="accuracy",
        fine_tunes=True,
        description="MiniLM from its weights, 10.6 M parameters in its layers, 30 steps of 16 verses of 16 tokens; the "
        "embeddings stay float",
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
    "smoke-movement": Study(
        lambda cache: _movement_task(_windows(), width=8, batch=8),
        steps=4,
        rates=(1e-2,),
        settings=("A2W2",),
        keep=("stem", "head"),
        score="accuracy",
    ),
    "smoke-sentences": Study(
        lambda cache: _search_task(*_sentences(), batch=4),
        steps=4,
        rates=(1e-2,),
        settings=("A8W1.58",),
        keep=("bert.embeddings",),
        score="accuracy",
    ),
}


def _windows() -> data.Labelled:
    """Noise with a level that tells the class."""
    labels = torch.arange(750) % 3
    windows = torch.randn(750, 2, 20, generator=torch.Generator().manual_seed(0)) + labels[:, None, None]
    return data.Labelled((windows[:500], labels[:500]), (windows[500:], labels[500:]), 3)


def _sentences() -> tuple[nn.Module, Tensor, Tensor, Batch]:
    """An untrained BERT of one layer, random tokens as queries, its own embeddings of them as the index."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 8}
    bert = BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes), add_pooling_layer=False)
    encoder = pretrained.Encoder(bert).eval()
    tokens = torch.randint(1, 50, (60, 6))
    tokens[:, 4:] *= torch.randint(0, 2, (60, 1))  # some end early
    with torch.no_grad():
        index = encoder(tokens)
    return encoder, tokens, index, (tokens[:5], torch.rand(5, 5))


def score(study: Study, outputs: Tensor, targets: Tensor) -> float:
    """The mean score of a batch: nats a character, or the fraction of images that is right."""
    if study.score == "loss":
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten()).item()
    return (outputs.argmax(-1) == targets).float().mean().item()


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's."""
    ranks = []
    for values in (x, y):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])  # equal values share their mean rank
    return float(np.corrcoef(*ranks)[0, 1])
