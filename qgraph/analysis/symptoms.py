"""Which readings of a weight mean trouble, and what to try against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qgraph.analysis.readings import WeightReading
from qgraph.config import QuantSpec

# Signal to noise of a Gaussian at its best uniform step, dB by bits (Max, "Quantizing for minimum distortion", 1960).
GAUSSIAN_DB = {1: 4.40, 1.58: 7.2, 2: 9.25, 3: 14.27, 4: 19.38, 5: 24.57, 6: 29.83, 7: 35.13, 8: 40.34}
POOR_FIT = 1 / 3  # of these: a min/max scale keeps about half of them
FEW_LEVELS = 0.25  # a Gaussian between its extremes uses 0.4 to 0.6 of the levels
DEAD = 0.05
OSCILLATION = 0.01  # of all codes, changed and changed back within two steps
DRIFT = 1.0  # octaves between two measurements
CORRECTIVE = 0.6

KINDS = ("not finite", "dead groups", "few levels", "poor fit", "oscillation", "scale drift", "corrective gradient")


@dataclass(frozen=True, slots=True)
class Symptom:
    """What is wrong with one weight.

    Parameters
    ----------
    site, path : str
    kind : str
        One of `KINDS`, which are in the order of what to look at first.
    found, advice : str
        The numbers, and what to try.
    first_step, last_step : int
        Measurements that showed it.
    badness : float
        How far beyond what is usual; compares symptoms of one kind.
    """

    site: str
    path: str
    kind: str
    found: str
    advice: str
    first_step: int
    last_step: int
    badness: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @property
    def rank(self) -> tuple[int, int, float]:
        """Sorts what to look at first to the front: of what is not finite, and spreads, the earliest."""
        at = KINDS.index(self.kind)
        return at, self.first_step if at == 0 else 0, -self.badness


def symptoms(reading: WeightReading, spec: QuantSpec) -> Iterator[Symptom]:
    """What a reading shows."""

    def symptom(kind: str, found: str, advice: str, badness: float) -> Symptom:
        return Symptom(reading.site, reading.path, kind, found, advice, reading.step, reading.step, badness)

    if reading.problem is not None:
        yield symptom(
            "not finite", reading.problem, _not_finite(reading.problem), 0.0 if "grad" in reading.problem else 1
        )
        return
    if reading.dead > DEAD:
        found = f"{reading.dead:.0%} of the groups have one code for all their weights"
        yield symptom("dead groups", found, _dead(spec), reading.dead)
    if reading.usage < FEW_LEVELS:
        found = f"{reading.usage:.1%} of the {_levels(spec)} levels are in use"
        yield symptom("few levels", found, _few_levels(reading, spec), -reading.usage)
    expected = GAUSSIAN_DB[spec.bits]
    if reading.snr_db < POOR_FIT * expected:
        found = f"{reading.snr_db:.1f} dB signal to noise, {expected:.0f} dB are usual at {spec.bits} bits"
        yield symptom("poor fit", found, _few_levels(reading, spec), -reading.snr_db / expected)
    if (reading.returned or 0.0) > OSCILLATION:
        found = f"{reading.returned:.1%} of the codes changed and changed back in two steps"
        advice = "lower the learning rate, or let it decay to 0" + _other_method(spec)
        yield symptom("oscillation", found, advice, reading.returned or 0.0)
    if (reading.drift or 0.0) > DRIFT:
        found = f"scales changed by a factor of {2 ** (reading.drift or 0.0):.1f} since the measurement before"
        yield symptom("scale drift", found, "lower the learning rate, or warm it up for longer", reading.drift or 0.0)
    if (reading.corrective or 0.0) > CORRECTIVE:
        found = f"{reading.corrective:.0%} of the gradient is beyond the straight-through one: codes fit poorly"
        yield symptom("corrective gradient", found, _finer(reading, spec), reading.corrective or 0.0)


def _not_finite(problem: str) -> str:
    if "gradient" in problem:
        return "leave such a step out, clip the gradient norm, lower the learning rate; in 16 bits scale the loss"
    if "step" in problem:
        return "load the last good checkpoint, and give learned steps a smaller learning rate"
    return "load the last good checkpoint; qgraph.compare of it and this model names the first layer with NaN"


def _dead(spec: QuantSpec) -> str:
    if spec.learns:
        return "the learned step is far too large: a smaller learning rate for steps" + _other_method(spec)
    return "the weights of a group are equal: less weight decay, another initialization, or larger groups"


def _few_levels(reading: WeightReading, spec: QuantSpec) -> str:
    if spec.learns:
        return "the learned step fits the weights no more: a smaller learning rate for steps" + _other_method(spec)
    return "outliers stretch the grid: " + _finer(reading, spec)


def _finer(reading: WeightReading, spec: QuantSpec) -> str:
    tried = [f"Rule({reading.path!r}, 'W{min(8, 2 * int(spec.bits))}')"] if spec.bits < 8 else []
    if spec.granularity == "tensor":
        tried.append("one scale a channel")
    if spec.granularity in ("tensor", "channel"):
        tried.append("blocks (@128)")
    if spec.scale == "minmax" and spec.method == "ddt" and spec.bits > 1:
        tried.append("scale='absmean', which clips")
    return ", or ".join(tried) or "smaller blocks, or leave the layer float by a rule"


def _other_method(spec: QuantSpec) -> str:
    return "" if spec.method == "ddt" else "; or method='ddt'"


def _levels(spec: QuantSpec) -> int:
    low, high = spec.levels
    return 2 if spec.bits == 1 else high - low + 1
