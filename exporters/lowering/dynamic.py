"""Dynamic activations with a scale a row: their codes, and the integer products that take them.

What the quantizer finds of a row is linear in its codes, whatever its bits: so the product with a weight of one scale a
channel is one of whole numbers (`integer.emit_row_product`), which onnxruntime has 8-bit kernels for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from qgraph.exporters.lowering.activation import RowCodes, has_row_codes, lower_to_codes
from qgraph.exporters.lowering.integer import emit_row_product, is_signed, why_not
from qgraph.exporters.lowering.records import DOMAIN, ActivationRecord, WeightRecord
from qgraph.exporters.lowering.uses import Use, as_product
from qgraph.exporters.packing import PackedWeight
from qgraph.modules import ActivationForm

if TYPE_CHECKING:
    from qgraph.exporters.lowering.graph import _Lowering


SMALLEST = 1 << 18  # weights below which corrections cost more than whole numbers save (benchmarks/integers.py)


class Dynamics:
    """The dynamic activations of one graph that are multiplied in integers; codes are made on first demand."""

    def __init__(self, lowering: _Lowering) -> None:
        self.lowering = lowering
        self.codes: dict[ir.Node, RowCodes] = {}
        self.by_value: dict[tuple[int, str], RowCodes] = {}

    def product(self, use: Use, record: WeightRecord) -> Callable[[], None] | None:
        """Linear and matmul: MatMulInteger."""
        product = as_product(use, record.packed.shape)
        if product is None:
            return None
        node, x, axis, bias = product
        maker = x.producer()
        if maker is None or maker.domain != DOMAIN or maker.op_type != "Activation":
            return None
        form, given = self.lowering.form(maker.attributes["site"].as_string()), maker.inputs[0]
        if given is None or not has_row_codes(form, given) or node.outputs[0].dtype not in (None, ir.DataType.FLOAT):
            return None
        if reason := self._why_float(record.packed, axis, form, x):
            record.notes.append(f"no integer {node.op_type}: {reason}")
            return None

        def emit() -> None:
            codes, name = self.codes_of(maker), record.shared_with or record.site
            with self.lowering.b.before(node):
                y = emit_row_product(self.lowering.b, codes, record.packed, axis, name, bias)
            kind = "int8" if is_signed(record.packed, codes.top) else "uint8"
            record.notes.append(f"whole numbers are faster than a float product from {SMALLEST} weights on")
            self.lowering.done(node, y, record, node.op_type, f"MatMulInteger uint8 x {kind}")

        return emit

    def _why_float(self, packed: PackedWeight, axis: int, form: ActivationForm, x: ir.Value) -> str | None:
        """Why a product stays float, if it does."""
        top = int(form.spec.levels[1] - form.spec.levels[0])
        if packed.numel < SMALLEST:
            return f"small (below {SMALLEST} weights)"
        if not self.lowering.options.float_kernels:
            return "kernels rounded too much on the example"
        if reason := why_not(packed, axis, top):
            return reason
        if not is_signed(packed, top) and self.lowering.options.rows(x) != 1:
            return "8-bit weights that cannot be int8 pay at one row alone"
        return None

    def codes_of(self, node: ir.Node) -> RowCodes:
        """The codes of an activation."""
        if node in self.codes:
            return self.codes[node]
        site, x = node.attributes["site"].as_string(), node.inputs[0]
        assert x is not None
        form = self.lowering.form(site)
        key = (id(x), repr((form.spec, form.groups)))
        if key not in self.by_value:
            with self.lowering.b.before(node):
                self.by_value[key] = lower_to_codes(self.lowering.b, x, form, site)
        codes = self.codes[node] = self.by_value[key]
        self.lowering.note(
            node,
            ActivationRecord(
                site, x, codes.value, zero_point=codes.zero_point, factor=codes.scale, offset=codes.offset
            ),
        )
        return codes
