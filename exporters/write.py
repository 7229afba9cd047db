"""Write a model whole or not at all: into a folder beside the target, then renamed into place.

Above 2 GB, which is the limit of a protobuf file, weights go to ``<path>.data``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from qgraph.errors import ExportError

EXTERNAL_ABOVE = 2**31 - 2**24  # protobuf's limit, less room for the nodes
STREAMED_ABOVE = 2**20  # bytes of a weight that is written by itself


@contextlib.contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, so that a rename out of it stays on one file system; removed at the
    end.

    Raises
    ------
    ExportError
        When the folder of `path` does not exist or cannot be written to.
    """
    parent = path.parent
    if not parent.is_dir():
        raise ExportError(
            f"export to {path}: the folder {parent} does not exist; expected one that does; create it or "
            "correct the path"
        )
    if path.is_dir():
        raise ExportError(
            f"export to {path}: that is a folder; expected the path of a file; add a file name such as model.onnx"
        )
    try:
        folder = Path(tempfile.mkdtemp(prefix=".qgraph-", dir=parent))
    except OSError as error:
        raise ExportError(
            f"export to {path}: the folder {parent} cannot be written to ({error.strerror}); expected a "
            "writable folder; "
            "choose another one or change its permissions"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(model: ir.Model, path: Path) -> None:
    """Write `model` to `path`, with its weights in ``<path>.data`` when they are too many for one file.

    Raises
    ------
    ExportError
        When the disk is full or the write fails.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    try:
        if size > EXTERNAL_ABOVE:
            ir.save(model, path, external_data=f"{path.name}.data")
        else:
            _write(model, path)
        for part in _parts(path):
            _sync(part)
    except OSError as error:
        raise _failed(path.name, error) from error


def _write(model: ir.Model, path: Path) -> None:
    """The model as one protobuf, its large weights written one by one: whole it would be in memory thrice."""
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    large = {name: tensor for name, tensor in held.items() if tensor is not None and tensor.nbytes >= STREAMED_ABOVE}
    try:
        for name in large:
            model.graph.initializers[name].const_value = ir.tensor(np.empty(0, np.uint8), name=name)
        proto = ir.to_proto(model)
    finally:
        for name, tensor in large.items():
            model.graph.initializers[name].const_value = tensor
    for place in reversed([i for i, tensor in enumerate(proto.graph.initializer) if tensor.name in large]):
        del proto.graph.initializer[place]
    _shorten_numbers(proto.graph)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    heads = {name: _before_content(tensor, name) for name, tensor in large.items()}
    size = len(graph) + sum(
        len(head) + tensor.nbytes for head, tensor in zip(heads.values(), large.values(), strict=True)
    )
    with path.open("wb") as file:
        file.write(proto.SerializeToString() + _field(onnx.ModelProto.GRAPH_FIELD_NUMBER, size) + graph)
        for name, tensor in large.items():
            file.write(heads[name])
            tensor.tofile(file)


def _before_content(tensor: ir.TensorProtocol, name: str) -> bytes:
    """What stands in a graph before the bytes of one of its initializers."""
    described = onnx.TensorProto(name=name, dims=tensor.shape.numpy(), data_type=tensor.dtype.value).SerializeToString()
    inside = described + _field(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, tensor.nbytes)
    return _field(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(inside) + tensor.nbytes) + inside


def _field(number: int, size: int) -> bytes:
    """What protobuf writes before so many bytes of a field."""
    return b"".join(_varint(value) for value in (number << 3 | 2, size))


def _varint(value: int) -> bytes:
    """A whole number, seven bits a byte, the lowest first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _shorten_numbers(graph: onnx.GraphProto) -> None:
    """Whole numbers, of shapes and of sizes, in as many bytes as they need where that is fewer than eight each."""
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64 and tensor.raw_data:
            short = onnx.TensorProto(int64_data=np.frombuffer(tensor.raw_data, np.int64))
            if short.ByteSize() < len(tensor.raw_data):
                tensor.ClearField("raw_data")
                tensor.MergeFrom(short)


def move_into_place(source: Path, target: Path) -> int:
    """Rename a saved model, and its data file, over `target`; return their size in bytes.

    The data file is renamed first and put back should the second rename fail.
    """
    data, target_data = _data(source), _data(target)
    kept = source.with_name("previous.data")
    moved = False
    size = sum(part.stat().st_size for part in _parts(source))
    try:
        if data.exists():
            if target_data.exists():
                os.replace(target_data, kept)
            os.replace(data, target_data)
            moved = True
        os.replace(source, target)
    except BaseException as error:
        if moved:
            target_data.unlink(missing_ok=True)
        if kept.exists():
            os.replace(kept, target_data)
        if isinstance(error, OSError):
            raise _failed(str(target), error) from error
        raise
    return size


def _parts(path: Path) -> list[Path]:
    return [part for part in (path, _data(path)) if part.exists()]


def _data(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _failed(name: str, error: OSError) -> ExportError:
    what = (
        "no space is left on the disk"
        if error.errno == errno.ENOSPC
        else f"the write failed ({error.strerror or error})"
    )
    return ExportError(
        f"export to {name}: {what}; nothing was changed, a file of that name is as it was; free space and export again"
    )
