"""`qgraph demo`: two small models on scikit-learn's digits, trained at six configs, exported and run.

One recipe for everything, no tuning per config. What is printed is one `Row` a model and config;
`Result.to_dict` is its machine-readable twin. The data ships with scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor, nn

import qgraph
from qgraph.errors import QGraphError
from qgraph.runtime import ROUNDING, compare_outputs, session_for, time_files
from qgraph.workers import Tell, run_jobs

__all__ = ["CONFIGS", "DigitsCNN", "DigitsTransformer", "Recipe", "Result", "Row", "run"]

FULL_PRECISION = "FP32"
CONFIGS = (FULL_PRECISION, "W4", "W1.58", "A4W1", "A1W1", "A4W1-2:4")
CLASSES = 10
SIDE = 8  # a digit is 8 x 8 pixels
PIXEL_MAX = 16.0


class DigitsCNN(nn.Module):
    """Three convolutions with batch norm, and a linear head; 216 k parameters."""

    def __init__(self, widths: Sequence[int] = (48, 96, 192)) -> None:
        super().__init__()
        first, second, third = widths
        self.body = nn.Sequential(
            _conv_block(1, first, stride=1),
            _conv_block(first, second, stride=2),
            _conv_block(second, third, stride=2),
        )
        self.head = nn.Linear(third * (SIDE // 4) ** 2, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).flatten(1))


class DigitsTransformer(nn.Module):
    """The rows of a digit as tokens, two pre-norm layers, and a linear head; 233 k parameters."""

    def __init__(self, width: int = 96, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE, width)
        self.position = nn.Parameter(torch.randn(SIDE, width) * 0.02)
        self.layers = nn.ModuleList(_TransformerLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(SIDE * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.squeeze(1)) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).flatten(1))


class _TransformerLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        query, key, value = (self._split(linear(y)) for linear in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _conv_block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": DigitsCNN, "transformer": DigitsTransformer}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How everything is trained: AdamW, linear warm-up, cosine decay, gradient norm clipped to 1."""

    epochs: int = 20
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    seed: int = 0
    latency_runs: int = 200


@dataclass(frozen=True, slots=True)
class Row:
    """One model at one config.

    `max_difference` is relative to the largest output of torch over the test set; `flipped` of `outputs`
    values are further apart than rounding. `latency_ms` is a median for one image; `speedup` is that of FP32
    over it.
    """

    model: str
    config: str
    parameters: int
    accuracy_torch: float
    accuracy_onnxruntime: float
    max_difference: float
    flipped: int
    outputs: int
    bits_per_weight: float
    file_bytes: int
    latency_ms: float
    speedup: float
    train_seconds: float
    export_seconds: float
    file: str


@dataclass(slots=True)
class Result:
    """All rows of one run, and what they were measured with."""

    folder: str
    recipe: Recipe
    workers: int
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return asdict(self)

    def table(self) -> Table:
        """The rows as a rich table."""
        table = Table(box=box.SIMPLE_HEAD, padding=0)
        for name in ("model", "config"):
            table.add_column(name, no_wrap=True)
        for name in (
            "accuracy\ntorch",
            "accuracy\nORT",
            "largest\ndiff.",
            "flips",
            "bits/\nweight",
            "file\nKB",
            "ORT\nms",
            "speed",
        ):
            table.add_column(name, justify="right", no_wrap=True)
        for previous, row in zip([None, *self.rows], self.rows, strict=False):
            if previous is not None and previous.model != row.model:
                table.add_section()
            table.add_row(*_cells(row))
        return table

    def notes(self) -> list[str]:
        """What the table's columns mean, in a few lines."""
        images, outputs = self.rows[0].outputs // CLASSES, self.rows[0].outputs
        return [
            f"One recipe for every row, {images} test images. ORT: onnxruntime.",
            "Largest diff.: between the outputs of both, relative to the largest output.",
            f"Flips: outputs, of {outputs}, that differ by more than {ROUNDING:g}: an activation on",
            "a rounding tie went the other way and took some outputs with it.",
            "ORT ms: one image, one thread, median in turns; speed is that of FP32 over it.",
            "Activations below 8 bits are rounded at run time, at a cost: stock onnxruntime",
            "has no kernels for them. What such small models gain is size.",
        ]


