"""`compare`: two forms of one model, run on the same inputs, layer by layer.

How the layers of a module are recorded is in `recorded.py`, those of a file in `onnx_values.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from qgraph.analysis.recorded import SEQUENTIAL, Recorded, parents, record_module
from qgraph.errors import ExportError, InspectError
from qgraph.graph import unwrapped
from qgraph.terminal import as_text

__all__ = ["LayerDifference", "ModelComparison", "compare"]

EQUAL, SAME_ORDER = 100, 60  # dB
Comparable = nn.Module | str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """The output of one call of a module in both.

    Parameters
    ----------
    path : str
        Module path; "" is the model itself.
    call : int
        Which of the module's calls, from 0; of a file the last one alone is seen.
    kind : str
        The module's class, "" where both are files.
    shape : tuple of int
    snr_db : float
        Signal-to-noise ratio in decibels, `a` being the signal; inf where they are equal, -inf where one of them is not
        finite.
    cosine : float
        Of the angle between the two; NaN where one is zero.
    max_error : float
        The largest absolute difference.
    problem : str or None
        What is not finite, in which of them.
    """

    path: str
    call: int
    kind: str
    shape: tuple[int, ...]
    snr_db: float
    cosine: float
    max_error: float
    problem: str | None = None

    @property
    def name(self) -> str:
        return (self.path or "the model") + (f" (call {self.call + 1})" if self.call else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; None for what no JSON number is, `equal` says that nothing differs."""
        data = asdict(self)
        for key in ("snr_db", "cosine", "max_error"):
            data[key] = data[key] if math.isfinite(data[key]) else None
        return {**data, "equal": self.snr_db == math.inf and self.problem is None}


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """What `compare` found; `print` it.

    Parameters
    ----------
    titles : what `a` and `b` are
    rows : tuple of LayerDifference
        In the order of execution.
    only_a, only_b : tuple of str
        Modules that ran, or are seen, in one of them alone.
    """

    titles: tuple[str, str]
    rows: tuple[LayerDifference, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    def first_drop(self, threshold: float) -> LayerDifference | None:
        """The first layer that is not finite or whose signal-to-noise ratio is below `threshold` dB, or None."""
        return next((row for row in self.rows if row.problem or row.snr_db < threshold), None)

    @property
    def worst(self) -> LayerDifference:
        """The layer with the lowest signal-to-noise ratio, the first of equal ones."""
        return min(self.rows, key=lambda row: row.snr_db)

    def __getitem__(self, path: str) -> LayerDifference:
        """The row of a module; of several calls the one with the lowest ratio."""
        rows = [row for row in self.rows if row.path == path]
        if not rows:
            raise KeyError(path)
        return min(rows, key=lambda row: row.snr_db)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "a": self.titles[0],
            "b": self.titles[1],
            "layers": [row.to_dict() for row in self.rows],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
        }

    def plot(self, path: str | os.PathLike[str], *, threshold: float | None = None) -> Path:
        """Draw the ratio of each layer, in the order of execution.

        Parameters
        ----------
        path : str or path
            Ends in .png, .svg or .pdf.
        threshold : float, optional
            In dB: drawn as a line, and the first layer below it is marked.

        Returns
        -------
        Path
            Of the file, absolute.

        Raises
        ------
        InspectError
            For another suffix, a folder that does not exist, or without matplotlib (extra `plot`).
        """
        from qgraph.analysis.plot import save_plot

        return save_plot(self, Path(path), threshold)

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield f"a: {self.titles[0]}\nb: {self.titles[1]}"
        table = Table()
        for name in ("layer", "kind", "shape", "SNR dB", "cosine", "max error"):
            table.add_column(name, justify="left" if name in ("layer", "kind", "shape") else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*_cells(row), style="red" if row.problem else None)
        yield table
        yield "\n".join(self._lines())

    def __str__(self) -> str:
        return as_text(self)

    def _lines(self) -> list[str]:
        broken = [f"{row.name}: {row.problem}" for row in self.rows if row.problem]
        lines = []
        if broken:
            lines.append(f"first not finite: {broken[0]}" + (f" (and {len(broken) - 1} more)" if broken[1:] else ""))
        lines.append(f"lowest: {self.worst.name} at {_decibels(self.worst.snr_db)} dB")
        for side, paths in (("a", self.only_a), ("b", self.only_b)):
            if paths:
                more = f" and {len(paths) - 6} more" if len(paths) > 6 else ""
                lines.append(f"seen in {side} alone: {', '.join(path or 'the model' for path in paths[:6])}{more}")
        return lines


