"""Static activations in a graph: which nodes they are, their codes, and the integer products that take them.

`Statics` belongs to one run of `graph.lower`; what is emitted is in `integer.py` and `chains.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qgraph.exporters.lowering import chains, qdq
from qgraph.exporters.lowering.integer import (
    Codes,
    Window,
    emit_convolution,
    emit_dequantize,
    emit_product,
    emit_quantize,
    is_signed,
    why_no_windows,
    why_not,
)
from qgraph.exporters.lowering.records import DOMAIN, ActivationRecord, WeightRecord
from qgraph.exporters.lowering.uses import Use, as_product
from qgraph.exporters.packing import PackedWeight
from qgraph.modules import ActivationForm

if TYPE_CHECKING:
    from qgraph.exporters.lowering.graph import _Lowering

TIE = 1e-4  # in codes: what float32 leaves open of where a value lies between them
SUMS, UNIT = 3, 2.0**-24  # a sum of n float32 values is off by about sqrt(n) units in the last place


class Statics:
    """The static activations of one graph and their codes, made on first demand."""

    def __init__(self, lowering: _Lowering) -> None:
        self.lowering = lowering
        self.b = lowering.b
        self.codes: dict[ir.Node, Codes] = {}
        self.by_value: dict[tuple[int, str], Codes] = {}
        self.floats: dict[int, ir.Value] = {}
        self.pairs: dict[tuple[int, str], tuple[ir.Value, Codes]] = {}

    def form_of(self, node: ir.Node | None) -> ActivationForm | None:
        """The form of a node that is a static activation."""
        if node is None or node.domain != DOMAIN or node.op_type != "Activation":
            return None
        form = self.lowering.collected.activations.get(node.attributes["site"].as_string())
        return None if form is None or form.fixed is None else form

    def emit_chains(self) -> None:
        """QLinearConv for every convolution between two static activations."""
        for conv in [node for node in self.lowering.graph if node.op_type == "Conv" and not node.domain]:
            weight = _weight_of(conv)
            x = conv.inputs[0]
            if weight is None or x is None or self.form_of(x.producer()) is None:
                continue
            outputs = self.lowering.record_of(weight).packed.shape[0]
            chain = chains.find_chain(conv, outputs, self.form_of)
            if chain is not None and not any(end in self.codes for end in chain.ends):
                self._emit_chain(chain, self.lowering.record_of(weight))

    def codes_of(self, node: ir.Node) -> Codes:
        """The codes of a static activation."""
        if node in self.codes:
            return self.codes[node]
        form, x = self.form_of(node), node.inputs[0]
        assert form is not None and x is not None
        key = (id(x), repr((form.spec, form.fixed)))
        site = node.attributes["site"].as_string()
        if key not in self.by_value:
            with self.b.before(node):
                self.by_value[key] = emit_quantize(self.b, x, form, site)
        self.codes[node] = self.by_value[key]
        self._note(node, x, self.codes[node], TIE)
        return self.codes[node]

    def float_of(self, node: ir.Node) -> ir.Value:
        """The dequantized value of a static activation, for what takes no codes."""
        codes = self.codes_of(node)
        if id(codes.value) not in self.floats:
            with self.b.before(node):
                self.floats[id(codes.value)] = emit_dequantize(
                    self.b, codes, node.outputs[0], node.attributes["site"].as_string()
                )
        return self.floats[id(codes.value)]

    def pair_of(self, node: ir.Node) -> ir.Value:
        """The value of a static activation behind QuantizeLinear and DequantizeLinear."""
        form, x = self.form_of(node), node.inputs[0]
        assert form is not None and form.fixed is not None and x is not None
        key, site = (id(x), repr((form.spec, form.fixed))), node.attributes["site"].as_string()
        if key not in self.pairs:
            with self.b.before(node):
                self.pairs[key] = qdq.emit_activation(self.b, x, form, site)
        y, codes = self.pairs[key]
        self._note(node, x, codes, TIE)
        return y

    def product(self, use: Use, record: WeightRecord) -> Callable[[], None] | None:
        """Linear and matmul: MatMulIntegerToFloat, or MatMulInteger."""
        found = as_product(use, record.packed.shape)
        if found is None:
            return None
        node, x, axis, bias = found
        form = self.form_of(x.producer())
        if form is None or node.outputs[0].dtype not in (None, ir.DataType.FLOAT):
            return None
        bottom, top = form.spec.levels
        if (reason := why_not(record.packed, axis, top - bottom)) is not None:
            record.notes.append(f"no integer {node.op_type}: {reason}")
            return None
        last = node
        if bias is None and (add := _added_constant(node, record.packed.shape[axis])) is not None:
            last, bias = add
        if bias is not None and (bias.shape is None or len(bias.shape) != 1):
            last, bias = node, None
            if len(node.inputs) > 2:
                return None

        def emit() -> None:
            producer = x.producer()
            assert producer is not None
            codes, name = self.codes_of(producer), record.shared_with or record.site
            with self.b.before(node):
                y = emit_product(self.b, codes, record.packed, axis, name, bias, None, self._microsoft)
            self._replace(last, node, y, record, node.op_type, self._text(record.packed, codes))

        return emit

    def convolution(self, use: Use, record: WeightRecord) -> Callable[[], None] | None:
        """Conv that ends in float: a product with the windows of its input."""
        node = use.node
        if node.op_type != "Conv" or node.domain or use.index != 1 or node.inputs[1] is not use.weight:
            return None
        x, packed = node.inputs[0], record.packed
        form = None if x is None else self.form_of(x.producer())
        if form is None or node.outputs[0].dtype not in (None, ir.DataType.FLOAT):
            return None
        bottom, top = form.spec.levels
        window = Window.of(node, packed.shape)
        reason = "its padding follows the input's size" if window is None else why_not(packed, 0, top - bottom)
        if window is None or (reason := reason or why_no_windows(packed, window)) is not None:
            record.notes.append(f"float Conv: {reason}")
            return None

        def emit() -> None:
            assert x is not None
            producer = x.producer()
            assert producer is not None
            codes, name = self.codes_of(producer), record.shared_with or record.site
            affine = chains.affine_of(node, packed.shape[0])
            gain, last = (None, node) if affine is None else (affine.gain, affine.last)
            with self.b.before(node):
                bias = node.inputs[2] if len(node.inputs) > 2 else None
                if gain is not None:
                    assert affine is not None and affine.bias is not None
                    bias = self.b.constant(affine.bias, "bias")
                y = emit_convolution(self.b, codes, packed, window, name, bias, gain, self._microsoft)
            self._replace(last, node, y, record, "Conv", f"windows, {self._text(packed, codes)}")

        return emit

    @property
    def _microsoft(self) -> bool:
        return self.lowering.target == "ort"

    def _text(self, packed: PackedWeight, codes: Codes) -> str:
        kind = "MatMulIntegerToFloat" if self._microsoft else "MatMulInteger"
        return f"{kind} uint8 x {'int8' if is_signed(packed, codes.top) else 'uint8'}"

    def _emit_chain(self, chain: chains.Chain, record: WeightRecord) -> None:
        form = self.form_of(chain.ends[0])
        x = chain.conv.inputs[0]
        producer = None if x is None else x.producer()
        window = Window.of(chain.conv, record.packed.shape)
        if form is None or producer is None or window is None:
            return
        codes = self.codes_of(producer)
        if (reason := chains.why_no_chain(record.packed, codes)) is not None:
            record.notes.append(f"no QLinearConv: {reason}")
            return
        name = record.shared_with or record.site
        with self.b.before(chain.conv):
            found = chains.emit_chain(self.b, chain, codes, record.packed, form, window, name)
        if isinstance(found, str):
            record.notes.append(f"no QLinearConv: {found}")
            return
        made, slack = found
        length = record.packed.numel // max(1, record.packed.shape[0])
        tie = TIE + slack + SUMS * length**0.5 * UNIT * made.top
        for end in chain.ends:
            end.replace_input_with(0, made.value)
            self.codes[end] = made
            self._note(end, None, made, tie)
        for node in dict.fromkeys((*reversed(chain.moves), chain.affine.last, chain.conv)):
            self.lowering.remove(node)
        record.ops.append("Conv")
        record.forms.append(f"QLinearConv uint8 x {'int8' if is_signed(record.packed, codes.top) else 'uint8'}")

    def _note(self, node: ir.Node, before: ir.Value | None, codes: Codes, tie: float) -> None:
        site = node.attributes["site"].as_string()
        self.lowering.note(node, ActivationRecord(site, before, codes.value, codes.scale, codes.zero_point, tie))

    def _replace(self, last: ir.Node, node: ir.Node, y: ir.Value, record: WeightRecord, op: str, form: str) -> None:
        """`y` in the place of the result of `last`; it and `node`, which it may be, go."""
        record.ops.append(op)
        record.forms.append(form)
        out = last.outputs[0]
        y.shape, y.type = out.shape, out.type
        self.lowering.replace(out, y)
        for gone in dict.fromkeys((last, node)):
            self.lowering.remove(gone)


def _weight_of(conv: ir.Node) -> ir.Node | None:
    """The stand-in of a convolution's weight."""
    weight = conv.inputs[1]
    maker = None if weight is None else weight.producer()
    return maker if maker is not None and maker.domain == DOMAIN and maker.op_type == "Weight" else None


def _added_constant(node: ir.Node, outputs: int) -> tuple[ir.Node, ir.Value] | None:
    """The Add of a bias behind a MatMul, and the bias."""
    add = chains.only_use(node.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    other = next((v for v in add.inputs if v is not node.outputs[0]), None)
    content = chains.constant_of(other)
    if other is None or content is None or content.shape != (outputs,) or content.dtype != np.float32:
        return None
    return add, other
