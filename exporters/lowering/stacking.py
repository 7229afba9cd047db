"""Which weights are stored and unpacked together: in a file of many small ones, those that are alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import onnx_ir as ir
from numpy.typing import DTypeLike

from qgraph.config import SparsitySpec
from qgraph.exporters.lowering.records import WeightRecord
from qgraph.exporters.naming import SHARED
from qgraph.exporters.packing import Part, pack, shares, stack
from qgraph.ops import Quantized

MANY = 8  # weights; fewer have tensors of their own, which are easier to read
OWN = 800  # bytes, at most about, that a weight takes beside its codes and scales, and
SHARE = 0.02  # of those, what it may take
STACK = f"{SHARED}stack"
WORTH_TURNING = 3  # parts


def stack_alike(
    records: Iterable[WeightRecord],
    looked_up: Collection[str],
    quantized: Callable[[str], Quantized],
    sparsity: Callable[[str], SparsitySpec | None],
    scale_dtype: DTypeLike,
) -> None:
    """Make weights parts of stacks, in place, where they are many and small.

    Parameters
    ----------
    records : iterable of WeightRecord
        All weights of a file, in its order.
    looked_up : collection of str
        Sites whose rows are read one by one: they stay alone.
    quantized, sparsity : callable
        Of a site.
    """
    own = [record for record in records if record.shared_with is None]
    if len(own) < MANY or OWN * len(own) < SHARE * sum(record.nbytes for record in own):
        return
    groups: dict[Any, list[WeightRecord]] = {}
    for record in own:
        if record.site not in looked_up and _has_rows_first(record):
            groups.setdefault(_kind(record, sparsity(record.site)), []).append(record)
    for number, members in enumerate(found for found in groups.values() if len(found) > 1):
        sites = [record.site for record in members]
        whole = pack(stack([quantized(site) for site in sites]), sparsity=sparsity(sites[0]), scale_dtype=scale_dtype)
        rows = tuple(record.packed.shape[0] for record in members)
        name = f"{STACK}{number}"
        for index, nbytes in enumerate(shares(whole.nbytes, rows)):
            record = members[index]
            record.packed = replace(record.packed, part=Part(name, whole, rows, index))
            record.format, record.nbytes = whole.format, nbytes


def turn(graph: ir.Graph) -> None:
    """Parts of a stack that are used turned round are cut out of the stack turned round: one Transpose for all."""
    for split in [node for node in graph if node.op_type == "Split" and (node.name or "").startswith(STACK)]:
        turned = [[use for use in value.uses() if _turns(*use)] for value in split.outputs]
        if sum(map(bool, turned)) < WORTH_TURNING:
            continue
        whole = ir.node("Transpose", [split.inputs[0]], {"perm": [1, 0]}, name=f"{split.name}/turned")
        count = len(split.outputs)
        cut = ir.node(
            "Split", [whole.outputs[0], split.inputs[1]], {"axis": 1}, num_outputs=count, name=f"{split.name}/parts"
        )
        for i, value in enumerate((*whole.outputs, *cut.outputs)):
            value.name = f"{split.name}/turned:{i}"
        graph.insert_after(split, [whole, cut])
        for uses, part in zip(turned, cut.outputs, strict=True):
            for node, index in uses:
                if node.op_type == "Gemm":
                    del node.attributes["transB"]
                    node.replace_input_with(index, part)
                else:
                    ir.convenience.replace_all_uses_with(node.outputs[0], part)
                    graph.remove(node, safe=True)


def _turns(node: ir.Node, index: int) -> bool:
    """Whether a node turns a matrix round, to compute with it or for others."""
    if node.op_type == "Gemm":
        return index == 1 and "transB" in node.attributes and bool(node.attributes["transB"].as_int())
    return (
        node.op_type == "Transpose" and "perm" in node.attributes and list(node.attributes["perm"].as_ints()) == [1, 0]
    )


def _has_rows_first(record: WeightRecord) -> bool:
    packed = record.packed
    return (
        packed.groups.kind == "channel"
        and len(packed.shape) > 1
        and packed.groups.axis % len(packed.shape) == 0
        and packed.numel > 0
    )


def _kind(record: WeightRecord, sparsity: SparsitySpec | None) -> Any:
    """What weights of one stack have in common."""
    packed = record.packed
    return packed.shape[1:], packed.groups, packed.spec, packed.format.partition("/")[0], packed.sparse, sparsity
