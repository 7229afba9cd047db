"""`save` and `load`: a prepared model as one safetensors file that carries its config.

Only tensors and the config's JSON are in the file, so that loading runs no code of it. A tensor that several
names share is stored once. The file of a sharded model (`fully_shard`, tensor parallel) is that of the whole one.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qgraph.config import QConfig
from qgraph.errors import CheckpointError, ConfigError
from qgraph.graph import config_of
from qgraph.ops.sharded import is_sharded, whole
from qgraph.prepare import prepare
from qgraph.version import __version__

__all__ = ["load", "save"]

CONFIG, ALIASES, MODEL, VERSION = "qgraph.config", "qgraph.aliases", "qgraph.model", "qgraph.version"
LISTED = 5  # names that a message lists before it says how many more there are


def save(prepared: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write parameters, buffers, quantizer state and the config of a prepared model.

    The file is written beside `path` and renamed, so that a file that was there survives a failure. Of a model whose
    parameters are DTensors every rank calls this, rank 0 writes, and the file is there when any of them returns.

    Parameters
    ----------
    prepared : nn.Module
        What `qgraph.prepare` returned.
    path : str or path

    Raises
    ------
    CheckpointError
        For a model that is not prepared, state that is no tensor, or a path that cannot be written.
    ConfigError
        For a config with a rule by predicate, which has no text form.
    """
    config = config_of(prepared) if isinstance(prepared, nn.Module) else None
    if config is None:
        raise CheckpointError(
            f"save: found a {type(prepared).__name__} that is not prepared, so there is no config to save; "
            "expected what qgraph.prepare returned."
        )
    tensors, aliases = _unshared(prepared.state_dict())
    kind = type(prepared)
    metadata = {
        CONFIG: config.to_json(),
        ALIASES: json.dumps(aliases),
        MODEL: f"{kind.__module__}:{kind.__qualname__}",
        VERSION: __version__,
    }
    if not _has_shards(prepared):
        _write(tensors, metadata, Path(path))
        return
    try:
        if dist.get_rank() == 0:
            _write(tensors, metadata, Path(path))
    finally:
        dist.barrier()


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Read a checkpoint into a model, which is prepared with the checkpoint's config where it is not yet.

    Parameters
    ----------
    path : str or path
        What `save` wrote.
    model : nn.Module
        A float model of the same architecture, which stays as it is; or a prepared one of the same config,
        which is filled.
    example_inputs, example_kwargs
        Passed to `qgraph.prepare` for a float model.

    Returns
    -------
    nn.Module
        The prepared model.

    Raises
    ------
    CheckpointError
        For a file that is damaged or no checkpoint, another config, or another architecture. A model that
        was given is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"load: found a {type(model).__name__}; expected the nn.Module to load into.")
    state, config = _read(Path(path))
    own = config_of(model)
    if own is None:
        model = prepare(model, config, example_inputs, example_kwargs=example_kwargs)
    elif own != config:
        raise CheckpointError(
            f"{path}: the checkpoint was made with config {config}, the model was prepared with {own}; "
            "pass the float model, or prepare it with the checkpoint's config."
        )
    _check_fits(path, state, model)
    model.load_state_dict(_sharded_alike(state, model))
    return model


def _has_shards(model: nn.Module) -> bool:
    return any(map(is_sharded, model.state_dict().values()))


def _sharded_alike(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors cut as the model's own are; every rank has read the file, so nothing has to be sent."""
    own = model.state_dict()
    return {name: _cut(value, own[name]) if is_sharded(own[name]) else value for name, value in state.items()}


def _cut(value: Tensor, own: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _unshared(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once under its first name, and the first name for every other one."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"save: {name} of the model's state is a {type(value).__name__}; "
                "expected tensors alone: return a tensor from get_extra_state, or None."
            )
        place = _place(value)
        if value.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        # Every rank takes part in making a sharded one whole. A clone has memory of its own: views of one storage would
        # otherwise be refused by the format.
        tensors[name] = whole(value).detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _place(value: Any) -> tuple[Any, ...]:
    """What two tensors have in common where they are the same one."""
    if not is_sharded(value):
        return value.device, value.dtype, value.data_ptr(), tuple(value.shape), value.stride()
    local = value.to_local()  # may be empty, and then has no address, but its storage tells
    storage = local.untyped_storage()._cdata
    return value.device, value.dtype, storage, local.storage_offset(), tuple(value.shape), tuple(value.placements)


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if path.is_dir():
        raise CheckpointError(f"{path}: this is a folder; expected the path of a file.")
    try:
        with _beside(path) as unfinished:
            save_file(tensors, unfinished, metadata)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(unfinished, 0o666 & ~umask)  # it was made private; a checkpoint is as public as any file
            os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}.") from error


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[str]:
    """A file name in the same folder, gone afterwards unless it was renamed."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _read(path: Path) -> tuple[dict[str, Tensor], QConfig]:
    """The state with every alias in place, and the config."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint ({error}); expected a whole file that qgraph.save wrote."
        ) from error
    if CONFIG not in metadata:
        raise CheckpointError(
            f"{path}: a safetensors file without a qgraph config; expected one that qgraph.save wrote. "
            "Load foreign weights into the float model, then prepare it."
        )
    try:
        config = QConfig.from_json(metadata[CONFIG])
        state |= {name: state[target] for name, target in json.loads(metadata.get(ALIASES, "{}")).items()}
    except (ConfigError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its config or its names cannot be read: {error}") from error
    return state, config


def _check_fits(path: str | os.PathLike[str], state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise before anything of the model is written."""
    own = model.state_dict()
    problems = []
    if missing := sorted(own.keys() - state.keys()):
        problems.append(f"the checkpoint lacks {_some(missing)}")
    if unexpected := sorted(state.keys() - own.keys()):
        problems.append(f"the model lacks {_some(unexpected)}")
        if any(".qgraph." in f".{name}" for name in unexpected):
            problems.append("quantizers that a capture makes: pass example_inputs")
    shapes = [
        f"{name} ({_shape(state[name])} in the checkpoint, {_shape(own[name])} in the model)"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    if shapes:
        problems.append(f"shapes differ: {_some(shapes)}")
    if problems:
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}: {'; '.join(problems)}.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _some(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
