"""Rows of an .onnx file: what `qgraph.export` wrote about it, or for any other file its own weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraph.config import SparsitySpec
from qgraph.errors import InspectError
from qgraph.graph import Coverage
from qgraph.inspection.layers import FloatTensor, Layer, notation

if TYPE_CHECKING:
    import onnx

_MARK = "qgraph.layers"  # a metadata key that every file of ours has
_FLOATS = ("float16", "float32", "float64", "bfloat16")


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """What is read of a file: its title, rows, float tensors and coverage."""

    title: str
    layers: list[Layer]
    floats: list[FloatTensor]
    coverage: Coverage
    file_bytes: int
    notes: list[str]


def read_onnx(path: Path) -> OnnxFile:
    """Read an .onnx file; its external data is not loaded.

    Raises
    ------
    InspectError
        When there is no such file, or it is not an ONNX model.
    """
    model = load(path)
    if any(item.key == _MARK for item in model.metadata_props):
        return _ours(path, model)
    return _foreign(path, model)


def load(path: Path) -> onnx.ModelProto:
    """The model in a file, without external data."""
    import onnx

    if not path.exists():
        raise InspectError(f"{path}: no such file. Expected the path of an .onnx file; check the spelling.")
    if path.is_dir():
        raise InspectError(f"{path}: found a folder. Expected the path of an .onnx file; name the file in it.")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise InspectError(
            f"{path}: found no ONNX model ({type(error).__name__}: {error}). Expected a file that an "
            f"exporter wrote; export it again."
        ) from error
    if not model.ir_version or not model.HasField("graph"):
        raise InspectError(
            f"{path}: found no ONNX model ({path.stat().st_size} bytes without a graph). Expected a file "
            f"that an exporter wrote; export it again."
        )
    return model


def _ours(path: Path, model: onnx.ModelProto) -> OnnxFile:
    from qgraph.exporters.merge import separate
    from qgraph.exporters.report import read_report

    report = read_report(path)
    separate(model)
    layers = [_row(layer) for layer in report.layers if layer.shape]
    sizes = {item.name: item for item in model.graph.initializer}
    floats = []
    for item in report.leftovers:
        tensor = sizes.get(item.name)
        shape, dtype = ((), "float32") if tensor is None else (tuple(tensor.dims), _dtype(tensor.data_type)[0])
        floats.append(FloatTensor(item.name, shape, dtype, item.bytes, item.reason))
    title = f"{path.name}: exported by qgraph with {report.config}, target {report.target}"
    notes = ["dynamic sizes: " + ("; ".join(report.dynamic) or "none")]
    return OnnxFile(title, layers, floats, _coverage(layers), report.file_bytes, notes)


def _row(layer: Any) -> Layer:
    sparsity = SparsitySpec.parse(layer.sparsity) if layer.sparsity else None
    numel = math.prod(layer.shape)
    own = layer.shared_with is None
    reason = None if layer.spec is not None or sparsity is not None else "left float"
    return Layer(
        path=layer.path,
        name=f"{layer.path}.{layer.operand}".strip("."),
        op=layer.op,
        shape=tuple(layer.shape),
        dtype="float32",
        spec=notation(layer.spec, layer.activation, sparsity),
        weight=layer.spec,
        activation=layer.activation,
        sparsity=sparsity,
        groups=layer.groups,
        bits_per_weight=8 * layer.bytes / max(1, numel) if own else 0.0,
        bytes_before=4 * numel if own else 0,
        bytes_after=layer.bytes if own else 0,
        reason=reason,
        tied_to=layer.shared_with,
        form=layer.form or layer.format,
    )


def _foreign(path: Path, model: onnx.ModelProto) -> OnnxFile:
    users: dict[str, Any] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, node)
    layers, floats = [], []
    for tensor in model.graph.initializer:
        dtype, bits = _dtype(tensor.data_type)
        shape = tuple(tensor.dims)
        size = math.ceil(math.prod(shape) * bits / 8)
        if len(shape) < 2:
            reason = "1-D" if shape else "a scalar"
            floats.append(FloatTensor(tensor.name, shape, dtype, size, reason))
            continue
        node = users.get(tensor.name)
        real = dtype in _FLOATS
        layers.append(
            Layer(
                path=node.name if node is not None else "",
                name=tensor.name,
                op=node.op_type if node is not None else "unused",
                shape=shape,
                dtype=dtype,
                spec=dtype if not real else "float",
                weight=None,
                activation=None,
                sparsity=None,
                groups="",
                bits_per_weight=float(bits),
                bytes_before=size,
                bytes_after=size,
                reason="float in the file" if real else "integers in the file, not written by qgraph",
            )
        )
    producer = " ".join(filter(None, (model.producer_name, model.producer_version))) or "an unknown producer"
    data = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    beside = [path.parent / name for name in sorted(data)]
    size = path.stat().st_size + sum(file.stat().st_size for file in beside if file.exists())
    title = f"{path.name}: written by {producer}"
    return OnnxFile(title, layers, floats, _coverage(layers), size, [])


def _coverage(layers: list[Layer]) -> Coverage:
    return Coverage(0, 0, 1, (), len(layers), sum(layer.quantized for layer in layers), 0)


def _dtype(data_type: int) -> tuple[str, int]:
    """The name of an ONNX data type, and the bits of one value."""
    import onnx

    name = onnx.TensorProto.DataType.Name(data_type).lower()
    packed = {"int4": 4, "uint4": 4, "float4e2m1": 4, "int2": 2, "uint2": 2}
    bits = packed.get(name) or (8 * onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize if name != "string" else 0)
    return {"float": "float32", "double": "float64"}.get(name, name), bits