def run(
    folder: Path,
    recipe: Recipe | None = None,
    configs: Sequence[str] = CONFIGS,
    models: Sequence[str] = tuple(MODELS),
    tell: Tell = lambda what, share: None,
    workers: int = 1,
) -> Result:
    """Train, export and measure every model at every config.

    Parameters
    ----------
    folder : Path
        Where the .onnx files go; made if absent, files of the same names are replaced.
    recipe : Recipe, optional
    configs : sequence of str
        Notations; `FP32` is the model as it is, and comes first whatever the order.
    models : sequence of "cnn" and "transformer"
    tell : callable (what, share)
        Told what is being done and which share of the whole was finished since the last call.
    workers : int
        Processes that train and export, with one thread each; results do not depend on it. Times are
        measured afterwards, in this process.
    """
    recipe = recipe or Recipe()
    started = time.perf_counter()
    for config in configs:
        if config != FULL_PRECISION:
            qgraph.QConfig.parse(config)  # a typo is told before the first training, not after it
    _digits(recipe.seed)  # and so is a missing scikit-learn
    folder.mkdir(parents=True, exist_ok=True)
    configs = (FULL_PRECISION, *(config for config in configs if config != FULL_PRECISION))
    jobs = [_Job(name, config, str(folder), recipe) for name in models for config in configs]
    made = run_jobs(_train_and_export, jobs, workers, lambda what, share: tell(what, share / len(jobs)))
    result = Result(str(folder), recipe, workers, _versions())
    for start in range(0, len(made), len(configs)):
        rows = made[start : start + len(configs)]
        timings = time_files([row["file"] for row in rows], recipe.latency_runs)
        for row, timing in zip(rows, timings, strict=True):
            result.rows.append(Row(**row, latency_ms=timing.median_ms, speedup=timing.speedup))
    result.seconds = time.perf_counter() - started
    return result


@dataclass(frozen=True, slots=True)
class _Job:
    model: str
    config: str
    folder: str
    recipe: Recipe

    def __str__(self) -> str:
        return f"{self.model} {self.config}"


@dataclass(frozen=True, slots=True)
class _Data:
    train_x: Tensor  # (images, 1, 8, 8) float32 in 0..1
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def _digits(seed: int) -> _Data:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise QGraphError("qgraph demo needs scikit-learn for its digits: pip install 'qgraph[demo]'.") from error
    digits = load_digits()
    images = (digits.images / PIXEL_MAX).astype(np.float32)[:, None]
    parts = train_test_split(images, digits.target, test_size=0.25, random_state=seed, stratify=digits.target)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return _Data(train_x, train_y, test_x, test_y)


def _train_and_export(job: _Job, tell: Tell) -> dict[str, Any]:
    """Everything of a row but its latency."""
    name, config, recipe = job.model, job.config, job.recipe
    data = _digits(recipe.seed)
    torch.manual_seed(recipe.seed)
    model = MODELS[name]()
    parameters = sum(p.numel() for p in model.parameters())
    example = data.test_x[:2]
    path = Path(job.folder) / f"{name}-{config.replace(':', 'of')}.onnx"
    tell(f"{job}: training", 0.0)
    with _one_thread():
        if config != FULL_PRECISION:
            model = qgraph.prepare(model, config, (example,))
        started = time.perf_counter()
        _train(model, recipe, data, lambda: tell(f"{job}: training", 0.8 / recipe.epochs))
        trained = time.perf_counter()
        bits = _export(model, config, path, example)
        exported = time.perf_counter()
    tell(f"{job}: exported", 0.2)
    with torch.no_grad():
        expected = model(data.test_x).numpy()
    session = session_for(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: data.test_x.numpy()})
    same = compare_outputs(str(path), [found], [expected])
    labels = data.test_y.numpy()
    return {
        "model": name,
        "config": config,
        "parameters": parameters,
        "accuracy_torch": float((expected.argmax(1) == labels).mean()),
        "accuracy_onnxruntime": float((found.argmax(1) == labels).mean()),
        "max_difference": same.max_difference,
        "flipped": same.beyond,
        "outputs": same.values,
        "bits_per_weight": bits,
        "file_bytes": path.stat().st_size,
        "train_seconds": trained - started,
        "export_seconds": exported - trained,
        "file": str(path),
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Models so small gain nothing from more, and results are then the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(model: nn.Module, recipe: Recipe, data: _Data, after_epoch: Callable[[], None]) -> None:
    """An ordinary training loop: it does not know whether the model is quantized."""
    order = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * (len(data.train_x) // recipe.batch)
    warmup = max(1, int(recipe.warmup * steps))

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    for _ in range(recipe.epochs):
        shuffled = torch.randperm(len(data.train_x), generator=order)
        for batch in shuffled.split(recipe.batch):
            if len(batch) < recipe.batch:
                continue
            loss = F.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        after_epoch()
    model.eval()


def _export(model: nn.Module, config: str, path: Path, example: Tensor) -> float:
    """Write the file; returns the bits per weight in it."""
    if config != FULL_PRECISION:
        return qgraph.export(model, path, (example,), progress=False).bits_per_weight
    from qgraph.exporters.trace import quiet

    batch = torch.export.Dim("batch", min=1)
    with quiet():
        torch.onnx.export(
            model, (example,), path, dynamo=True, dynamic_shapes=({0: batch},), external_data=False, verbose=False
        )
    return 32.0


def _versions() -> dict[str, str]:
    import onnxruntime

    return {"qgraph": qgraph.__version__, "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        row.config,
        f"{row.accuracy_torch:.1%}",
        f"{row.accuracy_onnxruntime:.1%}",
        f"{row.max_difference:.1e}",
        str(row.flipped),
        f"{row.bits_per_weight:.2f}",
        f"{row.file_bytes / 1024:,.0f}",
        f"{row.latency_ms:.3f}",
        f"{row.speedup:.2f}x",
    )
