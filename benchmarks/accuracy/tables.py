"""Rows as markdown tables, and loss curves as plots."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.methods import FULL_PRECISION, SETTINGS
from benchmarks.accuracy.plan import best_rate, of
from benchmarks.accuracy.studies import STUDIES

Rows = list[dict[str, Any]]
NEAR = 0.02
SWEEP = 3  # rates: a method that was run at fewer is not compared
STANDINGS = (
    "method",
    "settings",
    "behind the best, median, %",
    "at most, %",
    "best in",
    "diverged",
    "rates within 2 %",
)
COLUMNS = (
    "method",
    "loss",
    "score",
    "seeds",
    "lr",
    "losses over the sweep",
    "diverged",
    "rise, %",
    "flips, %",
    "onnxruntime",
)


def markdown(rows: Rows) -> str:
    """How the methods stand over all settings at 2 bits and below, then one table a study and setting."""
    parts = [f"### 2 bits and below, all settings\n\n{standings(rows)}"]
    studies = dict.fromkeys(r["study"] for r in rows)
    tuned = {name for name in studies if name in STUDIES and STUDIES[name].fine_tunes}
    if tuned and tuned != {*studies}:
        for title, names in (("trained from scratch", {*studies} - tuned), ("fine-tuned", tuned)):
            parts.append(f"### 2 bits and below, {title}\n\n{standings([r for r in rows if r['study'] in names])}")
    for study in studies:
        for setting in (FULL_PRECISION, *SETTINGS):
            methods = list(dict.fromkeys(r["method"] for r in rows if (r["study"], r["setting"]) == (study, setting)))
            if methods:
                parts.append(f"### {study}, {setting}\n\n{_table(study, setting, methods, rows)}")
    return "\n\n".join(parts)


def standings(rows: Rows) -> str:
    """Each method over the studies and settings that it was run in, at 2 bits of weights and below."""
    found: dict[str, list[_Standing]] = {}
    for study in dict.fromkeys(r["study"] for r in rows):
        for setting in (s for s in SETTINGS if SETTINGS[s].weight <= 2):
            for method, standing in _compared(study, setting, rows).items():
                found.setdefault(method, []).append(standing)
    lines = [f"| {' | '.join(STANDINGS)} |", "| --- " * len(STANDINGS) + "|"]
    for method, own in sorted(found.items(), key=lambda item: statistics.median(s.behind for s in item[1])):
        behind = [100 * s.behind for s in own]
        cells = (
            str(len(own)),
            f"{statistics.median(behind):.1f}",
            f"{max(behind):.1f}",
            str(sum(value == 0 for value in behind)),
            f"{sum(s.diverged for s in own)} of {sum(s.runs for s in own)}",
            f"{statistics.mean(s.near for s in own):.1f}",
        )
        lines.append(f"| {' | '.join((method, *cells))} |")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Standing:
    """One method in one study and setting: how far its loss lies behind the best method's, as a part of that one."""

    behind: float
    diverged: int
    runs: int
    near: int  # rates of the sweep whose loss is within `NEAR` of the best rate's


def _compared(study: str, setting: str, rows: Rows) -> dict[str, _Standing]:
    runs = {m: of(study, setting, m, rows) for m in SETTINGS[setting].methods}
    runs = {m: own for m, own in runs.items() if sum(r["seed"] == 0 for r in own) >= SWEEP}
    best = {m: best_rate(study, setting, m, rows) for m, own in runs.items() if own}
    losses = {m: statistics.mean(r["loss"] for r in runs[m] if r["rate"] == rate) for m, rate in best.items() if rate}
    if len(losses) < 2:
        return {}
    least = min(losses.values())
    compared = {}
    for method, loss in losses.items():
        sweep = [r["loss"] for r in runs[method] if r["seed"] == 0 and not isinstance(r["loss"], str)]
        compared[method] = _Standing(
            loss / least - 1,
            sum(bool(r["diverged"]) for r in runs[method]),
            len(runs[method]),
            sum(value <= (1 + NEAR) * min(sweep) for value in sweep),
        )
    return compared


def _table(study: str, setting: str, methods: list[str], rows: Rows) -> str:
    columns = (*COLUMNS, "similarity") if any("similarity" in r for r in rows if r["study"] == study) else COLUMNS
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    entries = [(m, _entry(study, setting, m, rows)) for m in methods]
    for method, (loss, cells) in sorted(entries, key=lambda e: e[1][0]):
        del loss
        if columns != COLUMNS:
            cells = (*cells, _similarity(study, setting, method, rows))
        lines.append(f"| {' | '.join((method, *cells))} |")
    return "\n".join(lines)


