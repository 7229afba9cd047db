"""Replace the stand-in nodes of a traced graph by packed weights and by activation quantizers.

`USES` is the table of what can be done at each use of a weight: the first form whose `match` returns a plan
is emitted; a weight that none of them takes is unpacked to float once and feeds its operation as it is
(`unpacked`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qgraph.errors import ExportError
from qgraph.exporters.lowering import qdq
from qgraph.exporters.lowering.activation import lower_activation
from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.lowering.dynamic import Dynamics
from qgraph.exporters.lowering.linear import (
    EXACT,
    block_sums,
    choose_kernel,
    emit_kernel,
    has_zero_points,
)
from qgraph.exporters.lowering.options import Options
from qgraph.exporters.lowering.records import DOMAIN, ActivationRecord, WeightRecord
from qgraph.exporters.lowering.stacking import stack_alike, turn
from qgraph.exporters.lowering.static import Statics
from qgraph.exporters.lowering.uses import Use, as_product, is_gather, operation_of, uses_of
from qgraph.exporters.packing import PackedWeight, emit_float, emit_gather_rows, pack, unpack
from qgraph.modules import ActivationForm, Collected
from qgraph.ops import Quantized
from qgraph.ops.memory import LARGE, give_back


@dataclass(slots=True)
class Lowered:
    """The outcome for a whole graph."""

    weights: dict[str, WeightRecord]
    activations: list[ActivationRecord]
    nodes: list[ir.Node]  # all that were added

    @property
    def stacked(self) -> set[str]:
        """Names of the initializers that hold several weights."""
        parts = [record.packed.part for record in self.weights.values()]
        return {f"{part.name}.{array}" for part in parts if part is not None for array in part.whole.arrays}


def lower(
    model: ir.Model,
    collected: Collected,
    target: str,
    follow: dict[str, ir.Value] | None = None,
    options: Options | None = None,
) -> Lowered:
    """Lower a traced graph in place.

    Parameters
    ----------
    model : ir.Model
        With `qgraph::Weight` and `qgraph::Activation` nodes.
    collected : Collected
        What each site deploys.
    target : {"standard", "ort", "qdq"}
    follow : dict of values, optional
        Kept up to date, in place, where one of its values is replaced by another.
    options : Options, optional

    Raises
    ------
    ExportError
        When the graph has a site that the eager run did not show.
    """
    return _Lowering(model, collected, target, {} if follow is None else follow, options or Options()).run()


class _Lowering:
    """State of one run: the builder, what is packed, and caches of values that several uses share."""

    def __init__(
        self, model: ir.Model, collected: Collected, target: str, follow: dict[str, ir.Value], options: Options
    ) -> None:
        self.options = options
        self.follow = follow
        self.graph = model.graph
        self.collected = collected
        self.target = target
        self.b = GraphBuilder(self.graph)
        self.records: dict[str, WeightRecord] = {}
        self.activations: list[tuple[int, ActivationRecord]] = []  # each with its place in the traced graph
        self.places = {node: i for i, node in enumerate(self.graph)}
        self.floats: dict[str, ir.Value] = {}
        self.texts: dict[str, str] = {}
        self.sums: dict[tuple[int, int | None], ir.Value] = {}
        self.quantized: dict[tuple[int, str], ir.Value] = {}
        self.by_content: dict[bytes, str] = {}
        self.gathered: set[bytes] = set()
        self.multiplied: set[bytes] = set()
        self.statics = Statics(self)
        self.dynamics = Dynamics(self)

    def run(self) -> Lowered:
        self._find_uses()
        weights = [node for node in self.graph if node.domain == DOMAIN and node.op_type == "Weight"]
        if self.options.stacked and self.target != "qdq":
            self._stack(weights)
        if self.target != "qdq":
            self.statics.emit_chains()
        for node in weights:
            self._weight(node)
        for node in list(self.graph):
            if node.domain == DOMAIN and node.op_type == "Activation":
                self._activation(node)
        self.graph.sort()
        turn(self.graph)
        remove_unused(self.graph)
        self.graph.opset_imports.pop(DOMAIN, None)
        records = {site: self.records[site] for site in map(_site, weights)}
        activations = [record for _, record in sorted(self.activations, key=lambda item: item[0])]
        return Lowered(records, activations, [n for n in self.b.nodes if n.graph is not None])

    # weights

    def _weight(self, node: ir.Node) -> None:
        record = self.record_of(node)
        for use in list(uses_of(node.outputs[0])):
            plan = self._plan(use, record)
            if plan is None:
                continue
            plan()
        if any(use.node.op_type != "Shape" for use in _real_uses(node.outputs[0])):
            self._unpacked(node, record)

    def _find_uses(self) -> None:
        """Weights whose rows are looked up: their rows must begin on a byte, also where they are used otherwise.

        And, for "qdq", weights that are multiplied: their stored codes have that one form.
        """
        for node in self.graph:
            if node.domain == DOMAIN and node.op_type == "Weight":
                uses = [use for use in uses_of(node.outputs[0]) if use.node.op_type != "Shape"]
                gathers = sum(map(is_gather, uses))
                if gathers or self.target == "qdq":
                    digest = _digest(self._quantized(_site(node)))
                    self.gathered |= {digest} if gathers else set()
                    self.multiplied |= {digest} if gathers < len(uses) else set()

    def _stack(self, nodes: list[ir.Node]) -> None:
        records = {record.site: record for record in map(self.record_of, nodes)}
        looked_up = {self.by_content[digest] for digest in self.gathered}
        stored = self.options.stored_scales
        stack_alike(records.values(), looked_up, self._quantized, self.collected.sparsity.get, stored)
        for record in records.values():
            if record.shared_with is not None:
                record.packed = records[record.shared_with].packed

    def _quantized(self, site: str) -> Quantized:
        found = self.collected.weights.get(site)
        if found is None:
            raise _unknown(site)
        return unpack(self.records[site].packed) if site in self.collected.released else found.expand()

    def record_of(self, node: ir.Node) -> WeightRecord:
        """The record of a weight, which is packed on first demand."""
        site = _site(node)
        if site in self.records:
            return self.records[site]
        quantized = self._quantized(site)
        digest = _digest(quantized)
        first = self.by_content.setdefault(digest, site)
        if first == site:
            sparsity = self.collected.sparsity.get(site)
            aligned, stored = digest in self.gathered, self.options.stored_scales
            packed = pack(quantized, sparsity=sparsity, align_rows=aligned, scale_dtype=stored)
        else:
            packed = self.records[first].packed
        if packed.nbytes >= LARGE:  # twice in memory, all of them would be much
            self.collected.release(site)
            give_back()
        self.records[site] = WeightRecord(site, packed, None if first == site else first)
        return self.records[site]

    def _plan(self, use: Use, record: WeightRecord) -> Callable[[], None] | None:
        for match in USES.values():
            if use.node.graph is not self.graph and match is not _Lowering.shape:
                continue  # in the body of a loop: it sees the unpacked weight from outside
            plan = match(self, use, record)
            if plan is not None:
                return plan
        return None

    def _unpacked(self, node: ir.Node, record: WeightRecord) -> None:
        out = node.outputs[0]
        consumers = sorted({operation_of(use.node) for use in _real_uses(out)})
        name = record.shared_with or record.site
        if name not in self.floats:
            with self.b.before(node):
                self.floats[name], self.texts[name] = self._emit_weight(record, name)
            self.floats[name].shape = out.shape
        value = self.floats[name]
        if out.dtype not in (None, ir.DataType.FLOAT):
            with self.b.before(node):
                value = self.b.cast(value, out.dtype, name=f"{name}/cast")
        record.ops += consumers
        record.forms.append(self.texts[name])
        self.replace(out, value)

    def _emit_weight(self, record: WeightRecord, name: str) -> tuple[ir.Value, str]:
        """The float weight, and how it is stored."""
        if self.target != "qdq":
            return emit_float(self.b, record.packed, name), f"unpacked {record.packed.format}"
        emitted = qdq.emit_weight(self.b, record.packed, name)
        record.notes += emitted.notes
        for each in self.records.values():
            if name in (each.site, each.shared_with):
                each.format, each.nbytes = qdq.FORMAT, emitted.nbytes
        return emitted.value, emitted.form

    # activations

    def _activation(self, node: ir.Node) -> None:
        out = node.outputs[0]
        site, x = _site(node), node.inputs[0]
        assert x is not None
        if not out.uses() and out not in self.graph.outputs:
            return
        form = self.form(site)
        if form.fixed is not None:
            self.replace(out, self.statics.pair_of(node) if self.target == "qdq" else self.statics.float_of(node))
            return
        key = (id(x), repr((form.spec, form.groups, None if form.step is None else form.step.tolist())))
        if key not in self.quantized:
            with self.b.before(node):
                self.quantized[key] = lower_activation(self.b, x, form, site)
        y = self.quantized[key]
        if node not in self.dynamics.codes:
            self.note(node, ActivationRecord(site, x, y))
        self.replace(out, y)

    def note(self, node: ir.Node, record: ActivationRecord) -> None:
        """Keep what became of an activation. A site called twice is told apart by the order in the traced graph."""
        self.activations.append((self.places[node], record))

    def form(self, site: str) -> ActivationForm:
        """What a site's quantizer computes."""
        form = self.collected.activations.get(site)
        if form is None:
            raise _unknown(site)
        return form

    # forms of use

    def rows(self, use: Use, record: WeightRecord) -> Callable[[], None] | None:
        """Gather of rows: only the bytes of the rows asked for are read and unpacked."""
        node = use.node
        indices = node.inputs[1] if len(node.inputs) > 1 else None
        packed = record.packed
        if not is_gather(use) or indices is None or len(packed.shape) != 2 or packed.rows != packed.shape:
            return None
        if self.target == "qdq" and _digest(self._quantized(record.site)) in self.multiplied:
            return None

        def emit() -> None:
            name = record.shared_with or record.site
            with self.b.before(node):
                y = emit_gather_rows(self.b, packed, name, indices)
                y = self._as(y, node.outputs[0].dtype, name)
            self.done(node, y, record, "Gather", f"packed rows, {record.packed.format}")

        return emit

    def shape(self, use: Use, record: WeightRecord) -> Callable[[], None] | None:
        """Shape of a weight: known, so nothing is unpacked for it."""
        node = use.node
        if node.op_type != "Shape" or node.inputs[0] is not use.weight:
            return None
        bounds = [node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end")]

        def emit() -> None:
            self.replace(node.outputs[0], self.b.ints(record.packed.shape[slice(*bounds)]))
            self.remove(node)

        return emit

    def kernel(self, use: Use, record: WeightRecord) -> Callable[[], None] | None:
        """MatMulNBits."""
        product = as_product(use, record.packed.shape)
        if product is None or self.target != "ort":
            return None
        node, x, axis, bias = product
        maker = x.producer()
        site = _site(maker) if maker is not None and maker.domain == DOMAIN and maker.op_type == "Activation" else None
        form = self.form(site) if site is not None else None
        if node.outputs[0].dtype not in (None, ir.DataType.FLOAT):
            record.notes.append(f"plain {node.op_type}: the model computes in {node.outputs[0].dtype}")
            return None
        kernel = choose_kernel(record.packed, axis, form)
        if not isinstance(kernel, str) and kernel.accuracy == EXACT and not self.options.float_kernels:
            kernel = "the 4-bit kernel for float activations rounded too much on the example"
        if not isinstance(kernel, str) and self.options.by_speed:
            is_fast, reason = self.options.compare(kernel, record.packed, x)
            if is_fast:
                record.notes.append(reason)
            else:
                kernel = reason
        if isinstance(kernel, str):
            record.notes.append(f"plain {node.op_type}: {kernel}")
            return None

        def emit() -> None:
            name = record.shared_with or record.site
            with self.b.before(node):
                sums = self._sums(x, record.packed, record.packed.shape[1 - axis], name)
                y = emit_kernel(self.b, record.packed, axis, kernel, x, sums, name)
                if bias is not None:
                    y = self.b.op("Add", [y, bias], name=f"{name}/bias")
            self.done(node, y, record, node.op_type, str(kernel))

        return emit

    def integer(self, use: Use, record: WeightRecord) -> Callable[[], None] | None:
        """A product in integers, of a static activation, or where speed is asked for of one with a scale a row."""
        if self.target == "qdq":
            return None
        static = self.statics.product(use, record) or self.statics.convolution(use, record)
        if static is not None or self.target != "ort":
            return static
        return self.dynamics.product(use, record) if self.options.by_speed else None

    def _sums(self, x: ir.Value, packed: PackedWeight, inputs: int, name: str) -> ir.Value | None:
        if not has_zero_points(packed):
            return None
        groups = packed.groups
        block = None if groups.kind == "tensor" or groups.block is None or groups.block >= inputs else groups.block
        key = (id(x), block)
        if key not in self.sums:
            rank = len(x.shape) if x.shape is not None else 2
            self.sums[key] = block_sums(self.b, x, groups, inputs, rank, name)
        return self.sums[key]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Every use of `old` becomes one of `new`, graph outputs included (which keep their name)."""
        name, was_output = old.name, old.is_graph_output()
        if was_output and new.is_graph_output():  # one value cannot have two names
            new = self.b.op("Identity", [new], name=f"{name}/copy")
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        if was_output:
            old.name, new.name = f"{name}/replaced", name
        for key, value in self.follow.items():
            if value is old:
                self.follow[key] = new

    def _as(self, value: ir.Value, dtype: ir.DataType | None, name: str) -> ir.Value:
        return value if dtype in (None, ir.DataType.FLOAT) else self.b.cast(value, dtype, name=f"{name}/cast")

    def done(self, node: ir.Node, y: ir.Value, record: WeightRecord, op: str, form: str) -> None:
        """`y` in the place of the result of a node, which goes."""
        record.ops.append(op)
        record.forms.append(form)
        out = node.outputs[0]
        y.shape, y.type = out.shape, out.type
        self.replace(out, y)
        self.remove(node)

    def remove(self, node: ir.Node) -> None:
        """Take a node that nothing uses any more out of its graph."""
        assert node.graph is not None
        node.graph.remove(node, safe=True)


Match = Callable[[_Lowering, Use, WeightRecord], Callable[[], None] | None]
USES: Mapping[str, Match] = {
    "shape": _Lowering.shape,
    "rows": _Lowering.rows,
    "integer": _Lowering.integer,
    "kernel": _Lowering.kernel,
}


def _real_uses(value: ir.Value) -> Iterator[Use]:
    yield from uses_of(value)
    if value.is_graph_output():
        raise ExportError(
            f"export: a quantized weight ({value.name}) is itself an output of the model; expected outputs "
            "computed from it; return "
            "something else"
        )


def _unknown(site: str) -> ExportError:
    return ExportError(
        f"export: the traced graph quantizes {site!r}, which the eager run did not; expected the same sites in both; "
        "where the weight is multiplied inside torch.vmap, call the members of its batch one by one; else the "
        "model takes another path under torch.export: make that branch independent of it"
    )


def _site(node: ir.Node) -> str:
    return node.attributes["site"].as_string()


def remove_unused(graph: ir.Graph) -> None:
    """Dead nodes and initializers out."""
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))


def _digest(q: Quantized) -> bytes:
    """Equal for weights that deploy the same numbers in the same way."""
    h = hashlib.sha256(repr((q.groups, q.spec, q.sparse)).encode())
    for tensor in (q.codes, q.scale, q.zero_point, q.values):
        if tensor is not None:
            array = tensor.detach().contiguous().cpu().numpy()
            h.update(repr(array.shape).encode())
            h.update(array.tobytes())
    return h.digest()
