"""Put an `ExportReport` together from what the lowering did, what the graph holds, and what the config
said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir
from torch import nn

from qgraph.exporters.lowering.graph import Lowered
from qgraph.exporters.lowering.records import WeightRecord
from qgraph.exporters.report import PARTS, ExportReport, LayerReport, Leftover, site_of, stored_bytes
from qgraph.exporters.verify import Verified
from qgraph.graph import config_of, sites
from qgraph.modules import Collected, Quantizer, Sparsifier
from qgraph.ops import Groups


def assemble(
    model: nn.Module,
    file: ir.Model,
    lowered: Lowered,
    collected: Collected,
    own: Iterable[str],
    **fields: Any,
) -> ExportReport:
    """The report of a lowered graph, sizes of the file and verification left open."""
    layers = [_weight_layer(record, lowered, collected) for record in lowered.weights.values()]
    layers += _activation_layers(lowered, collected)
    leftovers = _leftovers(model, file, lowered, set(own))
    records = [record for record in lowered.weights.values() if record.shared_with is None]
    packed_bytes = sum(record.nbytes for record in records)
    count = sum(record.packed.numel for record in records)
    return ExportReport(
        config=_config(model),
        layers=tuple(layers),
        leftovers=leftovers,
        file_bytes=0,
        ideal_bytes=packed_bytes + sum(item.bytes for item in leftovers),
        bits_per_weight=8 * packed_bytes / count if count else 0.0,
        inputs=tuple(value.name or "" for value in file.graph.inputs),
        outputs=tuple(value.name or "" for value in file.graph.outputs),
        **fields,
    )


def as_stored(report: ExportReport, file: ir.Model) -> ExportReport:
    """The report of a graph whose weights have been unpacked."""
    held = file.graph.initializers.items()
    sizes = {name: value.const_value.nbytes for name, value in held if value.const_value is not None}
    layers = tuple(
        layer if layer.shared_with else dataclasses.replace(layer, bytes=stored_bytes(site_of(layer), sizes))
        for layer in report.layers
    )
    packed, stored = (sum(layer.bytes for layer in found) for found in (report.layers, layers))
    return dataclasses.replace(
        report,
        layers=layers,
        packed_bytes=packed,
        ideal_bytes=report.ideal_bytes - packed + stored,
        bits_per_weight=report.bits_per_weight * stored / packed if packed else 0.0,
    )


def describe(report: ExportReport, *, file_bytes: int, verified: Verified | None) -> ExportReport:
    """The report with the size of the file and the outcome of the verification."""
    if verified is None:
        return dataclasses.replace(report, file_bytes=file_bytes)
    layers = tuple(
        dataclasses.replace(layer, max_difference=_difference(layer, verified.differences)) for layer in report.layers
    )
    return dataclasses.replace(
        report,
        file_bytes=file_bytes,
        layers=layers,
        max_difference=verified.max_difference,
        flips=verified.flips,
        verified=tuple(verified.runs),
        notes=(*report.notes, *verified.notes),
    )


def _difference(layer: LayerReport, differences: Mapping[str, float]) -> float | None:
    return differences.get(layer.path, differences.get(site_of(layer)))


def _weight_layer(record: WeightRecord, lowered: Lowered, collected: Collected) -> LayerReport:
    path, _, operand = record.site.rpartition(".")
    packed = record.packed
    sparsity = collected.sparsity.get(record.site)
    activation = _activation_of(record.site, collected)
    notes = list(dict.fromkeys(record.notes))
    whole_numbers = any("Integer" in form for form in record.forms)
    if activation is not None and activation.bits < 8 and activation.range == "dynamic" and not whole_numbers:
        notes.append(f"{activation.bits:g}-bit activations run no faster than float ones in this form")
    return LayerReport(
        path=path,
        operand=operand,
        op=", ".join(dict.fromkeys(record.ops)) or "unused",
        shape=tuple(packed.shape),
        spec=packed.spec,
        groups=groups_text(packed.groups),
        axis=packed.groups.axis,
        format=record.format,
        bytes=0 if record.shared_with else record.nbytes,
        form="; ".join(dict.fromkeys(record.forms)) or "not used",
        activation=activation,
        sparsity=None if sparsity is None else str(sparsity),
        shared_with=record.shared_with,
        stack=None if record.shared_with or packed.part is None else packed.part.name,
        notes=tuple(notes),
    )


def _activation_of(site: str, collected: Collected) -> Any:
    """The activation quantizer at the operation of a weight, where there is just one."""
    forms = [form for other, form in collected.activations.items() if _belongs(other, site)]
    return forms[0].spec if len(forms) == 1 else None


def _belongs(activation: str, weight: str) -> bool:
    """``fc.input`` and ``fc.weight.input`` go with ``fc.weight``; ``head.emb.weight.input`` with ``emb.weight``."""
    owner = activation.rpartition(".")[0]
    return owner in (weight, weight.rpartition(".")[0]) or owner.endswith(f".{weight}")


def _activation_layers(lowered: Lowered, collected: Collected) -> list[LayerReport]:
    """Quantizers that no row of a weight shows: products of two activations, or several at one operation."""
    shown = {
        activation
        for weight in lowered.weights
        for activation in collected.activations
        if _belongs(activation, weight) and _activation_of(weight, collected) is not None
    }
    rows: dict[str, LayerReport] = {}
    for record in lowered.activations:
        if record.site in shown:
            continue
        path, _, operand = record.site.rpartition(".")
        form = collected.activations[record.site]
        rows[record.site] = LayerReport(
            path=path,
            operand=operand,
            op="activation",
            shape=(),
            spec=None,
            groups=groups_text(form.groups),
            format="",
            bytes=0,
            form="quantized at run time" if form.fixed is None else "codes of a fixed range",
            activation=form.spec,
        )
    return list(rows.values())


def _leftovers(model: nn.Module, file: ir.Model, lowered: Lowered, own: set[str]) -> tuple[Leftover, ...]:
    stored = {f"{site}.{part}" for site in lowered.weights for part in PARTS}
    reasons = _reasons(model)
    found = []
    for name, value in file.graph.initializers.items():
        if name in stored or name.startswith("qgraph.") or value.const_value is None or not value.dtype:
            continue
        if value.dtype.is_floating_point() and value.const_value.nbytes > 16:
            if name in reasons:
                reason = reasons[name]
            else:
                reason = "no weight of a site" if name in own else "a constant of the graph"
            found.append(Leftover(name, value.const_value.nbytes, reason))
    return tuple(found)


def _reasons(model: nn.Module) -> dict[str, str]:
    """Why a parameter was left float, where the config or a switch says so."""
    reasons = {
        module.site: "its quantizer is switched off"
        for module in model.modules()
        if isinstance(module, Quantizer | Sparsifier) and not module.enabled
    }
    for record in sites(model):
        if record.reason:
            reasons[record.name] = reasons[f"{record.path}.{record.name}"] = record.reason
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        known = next((reasons[name] for name in tied if name in reasons), None)
        if known is not None:
            reasons |= dict.fromkeys(tied, known)
    return reasons


def _config(model: nn.Module) -> str:
    config = config_of(model)
    return "custom" if config is None else str(config)


def groups_text(groups: Groups) -> str:
    """``tensor``, ``channel``, ``token`` or ``block 128``."""
    return f"block {groups.block}" if groups.block is not None else groups.kind
