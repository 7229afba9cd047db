"""Which input dimensions are dynamic, and a second example that shows whether they really are.

Left to choose, the exporter tries batch and sequence, then batch, then nothing; a size is dynamic only if
the torch model itself runs with another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qgraph.errors import ExportError
from qgraph.exporters.signature import FlatInputs, Instance, Slot

Dims = dict[int, str]  # dimension -> name
Run = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """One choice of dynamic dimensions.

    `dims` holds one dict per input; `second` is the example with every dynamic size changed (None when all is
    static) and `reference` is what torch answers on it. `larger` is another, with its answer, of sizes that were asked
    for: twice the example's, since one pixel more makes no further patch. `traces_larger`: by those it is traced, for a
    model that does less at the example's own.
    """

    dims: tuple[Dims, ...]
    second: tuple[Tensor, ...] | None = None
    reference: tuple[Tensor, ...] | None = None
    limits: tuple[tuple[str, int | None, int | None], ...] = ()
    larger: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
    traces_larger: bool = False

    def describe(self, names: Sequence[str]) -> tuple[str, ...]:
        """``x: 0=batch, 1=sequence`` per input that has a dynamic dimension."""
        return tuple(
            f"{name}: " + ", ".join(f"{dim}={label}" for dim, label in sorted(dims.items()))
            for name, dims in zip(names, self.dims, strict=True)
            if dims
        )

    def sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """The size of each named dimension in these inputs."""
        named = zip(self.dims, tensors, strict=True)
        return {label: tensor.shape[dim] for dims, tensor in named for dim, label in dims.items()}

    def torch_dims(self) -> dict[str, Any]:
        """What torch.export is told for each name: a Dim where there are limits to hold, else just "dynamic".

        A named Dim without limits would be refused by a model with a position table, which has an end.
        """
        limits = {name: {"min": low, "max": high} for name, low, high in self.limits}
        names = dict.fromkeys(name for dims in self.dims for name in dims.values())
        return {name: _dim(name, limits.get(name, {})) for name in names}


def candidate_plans(tensors: Sequence[Tensor], names: Sequence[str], run: Run) -> Iterator[ShapePlan]:
    """Plans from most to least dynamic; each one but the last is a plan that torch itself can run."""
    batch = _batch_dims(tensors)
    if any(batch) and runnable(batch, tensors, run) is None:
        batch = tuple({} for _ in tensors)
    groups = _sequence_groups(tensors, names)
    accepted = [group for group in groups if runnable(_merged(batch, group), tensors, run) is not None]
    none: tuple[Dims, ...] = tuple({} for _ in tensors)
    alone = [(none, group) for group in accepted]
    choices = [(batch, *accepted), *((batch, group) for group in accepted), (batch,), *alone]
    seen: list[tuple[Dims, ...]] = []
    for parts in choices:
        dims = _merged(*parts)
        if not any(dims) or dims in seen:
            continue
        seen.append(dims)
        plan = runnable(dims, tensors, run)
        if plan is not None:
            yield plan
    yield ShapePlan(tuple({} for _ in tensors))


def runnable(dims: tuple[Dims, ...], tensors: Sequence[Tensor], run: Run, **limits: Any) -> ShapePlan | None:
    """The plan for `dims` with a second example that the torch model accepts, or None."""
    for step in (1, 3, -1, 0):  # another size, a larger one, a smaller one (position tables have an end), twice it
        found = _accepted(dims, tensors, step, limits, run)
        if found is not None:
            return ShapePlan(dims, *found, tuple((name, *bounds) for name, bounds in limits.items()))
    return None


def _accepted(
    dims: tuple[Dims, ...], tensors: Sequence[Tensor], step: int, limits: Mapping[str, Any], run: Run
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """The example resized, and torch's answer, where there is one."""
    resized = _resized(dims, tensors, step, limits)
    if resized is None:
        return None
    try:
        return resized, run(resized)
    except Exception:  # any error of the user's model means "not this size"
        return None


def given_plan(inputs: FlatInputs, dynamic_shapes: Any, run: Run) -> ShapePlan:
    """The plan that a user's `dynamic_shapes` (as torch.export takes it) stands for.

    Raises
    ------
    ExportError
        When it does not match the arguments, or the model runs with no other size.
    """
    dims: list[Dims] = [{} for _ in inputs.tensors]
    limits: dict[str, tuple[int | None, int | None]] = {}
    names = list(inputs.arguments)
    if isinstance(dynamic_shapes, Mapping):
        unknown = [name for name in dynamic_shapes if name not in inputs.arguments]
        if unknown:
            raise ExportError(
                f"dynamic_shapes: found {unknown[0]!r}; expected names of the arguments given, {names}; "
                "give a dict from argument name to {dimension: name}"
            )
        tree = dict(dynamic_shapes)
    else:
        entries = list(dynamic_shapes)
        if len(entries) > len(names):
            raise ExportError(
                f"dynamic_shapes: found {len(entries)} entries; expected at most {len(names)}, one per "
                "argument "
                f"({names}); give a dict from argument name to {{dimension: name}}"
            )
        tree = dict(zip(names, entries, strict=False))
    for name, spec in tree.items():
        _collect(inputs.arguments[name], spec, name, dims, limits, inputs.tensors)
    if not any(dims):
        return ShapePlan(tuple(dims))
    plan = runnable(tuple(dims), inputs.tensors, run, **limits)
    if plan is None:
        raise ExportError(
            "dynamic_shapes: the model itself runs with no other size of "
            f"{sorted({n for d in dims for n in d.values()})}; "
            "expected sizes that it takes; name fewer dimensions, or give each Dim its min and max"
        )
    return replace(plan, larger=_accepted(tuple(dims), inputs.tensors, 0, limits, run))