def compare(a: Comparable, b: Comparable, inputs: Any) -> ModelComparison:
    """Run two forms of one model on the same inputs and compare what each of their modules computes.

    Modules are told by their paths. Both run in eval mode without gradients, and are left as they were.

    Parameters
    ----------
    a, b : nn.Module, str or Path
        An eager model, a prepared one, or an .onnx file that `qgraph.export` wrote, in any mix. `a` is the reference.
    inputs : Tensor, tuple or mapping
        Positional arguments of the forward, or a mapping of keyword ones. Two files take tensors alone, in order.

    Returns
    -------
    ModelComparison

    Raises
    ------
    InspectError
        When the two have no module in common or differ in a shape, a file is not one of ours, or one of the two does
        not run on the inputs.

    Examples
    --------
    >>> print(qgraph.compare(model, prepared, x))  # doctest: +SKIP
    """
    model = next((side for side in (a, b) if isinstance(side, nn.Module)), None)
    tensors = _tensors(model, inputs)
    first, second = (_record(name, side, inputs, tensors) for name, side in (("a", a), ("b", b)))
    return _aligned(first, second)


def _tensors(model: nn.Module | None, inputs: Any) -> dict[str, Tensor]:
    """The tensors among the inputs by the names that a file gives them; without a model, by their place."""
    from qgraph.exporters.signature import flatten_inputs

    if model is not None:
        try:
            flat = flatten_inputs(unwrapped(model), inputs, None)
        except ExportError as error:
            raise InspectError(f"compare: {str(error).removeprefix('export of ')}") from error
        return dict(zip(flat.names, flat.tensors, strict=True))
    if isinstance(inputs, Mapping):
        return dict(inputs)
    items = inputs if isinstance(inputs, Sequence) else (inputs,)
    return {str(i): item for i, item in enumerate(items)}


def _record(name: str, side: Any, inputs: Any, tensors: Mapping[str, Tensor]) -> Recorded:
    if isinstance(side, nn.Module):
        return record_module(name, side, inputs)
    if isinstance(side, (str, os.PathLike)):
        from qgraph.analysis.onnx_values import record_file

        return record_file(name, Path(side), tensors)
    raise InspectError(
        f"compare: {name} is a {type(side).__name__}. Expected a torch.nn.Module or the path of an .onnx file; "
        f"pass the model object itself."
    )


def _aligned(a: Recorded, b: Recorded) -> ModelComparison:
    rows: list[LayerDifference] = []
    files = a.is_file or b.is_file
    for path, call in a.order:
        if path not in b.calls:
            continue
        kind = a.kinds.get(path) or b.kinds.get(path, "")
        pair = _file_pair(a, b, path, call, kind) if files else _pair(a, b, path, call)
        if pair is None:
            continue
        x, y = pair
        if x.shape != y.shape:
            raise InspectError(
                f"compare: '{path or 'the model'}' gives {tuple(x.shape)} in a ({a.title}) and {tuple(y.shape)} in b "
                f"({b.title}). Expected two forms of one model."
            )
        if x.numel():
            rows.append(_difference(path, call, kind, x, y))
    if not rows and any(x.numel() == 0 for calls in a.calls.values() for x in calls[-1]):
        raise InspectError("compare: the inputs hold no values. Expected at least one sample.")
    inner = any(a.calls.keys() - {""}) and any(b.calls.keys() - {""})
    if not rows or (inner and not any(row.path for row in rows)):
        raise InspectError(
            f"compare: a ({a.title}) and b ({b.title}) have no module in common: a has {_some(a.calls)}, b has "
            f"{_some(b.calls)}. Expected two forms of one model."
        )
    if files:
        rows = _without_other_orders(rows)
    seen = {row.path for row in rows}
    return ModelComparison(
        (a.title, b.title),
        tuple(rows),
        _only(a, b) + tuple(path for path in a.calls if path in b.calls and path not in seen),
        _only(b, a),
    )


