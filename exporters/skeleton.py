"""The structure of a file: all of it but the content of its large weights, which is passed over."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx

from qgraph.exporters.write import STREAMED_ABOVE

_GRAPH, _INITIALIZER = onnx.ModelProto.GRAPH_FIELD_NUMBER, onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_CONTENT = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
_VARINT, _DOUBLE, _SIZED = 0, 1, 2  # how protobuf writes a value; else four bytes


def skeleton(path: Path) -> onnx.ModelProto:
    """A file with an input in the place of each large initializer: what there is to check, in little memory.

    Raises
    ------
    google.protobuf.message.DecodeError, IndexError
        When the file is no model, or ends too early.
    """
    model, graph = onnx.ModelProto(), onnx.GraphProto()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, whole, inside in _fields(data, range(len(data))):
            if number != _GRAPH:
                model.MergeFromString(data[whole.start : whole.stop])
                continue
            for part, field, content in _fields(data, inside):
                if part == _INITIALIZER and len(content) >= STREAMED_ABOVE:
                    graph.input.append(_described(data, content))
                else:
                    graph.MergeFromString(data[field.start : field.stop])
    model.graph.CopyFrom(graph)
    return model


def _described(data: mmap.mmap, tensor: range) -> onnx.ValueInfoProto:
    header = onnx.TensorProto()
    for number, whole, _ in _fields(data, tensor):
        if number != _CONTENT:
            header.MergeFromString(data[whole.start : whole.stop])
    return onnx.helper.make_tensor_value_info(header.name, header.data_type, list(header.dims))


def _fields(data: mmap.mmap, within: range) -> Iterator[tuple[int, range, range]]:
    """Number, whole place and place of the content of each field of a message."""
    at = within.start
    while at < within.stop:
        start = at
        key, at = _varint(data, at)
        kind, size = key & 7, 0
        if kind == _VARINT:
            _, end = _varint(data, at)
        elif kind == _SIZED:
            size, at = _varint(data, at)
            end = at + size
        else:
            end = at + (8 if kind == _DOUBLE else 4)
        if end > within.stop:
            raise IndexError(f"a field of {end - start} bytes in the last {within.stop - start}")
        yield key >> 3, range(start, end), range(at, end)
        at = end


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A whole number, seven bits a byte, the lowest first; and where the next one begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
