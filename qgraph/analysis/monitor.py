"""`monitor`: how the quantized weights of a model fare while it trains, layer by layer.

What is measured is in `readings.py`, what of it is a sign of trouble in `symptoms.py`.
"""

from __future__ import annotations

import csv as csv_module
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from qgraph.analysis.readings import (
    NUMBERS,
    Operand,
    WeightReading,
    corrective_share,
    drift_of,
    problem_of,
    small_codes,
    snr_of,
    usage_and_dead,
)
from qgraph.analysis.recorded import title_of
from qgraph.analysis.symptoms import KINDS, Symptom, symptoms
from qgraph.config import QuantSpec
from qgraph.errors import ConfigError, InspectError
from qgraph.graph import SiteRecord, is_prepared, matches_site, quantizer_modules, unwrapped
from qgraph.inspection.prepared import site_values
from qgraph.modules import Sparsifier
from qgraph.ops import sparsify
from qgraph.ops.quantized import Quantized
from qgraph.ops.sharded import whole
from qgraph.ops.sparsity import apply_mask
from qgraph.terminal import as_text

__all__ = ["Monitor", "MonitorSummary", "monitor"]

BURST = 3  # steps that one measurement takes: a code that changes, and one that changes back
SHOWN = 20  # weights in a printed summary; `to_dict` has all

Callback = Callable[[int, tuple[WeightReading, ...]], Any]


def monitor(
    prepared: nn.Module,
    *,
    every: int = 100,
    match: str | None = None,
    writer: Any = None,
    csv: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    first_step: int = 0,
) -> Monitor:
    """Watch the quantized weights of a model in training: codes in use, dead groups, flips, drift, gradients.

    Call `step()` once a step, between ``loss.backward()`` and ``optimizer.step()``: a measurement reads weights and
    gradients as they are then, in three steps of every `every`; the others cost nothing. Nothing is hooked into the
    model: torch.compile, evaluations and other wrappers run as without it. Activations are not measured.

    Parameters
    ----------
    prepared : nn.Module
        A prepared model, also in torch.compile's or a data-parallel wrapper.
    every : int
        Steps from one measurement to the next, at least 3. The first one ends at the third step.
    match : str, optional
        A glob of sites or modules, as `qgraph.disabled` takes it.
    writer : object with add_scalar(name, value, step), optional
        Such as torch.utils.tensorboard.SummaryWriter; scalars are called ``qgraph/<site>/<number>``.
    csv : path, optional
        A file to append a line a weight and measurement to.
    callback : callable (step, readings), optional
        Given the `WeightReading` of every weight, after each measurement.
    first_step : int
        The number of the first step, where a run goes on.

    Returns
    -------
    Monitor

    Raises
    ------
    InspectError
        For a model that is not prepared, a writer without add_scalar, or a CSV file that is another table's.
    ConfigError
        For a number of steps that is none, and, at the first measurement, a `match` that matches nothing.

    Examples
    --------
    >>> with qgraph.monitor(prepared, csv="weights.csv") as watch:  # doctest: +SKIP
    ...     for x, y in data:
    ...         loss(prepared(x), y).backward()
    ...         watch.step()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> print(watch.summary())  # doctest: +SKIP
    """
    return Monitor(prepared, every=every, match=match, writer=writer, csv=csv, callback=callback, first_step=first_step)


@dataclass(frozen=True, slots=True)
class MonitorSummary:
    """The last reading of each weight and what is wrong, the thing to look at first in front; `print` it.

    `symptoms` are those of the last measurement, and of all of them what was not finite.
    """

    title: str
    every: int
    measurements: int
    readings: tuple[WeightReading, ...]
    symptoms: tuple[Symptom, ...]

    @property
    def worst(self) -> Symptom | None:
        """What to look at first; None where all is well."""
        return self.symptoms[0] if self.symptoms else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "title": self.title,
            "every": self.every,
            "measurements": self.measurements,
            "weights": [reading.to_dict() for reading in self.readings],
            "symptoms": [symptom.to_dict() for symptom in self.symptoms],
        }

    def __rich_console__(self, console: Any, options: Any) -> Any:
        last = max((reading.step for reading in self.readings), default=None)
        when = "no measurement yet" if last is None else f"{self.measurements} measurements, the last at step {last}"
        yield f"{self.title}: {when}"
        sick = {symptom.site: None for symptom in self.symptoms}
        order = {site: place for place, site in enumerate(sick)}
        readings = sorted(self.readings, key=lambda reading: order.get(reading.site, len(order)))
        table = Table()
        for name in ("weight", "levels used", "dead", "SNR dB", "drift", "flips", "returned", "corrective"):
            table.add_column(name, justify="left" if name == "weight" else "right", overflow="fold")
        for reading in readings[:SHOWN]:
            table.add_row(*_cells(reading), style="red" if reading.site in sick else None)
        yield table
        if len(readings) > SHOWN:
            yield f"and {len(readings) - SHOWN} more"
        if not self.symptoms:
            yield "all is well" if readings else ""
        for symptom in self.symptoms[:SHOWN]:
            steps = f"step {symptom.first_step}"
            steps += f" to {symptom.last_step}" if symptom.last_step > symptom.first_step else ""
            yield f"{symptom.site}: {symptom.kind}, {steps}: {symptom.found}\n    try: {symptom.advice}"

    def __str__(self) -> str:
        return as_text(self)