def _without_other_orders(rows: list[LayerDifference]) -> list[LayerDifference]:
    """Leave out modules that differ where one around them is equal: a file may compute the same in another order, as
    the rows of a mixture's experts.
    """
    equal = {row.path for row in rows if row.snr_db > EQUAL and not row.problem}
    return [row for row in rows if row.problem or row.snr_db > SAME_ORDER or not equal.intersection(parents(row.path))]


def _only(a: Recorded, b: Recorded) -> tuple[str, ...]:
    """What ran in `a` and not in `b`. A file has no modules that do nothing, and some that are not called in Python."""
    return tuple(
        path
        for path in a.calls
        if path not in b.calls and not (b.is_file and path in a.idle) and not (a.is_file and path in b.kinds)
    )


def _pair(a: Recorded, b: Recorded, path: str, call: int) -> tuple[Tensor, Tensor] | None:
    """Call by call; the last ones alone where one side was called more often."""
    mine, theirs = a.calls[path], b.calls[path]
    if len(mine) == len(theirs):
        return mine[call][0], theirs[call][0]
    return (mine[-1][0], theirs[-1][0]) if call == len(mine) - 1 else None


def _file_pair(a: Recorded, b: Recorded, path: str, call: int, kind: str) -> tuple[Tensor, Tensor] | None:
    """Of a file the last call alone is seen, as one of several values: the first of a fitting shape.

    A file may hold what a layer over sequences returns with batch and time the other way round.
    """
    if call < len(a.calls[path]) - 1:
        return None
    mine, theirs = a.calls[path][-1], b.calls[path][-1]
    if kind in SEQUENTIAL:
        theirs = [*theirs, *(y.transpose(0, 1) for y in theirs if y.dim() == 3)]
    fitting = [(x, y) for x in mine for y in theirs if x.shape == y.shape]
    if path in a.several | b.several:  # which of them, the file does not say
        fitting.sort(key=lambda pair: float((pair[0] - pair[1]).abs().nan_to_num(math.inf).sum()))
    return fitting[0] if fitting else None


def _difference(path: str, call: int, kind: str, x: Tensor, y: Tensor) -> LayerDifference:
    shape, a, b = tuple(x.shape), x.double().flatten(), y.double().flatten()
    problem = _problem(a, b)
    both = torch.isfinite(a) & torch.isfinite(b)
    same = (a == b) | both | (a.isnan() & b.isnan())  # a mask's -inf on both sides is no difference
    finite_a, finite_b = a[both], b[both]
    noise = finite_a - finite_b
    signal, lost = float(finite_a.square().sum()), float(noise.square().sum())
    snr = math.inf if lost == 0 else (10 * math.log10(signal / lost) if signal else -math.inf)
    if not bool(same.all()):
        snr = -math.inf
    norms = math.sqrt(signal * float(finite_b.square().sum()))
    cosine = float(finite_a @ finite_b) / norms if norms else math.nan
    largest = float(noise.abs().max()) if noise.numel() else 0.0
    return LayerDifference(path, call, kind, shape, snr, cosine, largest, problem)


def _problem(a: Tensor, b: Tensor) -> str | None:
    """NaN in either, or an infinity in one alone."""
    lone = (a.isinf() | b.isinf()) & (a != b)
    found = []
    for side, values in (("a", a), ("b", b)):
        count = int(values.isnan().sum())
        if count:
            found.append(f"{count:,} of {values.numel():,} values are NaN in {side}")
        if int((lone & values.isinf()).sum()):
            found.append(f"{int((lone & values.isinf()).sum()):,} of {values.numel():,} values are infinite in {side}")
    return "; ".join(found) or None


def _cells(row: LayerDifference) -> list[str]:
    shape = "x".join(map(str, row.shape))
    return [row.name, row.kind, shape, _decibels(row.snr_db), f"{row.cosine:.6f}", f"{row.max_error:.2e}"]


def _decibels(value: float) -> str:
    return ("equal" if value > 0 else "-inf") if math.isinf(value) else f"{value:.1f}"


def _some(paths: Mapping[str, Any]) -> str:
    return ", ".join([path or "the model" for path in paths][:4]) or "none"
