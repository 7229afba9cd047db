"""What the rows of an inspection say, as attributes of the network's nodes: spec, bits, bytes, error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qgraph.inspection.layers import FloatTensor, Layer
from qgraph.inspection.sizes import FLOAT_BITS

if TYPE_CHECKING:
    import networkx


def annotate(network: networkx.DiGraph, layers: Iterable[Layer], floats: Iterable[FloatTensor]) -> None:
    """Add to the nodes of a network, in place, what is known of their weights.

    An operation with a site gets ``quantized``, ``spec``, ``bits`` (of the weight; the least of several),
    ``reason``, ``error_db``; a parameter ``bytes_before`` and ``bytes_after``, which add up to the model's. Those of a
    module without a graph of its own are at the node of its call.
    """
    layers = list(layers)
    rows: dict[str, list[Layer]] = {}
    for layer in layers:
        rows.setdefault(layer.name, []).append(layer)
        if layer.site != layer.name:
            rows.setdefault(layer.site, []).append(layer)
    plain = {item.name: item for item in floats}
    called: dict[str, dict[str, Any]] = {}
    counted: set[str] = set()
    for name, data in network.nodes(data=True):
        if data["op"] in ("parameter", "buffer", "initializer"):
            data |= _sizes(name, data, rows, plain, counted)
        elif "kind" in data:
            called.setdefault(data["path"], data)
        elif "site" in data and "quantizer" not in data:
            found = [row for site in data["site"].split(",") for row in rows.get(site, ())]
            here = [row for row in found if row.path == data["path"]] or found
            if here:
                data |= _site(here)
    _rest(called, layers, plain.values(), counted)


def _rest(
    called: dict[str, dict[str, Any]], rows: Iterable[Layer], floats: Iterable[FloatTensor], counted: set[str]
) -> None:
    """Give what has no node of its own to the call of the innermost module around it that is one node."""
    own = [(row.name, row.bytes_before, row.bytes_after) for row in rows if row.tied_to is None]
    own += [(item.name, item.bytes, item.bytes) for item in floats]
    for name, before, after in own:
        if name in counted:
            continue
        around = name
        while around and around not in called:
            around = around.rpartition(".")[0]
        data = called.get(around)
        if data is not None:
            data["bytes_before"] = data.get("bytes_before", 0) + before
            data["bytes_after"] = data.get("bytes_after", 0) + after


def _site(rows: list[Layer]) -> dict[str, Any]:
    quantized = [row for row in rows if row.quantized]
    bits = [row.weight.bits for row in quantized if row.weight is not None]
    errors = [row.error_db for row in quantized if row.error_db is not None and math.isfinite(row.error_db)]
    attributes: dict[str, Any] = {
        "quantized": bool(quantized),
        "spec": (quantized or rows)[0].spec,
        "bits": min(bits, default=FLOAT_BITS),
    }
    if errors:
        attributes["error_db"] = min(errors)
    if not quantized:
        attributes["reason"] = rows[0].reason
    return attributes


def _sizes(
    name: str, data: dict[str, Any], rows: dict[str, list[Layer]], floats: dict[str, FloatTensor], counted: set[str]
) -> dict[str, Any]:
    site = data.get("site", name)
    own = [row for row in rows.get(site, ()) if row.tied_to is None and row.name == site]
    if own:
        if site in counted:  # codes, mask and scales of one weight in a file: the first stands for all
            return {"bytes_before": 0, "bytes_after": 0}
        counted.add(site)
        return {"bytes_before": own[0].bytes_before, "bytes_after": own[0].bytes_after}
    if name in floats:
        counted.add(name)
        return {"bytes_before": floats[name].bytes, "bytes_after": floats[name].bytes}
    return {}
