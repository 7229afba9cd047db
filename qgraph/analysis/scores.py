"""Scores of one model by name: one number an evaluation, kept in a file that a stopped run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qgraph.errors import InspectError
from qgraph.graph import config_of

FORMAT = 1  # of the file


class Scores:
    """What was found so far; `found` is by name.

    Parameters
    ----------
    prepared : nn.Module
        Scores of another config or of other weights are an error.
    path : path, optional
        The JSON file.
    asked : str
        Who says so in errors.
    """

    def __init__(self, prepared: nn.Module, path: str | os.PathLike[str] | None, asked: str) -> None:
        self.path = None if path is None else Path(path)
        # Of a whole model it takes a while, and without a file nobody asks for it.
        self.key: dict[str, object] = {} if path is None else _key(prepared)
        self.found: dict[str, float] = {} if self.path is None else _read(self.path, self.key, asked)

    def add(self, name: str, score: float) -> None:
        """Take a score, and write all of them."""
        self.found[name] = score
        if self.path is not None:
            partial = self.path.with_name(f"{self.path.name}.partial")
            partial.write_text(json.dumps({**self.key, "scores": self.found}, indent=2))
            os.replace(partial, self.path)


def score_of(evaluate: Callable[[nn.Module], float], model: nn.Module, name: str, asked: str = "sensitivity") -> float:
    """What `evaluate` gives for a model; InspectError for what is no number."""
    try:
        value = evaluate(model)
    except ZeroDivisionError as error:
        raise InspectError(
            f"{asked}: evaluate divided by zero for {name!r}. Expected a number; does its loader hold any data? A "
            f"generator that was gone through before is empty."
        ) from error
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError) as error:
        raise InspectError(
            f"{asked}: evaluate returned {type(value).__name__} for {name!r}. Expected a number, such as the accuracy."
        ) from error


def is_loss(evaluate: object, lower_is_better: bool) -> bool:
    """Whether lower is better: it is said, or `evaluate` says so of itself, as `qgraph.divergence` does."""
    return lower_is_better or bool(getattr(evaluate, "lower_is_better", False))


def _key(prepared: nn.Module) -> dict[str, object]:
    return {"format": FORMAT, "config": str(config_of(prepared)), "weights": _fingerprint(prepared)}


def _fingerprint(prepared: nn.Module) -> str:
    """Of the names and bytes of the parameters."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in prepared.named_parameters():
        if "qgraph" not in name.split("."):  # a learned step may be made by the first call
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, key: Mapping[str, object], asked: str) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
        scores = {str(name): float(score) for name, score in data.pop("scores").items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InspectError(
            f"{asked}: {path} cannot be read ({type(error).__name__}). Expected what an earlier run wrote; delete "
            f"it, or pass another path."
        ) from error
    if data != key:
        changed = ", ".join(name for name in key if data.get(name) != key[name])
        raise InspectError(
            f"{asked}: {path} belongs to another model: its {changed} differ. Delete it, or pass another path."
        )
    return scores
