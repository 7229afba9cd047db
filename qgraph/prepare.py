"""`prepare`: capture a model, run the passes over its graphs, and give it back as the same kind of model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qgraph.capture.driver import capture, install_all
from qgraph.config import QConfig
from qgraph.copying import copied
from qgraph.dump import Dump
from qgraph.errors import CaptureError, ConfigError, QGraphError
from qgraph.graph import Shared, coverage, is_prepared, matches_site, quantizer_modules, shared_below, sites
from qgraph.ops.memory import give_back
from qgraph.passes import default_pipeline
from qgraph.passes.quantize_standard_layers import place_in_standard_layers


def prepare(
    model: nn.Module,
    config: QConfig | str = "A8W4@128",
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    inplace: bool = False,
    strict: bool = False,
    dump_dir: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Rewrite a model so that it trains, and runs, with quantized and sparse weights and activations.

    The result is the model: the same class by isinstance, the same forward signature, the same parameter names and
    state_dict keys (plus the quantizers' own state, where they have any). Works on any module that runs in eager mode:
    what cannot be captured as a graph runs as Python under the same quantizers, and is reported by `qgraph.inspect`.

    Parameters
    ----------
    model : nn.Module
    config : QConfig or str
        What to quantize and how, such as ``"A4W1-2:4@128"``; see `QConfig.parse`.
    example_inputs : tuple, Tensor or mapping, optional
        Positional arguments of the forward, or a mapping of keyword ones. With them, the graphs are captured now, in
        eval and in train mode; without, at the first calls.
    example_kwargs : mapping, optional
        Keyword arguments of the forward.
    inplace : bool
        Rewrite the model itself instead of a deep copy: for an optimizer made before.
    strict : bool
        Raise CaptureError for a site that stays float or a module that stays Python with sites in it.
    dump_dir : path, optional
        A folder to write each graph to, as text and JSON, as captured and after each pass, numbered; graphs captured
        later too.

    Raises
    ------
    ConfigError
        For a config that does not parse, or a rule that matches nothing.
    CaptureError
        For something that is not an unprepared nn.Module, for examples that the model rejects, and under `strict`.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"prepare: expected a torch.nn.Module, found {type(model).__name__}. Pass the model object itself."
        )
    if is_prepared(model):
        raise CaptureError(
            f"prepare: {type(model).__name__} is prepared already. Prepare the original model, or a new one with its "
            f"state_dict."
        )
    config = QConfig.parse(config)
    config.check_rules(model.named_modules())
    prepared = model if inplace else _copy_of(model)
    shared = Shared(config, default_pipeline(), strict=strict, model_name=type(model).__name__)
    shared.dump = None if dump_dir is None else Dump(dump_dir)
    shared.configs = config.resolve_all(prepared)
    install_all(prepared, shared)
    place_in_standard_layers(prepared)
    if example_inputs is not None or example_kwargs:
        _capture(prepared, *as_arguments(example_inputs, example_kwargs))
        give_back()  # of a forward as large as a step's, when gradients and the optimizer's state are still to come
        _put_back_parameters(prepared, model)
        if strict:
            _demand_full_coverage(prepared)
    return prepared


def _copy_of(model: nn.Module) -> nn.Module:
    try:
        return copied(model)
    except Exception as error:
        raise CaptureError(
            f"prepare: {type(model).__name__} cannot be copied, copy.deepcopy raises {type(error).__name__}: {error}. "
            f"Pass inplace=True to rewrite the model itself."
        ) from error


def _capture(prepared: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        capture(prepared, args, kwargs, lambda mode: None)
    except QGraphError:
        raise
    except Exception as error:
        raise CaptureError(
            f"prepare: {type(prepared).__name__} does not run on the example inputs "
            f"({_describe(args, kwargs)}): {type(error).__name__}: {error}. Pass inputs that the model accepts."
        ) from error


def _put_back_parameters(prepared: nn.Module, model: nn.Module) -> None:
    """What the example runs have written into parameters is taken back, as all else that they change is."""
    originals = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in prepared.named_parameters():
            original = originals.get(name, parameter)
            plain = type(parameter) is type(original) is nn.Parameter and not parameter.is_meta
            if plain and parameter.shape == original.shape and not torch.equal(parameter, original):
                parameter.copy_(original)


def as_arguments(
    example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call from what a user passes as examples: a tuple or list of positional ones, one value alone,
    or a mapping of keyword ones (a dictionary as the one argument is a tuple of it).
    """
    kwargs = dict(example_kwargs or {})
    if example_inputs is None:
        return (), kwargs
    if isinstance(example_inputs, Mapping):
        return (), {**example_inputs, **kwargs}
    plain = type(example_inputs) in (tuple, list)
    return tuple(example_inputs) if plain else (example_inputs,), kwargs


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def one(value: Any) -> str:
        return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    return ", ".join([*map(one, args), *(f"{name}={one(value)}" for name, value in kwargs.items())])


def _demand_full_coverage(prepared: nn.Module) -> None:
    for record in sites(prepared):
        if record.reason is not None and record.reason != "a rule leaves it float":
            raise CaptureError(
                f"prepare(strict=True): site '{record.name}' ({record.op} at {record.where}) is not quantized: "
                f"{record.reason}. Give it a rule, or prepare without strict."
            )
        if not record.captured:
            opaque = [o for o in coverage(prepared).opaque if o.path == record.path]
            why = f"{opaque[0].reason}, at {opaque[0].where}" if opaque else "its module stays Python"
            raise CaptureError(
                f"prepare(strict=True): site '{record.name}' ({record.op} at {record.where}) is in no graph: {why}. "
                f"Change that line, or prepare without strict: it is then quantized while Python runs."
            )


@contextlib.contextmanager
def disabled(prepared: nn.Module, match: str | None = None) -> Iterator[nn.Module]:
    """Let the quantizers and sparsifiers pass values through untouched: all, or those whose site matches the glob.

    `prepared` may be a module that holds a prepared model: DistributedDataParallel, a compiled one, a task around it.

    Examples
    --------
    >>> with qgraph.disabled(prepared):
    ...     float_output = prepared(x)
    """
    before = {id(module): module.enabled for module in _matching(prepared, match)}
    held_off = [shared.off for shared in shared_below(prepared)]
    for off in held_off:
        off.append(match)
    try:
        _switch(prepared, match, lambda module: False)
        yield prepared
    finally:
        for off in held_off:
            off.remove(match)
        _switch(prepared, match, lambda module: before.get(id(module), True))


def set_enabled(prepared: nn.Module, flag: bool, match: str | None = None) -> None:
    """Switch quantizers and sparsifiers on or off for good: all, or those whose site matches the glob."""
    _switch(prepared, match, lambda module: flag)


def _switch(prepared: nn.Module, match: str | None, value: Callable[[Any], bool]) -> None:
    for module in _matching(prepared, match):
        module.enabled = value(module)


def _matching(prepared: nn.Module, match: str | None) -> list[Any]:
    shared_below(prepared)  # raises where nothing is prepared
    found = [m for m in quantizer_modules(prepared) if match is None or matches_site(m.site, match)]
    if match is not None and not found:
        raise ConfigError(f"no quantizer's site matches {match!r}; qgraph.inspect(model).layers lists them.")
    return found


__all__ = ["as_arguments", "disabled", "prepare", "set_enabled"]