class Monitor:
    """What `qgraph.monitor` returns: step it, close it, or use it as a context manager."""

    def __init__(
        self,
        prepared: nn.Module,
        *,
        every: int,
        match: str | None,
        writer: Any,
        csv: str | os.PathLike[str] | None,
        callback: Callback | None,
        first_step: int,
    ) -> None:
        self._model = unwrapped(prepared)
        if not isinstance(self._model, nn.Module) or not is_prepared(self._model):
            raise InspectError(
                f"monitor: {type(self._model).__name__} is not prepared. Expected what qgraph.prepare returns."
            )
        for name, value, least in (("every", every, BURST), ("first_step", first_step, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"monitor: {name} is a whole number of at least {least}, found {value!r}.")
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise InspectError(
                f"monitor: the writer is a {type(writer).__name__} without add_scalar(name, value, step). Pass a "
                f"torch.utils.tensorboard.SummaryWriter, or use csv= or callback=."
            )
        if callback is not None and not callable(callback):
            raise InspectError(
                f"monitor: callback is a {type(callback).__name__}. Expected a function (step, readings)."
            )
        self.every, self.match, self.next_step = every, match, first_step
        self._writer, self._callback = writer, callback
        self._first, self._measurements, self._closed = first_step, 0, False
        self._sites: dict[str, SiteRecord] = {}
        self._modules = -1
        self._codes: list[dict[str, tuple[QuantSpec, Tensor]]] = []  # of the first two steps of a measurement
        self._scales: dict[str, tuple[QuantSpec, Tensor]] = {}
        self._last: dict[str, WeightReading] = {}
        self._symptoms: dict[tuple[str, str], Symptom] = {}
        self._file = None if csv is None else _opened(Path(csv))

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def step(self) -> None:
        """Count a step, and measure where it is due: call it after backward and before the optimizer's step."""
        if self._closed:
            raise InspectError("monitor: step() after close(). Make a new one with first_step= where a run goes on.")
        step, self.next_step = self.next_step, self.next_step + 1
        place = (step - self._first) % self.every
        if place == 0:
            self._codes = []
        if place < BURST - 1:
            self._codes.append(self._coded(step))
        elif place == BURST - 1 and len(self._codes) == BURST - 1:
            self._measure(step)
            self._codes = []

    def close(self) -> None:
        """Close the CSV file and release what is held; `summary()` goes on working. The writer is yours to close."""
        self._closed, self._codes, self._scales = True, [], {}
        if self._file is not None:
            self._file.close()
            self._file = None

    def summary(self) -> MonitorSummary:
        """What was found so far."""
        last = max((reading.step for reading in self._last.values()), default=-1)
        now = (s for s in self._symptoms.values() if s.last_step == last or s.kind == KINDS[0])
        found = sorted(now, key=lambda symptom: symptom.rank)
        return MonitorSummary(
            title_of(self._model), self.every, self._measurements, tuple(self._last.values()), tuple(found)
        )

    @torch.no_grad()
    def _coded(self, step: int) -> dict[str, tuple[QuantSpec, Tensor]]:
        """The codes of every weight; one that is not finite is noted here, before the optimizer spreads it to all."""
        codes = {}
        for site, record, operand in self._operands(grads=False):
            found = operand.quantized()
            codes[site] = (operand.spec, small_codes(found))
            if (problem := problem_of(operand, found)) is not None:
                self._note(WeightReading(site, record.path, str(operand.spec), step, problem), operand.spec)
        return codes

    @torch.no_grad()
    def _measure(self, step: int) -> None:
        readings = []
        for site, record, operand in self._operands(grads=True):
            found = operand.quantized()
            reading = self._reading(site, record, operand, found, step)
            readings.append(reading)
            assert found.scale is not None
            self._scales[site] = (operand.spec, found.scale)
            self._note(reading, operand.spec)
        self._measurements += 1
        self._last = {reading.site: reading for reading in readings}
        self._tell(step, tuple(readings))

    def _note(self, reading: WeightReading, spec: QuantSpec) -> None:
        for symptom in symptoms(reading, spec):
            key = reading.site, symptom.kind
            known = self._symptoms.get(key)
            self._symptoms[key] = symptom if known is None else replace(symptom, first_step=known.first_step)

    def _reading(self, site: str, record: SiteRecord, operand: Operand, found: Quantized, step: int) -> WeightReading:
        problem = problem_of(operand, found)
        plain = WeightReading(site, record.path, str(operand.spec), step, problem)
        if problem is not None and "gradient" not in problem:
            return plain
        usage, dead = usage_and_dead(operand, found)
        flips = returned = None
        # A schedule may have given the weight other bits since: what was before is then another grid.
        first, second = (_same_grid(codes.get(site), operand.spec) for codes in self._codes)
        if first is not None and second is not None and first.shape == second.shape:
            changed = first != second
            flips = float(changed.float().mean())
            returned = float((changed & (small_codes(found) == first)).float().mean())
        assert found.scale is not None
        return replace(
            plain,
            usage=usage,
            dead=dead,
            snr_db=snr_of(operand, found),
            scale=float(found.scale.abs().median()),
            drift=drift_of(found.scale, _same_grid(self._scales.get(site), operand.spec)),
            flips=flips,
            returned=returned,
            corrective=None if problem is not None else corrective_share(operand),
        )

    def _tell(self, step: int, readings: tuple[WeightReading, ...]) -> None:
        if self._writer is not None:
            for reading in readings:
                for name, value in reading.numbers().items():
                    self._writer.add_scalar(f"qgraph/{reading.site}/{name}", value, step)
        if self._file is not None:
            rows = csv_module.writer(self._file)
            for reading in readings:
                numbers = reading.numbers()
                cells = ["" if name not in numbers else f"{numbers[name]:.6g}" for name in NUMBERS]
                rows.writerow([step, reading.site, reading.problem or "", *cells])
            self._file.flush()
        if self._callback is not None:
            self._callback(step, readings)

    def _operands(self, grads: bool) -> list[tuple[str, SiteRecord, Operand]]:
        """Every weight whose quantizer is on, as it is now."""
        modules = list(quantizer_modules(self._model))
        if len(modules) != self._modules:  # quantizers are made by first calls too
            self._modules, self._sites = len(modules), self._found_sites()
        sparsifiers = {module.site: module for module in modules if isinstance(module, Sparsifier)}
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        made = {site for site, record in self._sites.items() if self._parameter(record, parameters) is None}
        values = {}
        if made:  # weights that a forward computes from parameters
            values = {record.name: value for record, value in site_values(self._model) if record.name in made}
        found = []
        for site, record in self._sites.items():
            quantizer = record.quantizer
            parameter = self._parameter(record, parameters)
            value = values.get(site) if parameter is None else parameter
            if quantizer is None or not quantizer.enabled or value is None or not value.numel():
                continue
            weight = whole(value.detach())
            grad = whole(parameter.grad) if grads and parameter is not None and parameter.grad is not None else None
            step = None if quantizer.step is None else whole(quantizer.step.detach())
            pruned = _pruned(weight, sparsifiers.get(site))
            found.append((site, record, Operand(weight, pruned, grad, quantizer.spec, quantizer.groups, step)))
        return found

    def _found_sites(self) -> dict[str, SiteRecord]:
        found: dict[str, SiteRecord] = {}
        for record, _ in site_values(self._model):
            if record.quantizer is not None:
                found.setdefault(record.name, record)
        if not found:
            raise InspectError(
                "monitor: the model has no quantized weight. Give its config a weight (W4), and step() after a forward."
            )
        kept = {site: r for site, r in found.items() if self.match is None or matches_site(site, self.match)}
        if not kept:
            raise ConfigError(f"monitor: no quantized weight matches {self.match!r}; there are {', '.join(found)}.")
        return kept

    def _parameter(self, record: SiteRecord, parameters: dict[str, nn.Parameter]) -> nn.Parameter | None:
        named = parameters.get(record.name)
        return named if named is not None and (not record.shape or tuple(named.shape) == record.shape) else None


def _same_grid(known: tuple[QuantSpec, Tensor] | None, spec: QuantSpec) -> Tensor | None:
    return known[1] if known is not None and known[0] == spec else None


def _pruned(weight: Tensor, sparsifier: Sparsifier | None) -> Tensor | None:
    if sparsifier is None or not sparsifier.enabled or sparsifier.sparsity is None:
        return None
    if sparsifier.frozen and sparsifier.mask is not None:
        return apply_mask(weight, sparsifier.mask)
    return sparsify(weight, sparsifier.sparsity, sparsifier.groups)


def _opened(path: Path) -> Any:
    header = ["step", "site", "problem", *NUMBERS]
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            present = next(csv_module.reader(file), [])
        if present != header:
            raise InspectError(
                f"monitor: {path} holds another table, its columns are {', '.join(present[:6])}. Pass another path."
            )
        return path.open("a", newline="")
    file = path.open("w", newline="")
    csv_module.writer(file).writerow(header)
    return file


def _cells(reading: WeightReading) -> list[str]:
    def share(value: float | None) -> str:
        return "-" if value is None or math.isnan(value) else f"{value:.1%}"

    drift = "-" if reading.drift is None else f"{reading.drift:.2f}"
    return [
        reading.site,
        share(reading.usage),
        share(reading.dead),
        f"{reading.snr_db:.1f}",
        drift,
        share(reading.flips),
        share(reading.returned),
        share(reading.corrective),
    ]
