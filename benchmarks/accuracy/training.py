"""One run: a model, a config, a learning rate and a seed make one JSON row."""

from __future__ import annotations

import math
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qgraph
from benchmarks.accuracy.methods import FULL_PRECISION, config
from benchmarks.accuracy.studies import Study, Task, score
from qgraph.modules import collecting

WARM_UP = 0.1  # of the steps; then a cosine to 0
CLIP_NORM = 1.0
POINTS = 10  # of the curve
WORSE = 0.05  # the last value this much worse than the best one counts as divergence


@dataclass(frozen=True, slots=True)
class Run:
    """What tells one run from another."""

    study: str
    setting: str
    method: str
    rate: float
    seed: int
    export: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """Identity, export aside."""
        return self.study, self.setting, self.method, self.rate, self.seed


def run(which: Run, study: Study, task: Task, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train, score in torch, and where asked export and score in onnxruntime; `tick` is called once a step."""
    torch.manual_seed(which.seed)
    draws = torch.Generator().manual_seed(which.seed)
    settings = config(which.setting, which.method, study.keep)
    model = task.build()
    x = task.held_out[0][0]
    if settings is not None:
        model = qgraph.prepare(model, settings, (x[:2],))
    optimizer, schedule = _optimizer(model, study, which.rate)
    curve, train_curve, flips, recent = [], [], [], []
    started = time.perf_counter()
    with torch.no_grad():
        start = _loss(model.eval(), task, task.quick, study)[0]
    for step in range(study.steps):
        model.train()
        inputs, targets = task.batch(draws)
        loss = F.cross_entropy(task.logits(model(inputs)).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        point = (step + 1) * POINTS // study.steps > step * POINTS // study.steps
        codes = _codes(model, x[:2]) if point and settings is not None else None
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if point:
            if codes is not None:
                flips.append(_flipped(codes, _codes(model, x[:2])))
            curve.append(_loss(model, task, task.quick, study)[0])
            train_curve.append(sum(recent) / len(recent))
            recent = []
        tick()
        if not math.isfinite(recent[-1] if recent else train_curve[-1]):
            break
    final, final_score = _loss(model, task, len(task.held_out), study)
    row: dict[str, Any] = {
        "study": which.study,
        "setting": which.setting,
        "method": which.method,
        "rate": which.rate,
        "seed": which.seed,
        "steps": study.steps,
        "loss": _short(final),
        "score": _short(final_score),
        "start": _short(start),
        "curve": [_short(value) for value in curve],
        "train_curve": [_short(value) for value in train_curve],
        "flips": [_short(value) for value in flips],
        "diverged": diverged(start, curve),
        "seconds": round(time.perf_counter() - started, 1),
        "config": None if settings is None else settings.to_dict(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    if task.similarity is not None:
        with torch.no_grad():
            row["similarity"] = _short(task.similarity(model))
    if which.export and settings is not None:
        row |= _exported(model, study, task, x)
    return row


def diverged(start: float, curve: list[float]) -> str | None:
    """Why a run counts as diverged, or None: NaN, a loss above the start, or a last value 5 % worse than the best."""
    if not curve or not all(map(math.isfinite, curve)):
        return "not finite"
    if curve[-1] > start:
        return "above the start"
    if curve[-1] > (1 + WORSE) * min(curve):
        return "worse than its best"
    return None


def _optimizer(model: nn.Module, study: Study, rate: float) -> tuple[Any, Any]:
    """AdamW with decay on matrices alone; learned steps get the rate of everything else."""
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith(".step")]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": matrices, "weight_decay": study.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warm = max(1, round(WARM_UP * study.steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, study.steps - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def _loss(model: nn.Module, task: Task, batches: int, study: Study) -> tuple[float, float]:
    """Mean held-out loss and score."""
    model.eval()
    losses, scores = [], []
    for inputs, targets in task.held_out[:batches]:
        outputs = task.logits(model(inputs))
        losses.append(F.cross_entropy(outputs.flatten(0, -2), targets.flatten()).item())
        scores.append(score(study, outputs, targets))
    return sum(losses) / len(losses), sum(scores) / len(scores)


@torch.no_grad()
def _codes(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.eval()
    with collecting() as found:
        model(x)
    model.train()
    weights = (compact.expand() for compact in found.weights.values())
    return [weight.codes for weight in weights if weight.codes is not None]


def _flipped(before: list[Tensor], after: list[Tensor]) -> float:
    """The fraction of weight codes that one step changed."""
    changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    return changed / max(1, sum(codes.numel() for codes in before))


def _exported(model: nn.Module, study: Study, task: Task, x: Tensor) -> dict[str, Any]:
    """Scores of both exported files, or why there is none."""
    model.eval()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in ("ort", "standard"):
            path = Path(folder) / f"{target}.onnx"
            try:
                report = qgraph.export(model, path, (x,), target=target, dynamic_shapes={}, progress=False)
            except qgraph.ExportError as error:  # a refusal is a result too, and no reason to stop the sweep
                found[f"refused_{target}"] = str(error)
                continue
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

            def call(inputs: Tensor, session: onnxruntime.InferenceSession = session) -> Tensor:
                (outputs,) = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(inputs.numpy())})
                return torch.from_numpy(outputs)

            scores = [score(study, task.logits(call(inputs)), targets) for inputs, targets in task.held_out]
            found[f"score_{target}"] = _short(sum(scores) / len(scores))
            if task.similarity is not None:
                found[f"similarity_{target}"] = _short(task.similarity(call))
            found["bits_per_weight"] = _short(report.bits_per_weight)
    return found


def _short(value: float) -> float | str:
    """Five digits; what JSON has no number for as text."""
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)


def baseline(study: str, rate: float, seed: int) -> Run:
    """A full-precision run."""
    return Run(study, FULL_PRECISION, FULL_PRECISION, rate, seed)
