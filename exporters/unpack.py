"""Take a file apart: the codes, scales, zero points, masks and float weights of every layer, without a runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import numpy as np
import onnx

from qgraph.config import QuantSpec
from qgraph.errors import InspectError
from qgraph.exporters.lowering import qdq
from qgraph.exporters.packing import PackedWeight, pack, restore, unstack
from qgraph.exporters.packing import unpack as unpack_weight
from qgraph.exporters.report import PARTS, LayerReport, read_report, site_of, stacks
from qgraph.ops import Quantized
from qgraph.ops.groups import GroupKind, Groups


@dataclass(frozen=True, slots=True, eq=False)
class Unpacked:
    """One weight of a file.

    Parameters
    ----------
    weight : ndarray, float32
        What the file computes with, in the shape of the model's own weight: `scale * (codes - zero_point)`.
    codes : ndarray, int16, or None
        Level integers in the same shape; None for a weight that is pruned only.
    scale, zero_point : ndarray, float32, (rows, groups), or None
        `zero_point` is in units of the codes, None for linear schemes.
    mask : ndarray, bool, or None
        Where a pruned weight is not zero.
    spec, groups, format
        As in `LayerReport`.
    shared_with : str or None
        The weight under whose name the codes are stored, where two share them.
    """

    weight: np.ndarray
    codes: np.ndarray | None
    scale: np.ndarray | None
    zero_point: np.ndarray | None
    mask: np.ndarray | None
    spec: QuantSpec | None
    groups: Groups
    format: str
    shared_with: str | None


def unpack(path: str | Path) -> dict[str, Unpacked]:
    """Every quantized or pruned weight of a file that `qgraph.export` wrote, by the name of its parameter.

    Raises
    ------
    InspectError
        When the file is not one of ours, or what it holds does not go together. Nothing is allocated that its bytes do
        not account for.

    Example
    -------
    >>> qgraph.unpack("model.onnx")["fc.weight"].weight.shape  # doctest: +SKIP
    (128, 64)
    """
    path = Path(path)
    report = read_report(path)
    if report.packed_bytes is not None:
        raise InspectError(
            f"{path}: its weights are stored unpacked (preunpacked=True), without codes; expected a packed file; "
            "export it without that option"
        )
    arrays = _initializers(path)
    stacked = stacks(report.layers)
    whole: dict[str, _Whole] = {}
    found: dict[str, Unpacked] = {}
    for layer in report.layers:
        if not layer.shape:
            continue
        site = site_of(layer)
        stored = layer.shared_with or site
        try:
            if stored not in whole:
                whole |= _read(stacked.get(layer.stack or "", [layer]), layer.stack or stored, arrays)
            found[site] = _unpacked(*whole[stored], layer)
        except (ValueError, IndexError, KeyError, OverflowError, RuntimeError) as error:
            raise InspectError(
                f"{path}: the weight {site} cannot be unpacked: {error}; expected a file as qgraph.export wrote it; "
                "it is damaged: export it again"
            ) from error
    return found


def _initializers(path: Path) -> dict[str, np.ndarray]:
    try:
        model = onnx.load(str(path))
        return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    except Exception as error:
        raise InspectError(
            f"{path}: its tensors cannot be read ({error}); expected a file as qgraph.export wrote it, its data file "
            "beside it; export it again"
        ) from error


_Whole = tuple[Quantized, str]  # and its format


def _read(layers: Sequence[LayerReport], name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, _Whole]:
    """A weight, or all of a stack, by their names."""
    first, rows = layers[0], [layer.shape[0] for layer in layers]
    if any(layer.shape[1:] != first.shape[1:] for layer in layers):
        raise ValueError(f"found shapes {sorted({layer.shape for layer in layers})} in one stack")
    packed = _packed(name, replace(first, shape=(sum(rows), *first.shape[1:])), arrays)
    parts = unstack(unpack_weight(packed), rows) if len(layers) > 1 else [unpack_weight(packed)]
    names = map(site_of, layers) if len(layers) > 1 else [name]
    return {site: (part, packed.format) for site, part in zip(names, parts, strict=True)}


def _packed(site: str, layer: LayerReport, arrays: Mapping[str, np.ndarray]) -> PackedWeight:
    own = {part: arrays[f"{site}.{part}"] for part in PARTS if f"{site}.{part}" in arrays}
    if math.prod(layer.shape) > 64 * sum(array.nbytes for array in own.values()):
        raise ValueError(f"found {sum(array.nbytes for array in own.values())} bytes for shape {layer.shape}")
    sparse = layer.sparsity is not None
    if layer.format == qdq.FORMAT:
        return pack(qdq.read(layer.shape, _groups(layer), layer.spec, sparse, own))
    return restore(layer.shape, _groups(layer), layer.spec, sparse, layer.format, own)


def _groups(layer: LayerReport) -> Groups:
    kind, _, block = layer.groups.partition(" ")
    if kind == "block":
        return Groups("channel", layer.axis, int(block))
    if kind not in get_args(GroupKind):
        raise ValueError(f"found groups {layer.groups!r}")
    return Groups(cast(GroupKind, kind), layer.axis)


def _unpacked(quantized: Quantized, format: str, layer: LayerReport) -> Unpacked:
    codes = None if quantized.codes is None else quantized.codes.numpy()
    weight = quantized.dequantize().numpy()
    return Unpacked(
        weight=weight,
        codes=codes,
        scale=None if quantized.scale is None else quantized.scale.numpy(),
        zero_point=None if quantized.zero_point is None else quantized.zero_point.numpy(),
        mask=((weight if codes is None else codes) != 0) if quantized.sparse else None,
        spec=quantized.spec,
        groups=quantized.groups,
        format=format,
        shared_with=layer.shared_with,
    )
