"""Which run comes next, given the rows there are: every method is swept alike, then repeated at its best rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.accuracy.methods import FULL_PRECISION, SETTINGS
from benchmarks.accuracy.studies import Study
from benchmarks.accuracy.training import Run

EXTENSIONS = 1  # a best rate at an edge of the sweep is followed so many steps further
Rows = Sequence[dict[str, Any]]


def pending(name: str, study: Study, setting: str, methods: Sequence[str], seeds: int, rows: Rows) -> list[Run]:
    """The runs of one setting that are known to be needed by now; run them, ask again, until there are none."""
    found: list[Run] = []
    for method in methods:
        sweep = _sweep(name, study, setting, method, rows)
        found += sweep
        best = best_rate(name, setting, method, rows)
        if not sweep and best is not None:
            repeats = [Run(name, setting, method, best, seed, export=True) for seed in range(1, seeds)]
            found += [r for r in repeats if not _done(r, rows)]
    return found


def methods_of(study: Study) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Settings and their methods, full precision first."""
    yield FULL_PRECISION, (FULL_PRECISION,)
    for setting in study.settings:
        yield setting, SETTINGS[setting].methods


def _sweep(name: str, study: Study, setting: str, method: str, rows: Rows) -> list[Run]:
    wanted = [Run(name, setting, method, rate, 0) for rate in study.rates]
    missing = [r for r in wanted if not _done(r, rows)]
    if missing or len(study.rates) < 2:
        return missing
    for _ in range(EXTENSIONS):
        rates = sorted(r["rate"] for r in of(name, setting, method, rows) if r["seed"] == 0)
        best = best_rate(name, setting, method, rows)
        factor = rates[1] / rates[0]
        if len(rates) >= len(study.rates) + EXTENSIONS:
            break
        if best == rates[-1]:
            return [Run(name, setting, method, float(f"{rates[-1] * factor:.2g}"), 0)]
        if best == rates[0]:
            return [Run(name, setting, method, float(f"{rates[0] / factor:.2g}"), 0)]
    return []


def best_rate(name: str, setting: str, method: str, rows: Rows) -> float | None:
    """The rate of the least final loss at seed 0; None where all were lost."""
    finite = [r for r in of(name, setting, method, rows) if r["seed"] == 0 and isinstance(r["loss"], float | int)]
    return min(finite, key=lambda r: r["loss"])["rate"] if finite else None


def of(name: str, setting: str, method: str, rows: Rows) -> list[dict[str, Any]]:
    """The rows of one method."""
    return [r for r in rows if (r["study"], r["setting"], r["method"]) == (name, setting, method)]


def _done(run: Run, rows: Rows) -> bool:
    return any((r["study"], r["setting"], r["method"], r["rate"], r["seed"]) == run.key for r in rows)