def _entry(study: str, setting: str, method: str, rows: Rows) -> tuple[float, tuple[str, ...]]:
    """The mean loss at the best rate, by which methods are ordered, and the cells of a row."""
    own = of(study, setting, method, rows)
    best = best_rate(study, setting, method, rows)
    sweep = sorted((r for r in own if r["seed"] == 0), key=lambda r: r["rate"])
    losses = ", ".join(f"{r['rate']:g}: {_number(r['loss'])}{'*' if r['diverged'] else ''}" for r in sweep)
    lost = f"{sum(bool(r['diverged']) for r in own)} of {len(own)}"
    at_best = [r for r in own if r["rate"] == best]
    if not at_best:
        return float("inf"), ("", "", "", "", losses, lost, _rise(own), "", "")
    means = {key: statistics.mean(r[key] for r in at_best) for key in ("loss", "score")}
    files = [r for r in at_best if any(f"{kind}_ort" in r for kind in ("score", "refused"))]
    return means["loss"], (
        _spread([r["loss"] for r in at_best]),
        _spread([r["score"] for r in at_best]),
        str(len(at_best)),
        f"{best:g}",
        losses,
        lost,
        _rise(at_best),
        _flips(at_best),
        _files(files),
    )


def _files(files: Rows) -> str:
    """How far the scores of exported files lie from torch's, at most."""
    if not files:
        return ""
    kinds = [(key, target) for key in ("score", "similarity") for target in ("ort", "standard")]
    far = [abs(r[f"{key}_{target}"] - r[key]) for r in files for key, target in kinds if f"{key}_{target}" in r]
    refused = [f"{target} refused" for target in ("ort", "standard") if any(f"refused_{target}" in r for r in files)]
    return ", ".join([*(["equal" if max(far) == 0 else f"within {max(far):.0e}"] if far else []), *refused])


def _similarity(study: str, setting: str, method: str, rows: Rows) -> str:
    best = best_rate(study, setting, method, rows)
    found = [r["similarity"] for r in of(study, setting, method, rows) if r["rate"] == best]
    return _spread(found) if found else ""


def _rise(rows: Rows) -> str:
    """How far a held-out loss climbed above its best before, at most, in percent: oscillation that ended well too."""
    rises = [0.0]
    for curve in (r["curve"] for r in rows):
        values = [v for v in curve if not isinstance(v, str)]
        rises += [value / min(values[: i + 1]) - 1 for i, value in enumerate(values)]
    return f"{100 * max(rises):.0f}"


def _flips(rows: Rows) -> str:
    """Codes that a step changes, early, in the middle and late, in percent."""
    flips = [r["flips"] for r in rows if r["flips"]]
    if not flips:
        return ""
    places = [[f[i] for f in flips] for i in (0, len(flips[0]) // 2 - 1, -2)]
    return " ".join(f"{100 * statistics.mean(p):.2g}" for p in places)


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {(max(values) - min(values)) / 2:.3f}"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


def plots(rows: Rows, folder: Path) -> None:
    """One SVG a study and setting: held-out loss over steps, each method at its best rate."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plots needs matplotlib: pip install matplotlib.") from None
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "qgraph", "svg.fonttype": "none"}  # the same small file for the same rows
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for study in dict.fromkeys(r["study"] for r in rows):
        for setting in SETTINGS:
            methods = dict.fromkeys(r["method"] for r in rows if (r["study"], r["setting"]) == (study, setting))
            if not methods:
                continue
            figure, axes = pyplot.subplots(figsize=(6, 4))
            for where, method in ((FULL_PRECISION, FULL_PRECISION), *((setting, m) for m in methods)):
                best = best_rate(study, where, method, rows)
                chosen = [r for r in of(study, where, method, rows) if r["rate"] == best and r["seed"] == 0]
                for row in chosen:
                    count = len(row["curve"])
                    steps = [row["steps"] * (i + 1) / count for i in range(count)]
                    axes.plot(steps, row["curve"], label=f"{method}, lr {best:g}", linewidth=1.2)
            axes.set(xlabel="step", ylabel="held-out loss", title=f"{study}, {setting}")
            axes.legend(fontsize=7)
            figure.tight_layout()
            figure.savefig(folder / f"{study}-{setting.replace(':', '')}.svg", metadata={"Date": None})
            pyplot.close(figure)
