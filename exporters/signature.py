"""Any model as a function of named tensors: what a file of plain tensor inputs and outputs needs.

Dicts, sequences, dataclasses and mappings (such as a `ModelOutput`) are taken apart into named tensors on
the way in and on the way out. What is no tensor stays a constant on the way in and is left out, and
reported, on the way out.
"""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qgraph.errors import ExportError
from qgraph.prepare import as_arguments


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """The place of tensor number `index` in a structure of arguments."""

    index: int


@dataclasses.dataclass(slots=True)
class FlatInputs:
    """Example arguments taken apart: tensors with names, and the structure that they came from."""

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    arguments: dict[str, Any]  # parameter name -> structure with Slots; *args and **kwargs included
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def flatten_inputs(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None) -> FlatInputs:
    """Take example arguments apart.

    Parameters
    ----------
    model : nn.Module
        Its forward's signature names the positional arguments.
    example_inputs : tuple, tensor or mapping
        Positional arguments; one tensor stands for itself, a mapping is taken as keyword arguments.
    example_kwargs : mapping, optional

    Raises
    ------
    ExportError
        When there is no tensor among them, or the signature does not take them.
    """
    args, kwargs = as_arguments(example_inputs, example_kwargs)
    names = _positional_names(model, args, kwargs)
    tensors: list[Tensor] = []
    labels: list[str] = []

    def take(value: Any, path: str) -> Any:
        return _rebuild(value, path, lambda tensor, at: _new_slot(tensor, at, tensors, labels))

    flat_args = tuple(take(value, name) for name, value in zip(names, args, strict=True))
    flat_kwargs = {name: take(value, name) for name, value in kwargs.items()}
    if not tensors:
        raise ExportError(
            f"export of {type(model).__name__}: the example inputs hold no tensor; expected the arguments of "
            f"{type(model).__name__}.forward; pass example_inputs=(x, ...) as you call the model"
        )
    arguments = dict(zip(names, flat_args, strict=True)) | flat_kwargs
    return FlatInputs(tuple(tensors), _identifiers(labels), arguments, flat_args, flat_kwargs)


class FlatModel(nn.Module):
    """A model called with tensors alone, in order, that returns a tuple of tensors.

    `output_names` and `dropped` describe the last call.
    """

    def __init__(self, model: nn.Module, inputs: FlatInputs) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.output_names: tuple[str, ...] = ()
        self.dropped: tuple[str, ...] = ()

    def call(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the model on tensors put at their places."""
        args = tuple(_fill(value, tensors) for value in self.inputs.args)
        kwargs = {name: _fill(value, tensors) for name, value in self.inputs.kwargs.items()}
        output = self.model(*args, **kwargs)
        outputs, self.output_names, self.dropped = flatten_outputs(output, set(self.inputs.names))
        return outputs


def flat_model(model: nn.Module, inputs: FlatInputs) -> FlatModel:
    """`FlatModel` whose forward has one named parameter per tensor (torch.export reads the names)."""
    parameters = ", ".join(inputs.names)
    source = f"def forward(self, {parameters}):\n    return self.call(({parameters},))\n"
    scope: dict[str, Any] = {}
    exec(source, scope)
    return type("FlatModel", (FlatModel,), {"forward": scope["forward"]})(model, inputs)


def flatten_outputs(output: Any, taken: set[str]) -> tuple[tuple[Tensor, ...], tuple[str, ...], tuple[str, ...]]:
    """Take an output apart into (tensors, names, what was left out)."""
    tensors: list[Tensor] = []
    labels: list[str] = []
    dropped: list[str] = []

    def keep(tensor: Tensor, path: str) -> Tensor:
        tensors.append(tensor)
        labels.append(path)
        return tensor

    def drop(value: Any, path: str) -> None:
        dropped.append(f"{path} ({type(value).__name__})")

    _rebuild(output, "output", keep, drop)
    names = [label.removeprefix("output_") or "output" for label in labels]
    names = [f"output_{name}" if name.isdigit() or name in taken else name for name in names]
    return tuple(tensors), _identifiers(names), tuple(dropped)


def _rebuild(
    value: Any,
    path: str,
    on_tensor: Callable[[Tensor, str], Any],
    on_other: Callable[[Any, str], None] | None = None,
) -> Any:
    """Copy a structure with each tensor replaced by `on_tensor(tensor, path)`."""

    def go(item: Any, key: Any) -> Any:
        return _rebuild(item, f"{path}_{key}", on_tensor, on_other)

    if isinstance(value, Tensor):
        return on_tensor(value, path)
    if isinstance(value, Mapping):
        items = {key: go(item, key) for key, item in value.items()}
        return items if type(value) is dict else _like_mapping(value, items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(go(item, key) for key, item in zip(value._fields, value, strict=True)))
    if isinstance(value, tuple | list):
        return type(value)([go(item, i) for i, item in enumerate(value)])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: go(getattr(value, f.name), f.name) for f in dataclasses.fields(value)}
        return Instance(type(value), fields)
    if on_other is not None:
        on_other(value, path)
    return value


@dataclasses.dataclass(slots=True)
class Instance:
    """A dataclass or mapping taken apart: its class and its fields."""

    cls: type
    fields: dict[str, Any]
    mapping: bool = False


def _like_mapping(value: Mapping[str, Any], items: dict[str, Any]) -> Instance:
    return Instance(type(value), items, mapping=True)


def _fill(value: Any, tensors: Sequence[Tensor]) -> Any:
    """A structure with its slots filled: the inverse of `_rebuild` on inputs."""
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, Instance):
        fields = {key: _fill(item, tensors) for key, item in value.fields.items()}
        if value.mapping:
            try:
                return value.cls(**fields)  # ModelOutput, UserDict, OrderedDict
            except TypeError:
                return value.cls(fields)
        return _instance(value.cls, fields)
    if isinstance(value, dict):
        return {key: _fill(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_fill(item, tensors) for item in value))
    if isinstance(value, tuple | list):
        return type(value)([_fill(item, tensors) for item in value])
    return value


def _instance(cls: type, fields: dict[str, Any]) -> Any:
    made: Any = object.__new__(cls)  # fields with init=False and __post_init__ need no second run
    for key, item in fields.items():
        object.__setattr__(made, key, item)
    return made


def _new_slot(tensor: Tensor, path: str, tensors: list[Tensor], labels: list[str]) -> Slot:
    tensors.append(tensor.detach() if tensor.requires_grad else tensor)
    labels.append(path)
    return Slot(len(tensors) - 1)


def _positional_names(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Names of positional arguments, from forward's signature."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ExportError(
            f"export of {type(model).__name__}: the example inputs do not fit forward{signature}: {error}; "
            "pass "
            f"example_inputs and example_kwargs as you call the model"
        ) from error
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(len(args) - len(names))]
    return names[: len(args)]


def _identifiers(labels: Sequence[str]) -> tuple[str, ...]:
    """Readable, distinct Python identifiers."""
    names: list[str] = []
    for label in labels:
        name = re.sub(r"\W+", "_", label).strip("_") or "value"
        if name[0].isdigit() or keyword.iskeyword(name) or name == "self":
            name = f"input_{name}"
        unique, count = name, 0
        while unique in names:
            count += 1
            unique = f"{name}_{count}"
        names.append(unique)
    return tuple(names)


def run_eagerly(flat: FlatModel, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run without gradients, in eval mode, with torch's random state put back."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return flat.call([tensor.clone() for tensor in tensors])
