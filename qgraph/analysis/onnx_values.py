"""What every module computes in an .onnx file of ours: its intermediate values made outputs of a copy in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from qgraph.analysis.recorded import Recorded
from qgraph.errors import InspectError
from qgraph.exporters.merge import separate
from qgraph.exporters.outline import inlined
from qgraph.exporters.probe import session_of
from qgraph.exporters.report import ExportReport, read_report

CANDIDATES = 8  # the last values of a module: an LSTM has its states after its output
LARGEST = 2**31  # bytes of a model that protobuf holds in memory
SIZES = ("Shape", "Size")
OPERANDS = ("input", "other")  # what steps that quantize activations are called, behind the path of the module


def record_file(name: str, path: Path, tensors: Mapping[str, Tensor]) -> Recorded:
    """Run a file and keep what its modules compute.

    Raises
    ------
    InspectError
        For a file that is not there or not ours, and when it does not run on the tensors.
    """
    if not path.is_file():
        raise InspectError(f"compare: {name}: {path}: no such file; expected an .onnx file.")
    report = read_report(path)
    try:
        model = onnx.load(str(path))
    except Exception as error:
        raise InspectError(f"compare: {name}: {path}: cannot be read: {error}. Export it again.") from error
    if model.ByteSize() > LARGEST:
        raise InspectError(f"compare: {name}: {path}: above 2 GB; expected a file that fits one protobuf.")
    separate(model)
    plain = inlined(model)
    values = layer_values(plain.graph, report)
    _show(plain.graph, values)
    outputs = _run(name, path, plain, tensors)
    found = Recorded(f"{path.name} ({report.target}, {report.config})", is_file=True)
    for module, candidates in values.items():
        floats = [torch.from_numpy(outputs[v]) for v in candidates if np.issubdtype(outputs[v].dtype, np.floating)]
        if floats:
            found.add(module, floats)
    return found


def layer_values(graph: onnx.GraphProto, report: ExportReport) -> dict[str, list[str]]:
    """Module path -> names of the values that may be its output, the likeliest first, in the order of the file.

    A module's output is what its last node computes from data (a constant where none does, as positions that are looked
    up), nodes being named after their modules. `graph` has no functions.
    """
    sites = {f"{layer.path}.{layer.operand}".strip("."): layer.path for layer in report.layers}
    data = set(_computed_from_data(graph))
    order = {value: i for i, value in enumerate(value for node in graph.node for value in node.output if value)}
    values = _last_of_modules(graph, sites, order.keys() - data) | _last_of_modules(graph, sites, data)
    values[""] = [graph.output[0].name]
    return dict(sorted(values.items(), key=lambda item: (order.get(item[1][0], len(order)), -len(item[0]))))


def _last_of_modules(graph: onnx.GraphProto, sites: Mapping[str, str], among: Set[str]) -> dict[str, list[str]]:
    """Module path -> those of some values that it computes last, the last first."""
    last_alone = not any("/" in node.name for node in graph.node)  # of a module's nodes the last one has a name
    values: dict[str, list[str]] = {}
    unnamed: list[str] = []
    for node in graph.node:
        outputs = [value for value in node.output if value in among]
        module = _module_of(node, sites)
        if last_alone and not node.name:
            unnamed = [*outputs, *unnamed]
        if module is None or not outputs:
            continue
        values[module] = [*outputs, *unnamed, *values.get(module, [])][:CANDIDATES]
        unnamed = []
        for around in _parents(module):
            values[around] = outputs
    return values


def _module_of(node: onnx.NodeProto, sites: Mapping[str, str]) -> str | None:
    """The path of the module that a node is named after; None for the model's own nodes and for quantizers."""
    stem, slash, _ = node.name.partition("/")
    if not slash and (not stem or re.sub(r"_\d+$", "", stem) == node.op_type):
        return None
    holder, _, last = stem.rpartition(".")
    if stem in sites.values():
        return stem
    if holder in sites and not slash:  # fc.weight.gather: the rows of an embedding
        return sites[holder]
    quantizes = last in OPERANDS and holder in sites.values()
    return None if quantizes or f"{stem}.".startswith(("qgraph.", *(f"{site}." for site in sites))) else stem


def _parents(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _computed_from_data(graph: onnx.GraphProto) -> Iterator[str]:
    """The values that depend on the content of the inputs, not on their sizes alone."""
    known = {item.name for item in graph.input} - {item.name for item in graph.initializer}
    for node in graph.node:
        if node.op_type not in SIZES and (known.intersection(node.input) or _reads_inside(node, known)):
            known.update(node.output)
            yield from node.output


def _reads_inside(node: onnx.NodeProto, known: set[str]) -> bool:
    bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return any(known.intersection(inner.input) or _reads_inside(inner, known) for g in bodies for inner in g.node)


def _show(graph: onnx.GraphProto, values: Mapping[str, list[str]]) -> None:
    present = {value.name for value in graph.output}
    for name in dict.fromkeys(name for names in values.values() for name in names):
        if name not in present:
            graph.output.append(onnx.ValueInfoProto(name=name))  # onnxruntime infers the type


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # files compute in float32


def _run(name: str, path: Path, model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    wanted = [item.name for item in model.graph.input]
    found = dict(tensors)
    if all(key.isdigit() for key in found):  # no model told the names
        found = dict(zip(wanted, found.values(), strict=False))
    if missing := [item for item in wanted if item not in found]:
        raise InspectError(
            f"compare: {name}: {path} takes {', '.join(wanted)}, and the inputs hold {', '.join(tensors)}; "
            f"no {', '.join(missing)} among them."
        )
    try:
        feeds = {item: _array(found[item]) for item in wanted}
        session = session_of(model.SerializeToString())
        names = [item.name for item in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))
    except Exception as error:
        raise InspectError(
            f"compare: {name} ({path}) does not run on the inputs: {error}. Pass inputs that both accept."
        ) from error