def tracing_example(plan: ShapePlan, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The example to trace with: torch.export takes a size of 0 or 1 for a constant, so not that one."""
    if plan.traces_larger and plan.larger is not None:
        return plan.larger[0]
    small = any(tensor.shape[dim] < 2 for tensor, dims in zip(tensors, plan.dims, strict=True) for dim in dims)
    return plan.second if small and plan.second is not None else tensors


def _batch_dims(tensors: Sequence[Tensor]) -> tuple[Dims, ...]:
    ranked = [tensor for tensor in tensors if tensor.dim()]
    size = ranked[0].shape[0] if ranked else 0
    found: list[Dims] = []
    for tensor in tensors:
        shape = tensor.shape
        # A recurrent layer's initial state has the batch second.
        at = next((dim for dim in range(min(2, tensor.dim())) if shape[dim] == size), None)
        found.append({} if at is None else {at: "batch"})
    return tuple(found)


def _sequence_groups(tensors: Sequence[Tensor], names: Sequence[str]) -> list[tuple[Dims, ...]]:
    """Dimension 1 of token ids and of (batch, sequence, features); equal sizes go together."""

    def could_be(tensor: Tensor) -> bool:
        return tensor.dim() == 3 if tensor.is_floating_point() else tensor.dim() == 2

    sizes = dict.fromkeys(tensor.shape[1] for tensor in tensors if could_be(tensor))
    groups = []
    for number, size in enumerate(sizes):
        members = [could_be(tensor) and tensor.shape[1] == size for tensor in tensors]
        label = "sequence" if number == 0 else f"{names[members.index(True)]}_sequence"
        groups.append(tuple({1: label} if member else {} for member in members))
    return groups


def _merged(*parts: tuple[Dims, ...]) -> tuple[Dims, ...]:
    """All of them; where two name one dimension, the first."""
    merged: tuple[Dims, ...] = tuple({} for _ in parts[0])
    for part in parts:
        for into, dims in zip(merged, part, strict=True):
            for dim, name in dims.items():
                into.setdefault(dim, name)
    return merged


def _resized(
    dims: tuple[Dims, ...],
    tensors: Sequence[Tensor],
    step: int,
    limits: Mapping[str, tuple[int | None, int | None]],
) -> tuple[Tensor, ...] | None:
    sizes: dict[str, int] = {}
    for tensor, named in zip(tensors, dims, strict=True):
        for dim, name in named.items():
            low, high = limits.get(name, (None, None))
            # 0 and 1 are special to torch.export, and a batch of 1 says nothing about mixing rows up
            have = tensor.shape[dim]
            other = have + step if step else 2 * have  # images go through strides and windows
            size = max(other + (have == 1), 2, low or 2)
            size = sizes.setdefault(name, size if high is None else min(size, high))
            if size == have:
                return None
    return tuple(_tile(tensor, named, sizes) for tensor, named in zip(tensors, dims, strict=True))


def _tile(tensor: Tensor, named: Dims, sizes: Mapping[str, int]) -> Tensor:
    for dim, name in named.items():
        have, want = tensor.shape[dim], sizes[name]
        index = torch.arange(want, device=tensor.device) % max(have, 1)
        tensor = tensor.index_select(dim, index) if have else tensor
    return tensor


def _collect(
    value: Any, spec: Any, path: str, dims: list[Dims], limits: dict[str, Any], tensors: Sequence[Tensor]
) -> None:
    """Walk an argument and its dynamic_shapes entry together."""
    if spec is None:
        return
    if isinstance(value, Slot):
        dims[value.index] = _read_dims(spec, path, limits, tensors[value.index].dim())
    elif isinstance(value, Instance | dict):
        fields = value.fields if isinstance(value, Instance) else value
        entries = spec.items() if isinstance(spec, Mapping) else zip(fields, spec, strict=False)
        for key, entry in entries:
            if key not in fields:
                raise ExportError(
                    f"dynamic_shapes: {path} has no {key!r}; expected one of {list(fields)}; correct the name"
                )
            _collect(fields[key], entry, f"{path}.{key}", dims, limits, tensors)
    elif isinstance(value, tuple | list):
        for i, (item, entry) in enumerate(zip(value, spec, strict=False)):
            _collect(item, entry, f"{path}[{i}]", dims, limits, tensors)


def _read_dims(spec: Any, path: str, limits: dict[str, Any], rank: int) -> Dims:
    pairs = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
    named: Dims = {}
    for dim, label in pairs:
        if label is None or "STATIC" in str(label):
            continue
        if not isinstance(dim, int) or not -rank <= dim < rank:
            raise ExportError(
                f"dynamic_shapes: {path}: found dimension {dim!r}; expected an int below its rank {rank}; correct it"
            )
        if isinstance(label, str):
            name = label
        elif isinstance(getattr(label, "min", None), int):  # a torch.export.Dim with a name
            name = label.__name__
            high = label.max if label.max < 2**31 else None  # torch's way to say "no maximum"
            limits[name] = (max(label.min, 0), high)
        else:  # Dim.AUTO, Dim.DYNAMIC
            name = f"{path}_{dim}".replace(".", "_").replace("[", "_").replace("]", "")
        named[dim % rank] = name
    return named


def _dim(name: str, limits: Mapping[str, int | None]) -> Any:
    bounds = {key: value for key, value in limits.items() if value}
    return torch.export.Dim(name, **bounds) if bounds else torch.export.Dim.DYNAMIC
