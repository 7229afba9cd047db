"""Dynamic activations with a scale a row: their codes, and the integer products that take them.

What the quantizer finds of a row is linear in its codes, whatever its bits: so the product with a weight of one scale a
channel is one of whole numbers (`integer.emit_row_product`), which onnxruntime has 8-bit kernels for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import onnx_ir as ir

from qgraph.exporters.lowering.activation import RowCodes, has_row_codes, lower_to_codes
from qgraph.exporters.lowering.integer import emit_row_product, is_signed, why_not
from qgraph.exporters.lowering.records import DOMAIN, ActivationRecord, WeightRecord
from qgraph.exporters.lowering.uses import Use, as_product

if TYPE_CHECKING:
    from qgraph.exporters.lowering.graph import _Lowering


SMALLEST = 1 << 18  # weights below which corrections cost more than whole numbers save (benchmarks/integers.py)


class _Found(NamedTuple):
    """A product of a dynamic activation, `maker`, and why it stays float, if it does."""

    node: ir.Node
    maker: ir.Node
    axis: int
    bias: ir.Value | None
    reason: str | None


class Dynamics:
    """The dynamic activations of one graph that are multiplied in integers; codes are made on first demand."""

    def __init__(self, lowering: _Lowering) -> None:
        self.lowering = lowering
        self.codes: dict[ir.Node, RowCodes] = {}
        self.by_value: dict[tuple[int, str], RowCodes] = {}

    def product(self, use: Use, record: WeightRecord) -> Callable[[], None] | None:
        """Linear and matmul: MatMulInteger."""
        found = self._find(use, record)
        if found is None:
            return None
        node, maker, axis, bias, reason = found
        if reason is not None:
            record.notes.append(f"no integer {node.op_type}: {reason}")
            return None

        def emit() -> None:
            codes, name = self.codes_of(maker), record.shared_with or record.site
            with self.lowering.b.before(node):
                y = emit_row_product(self.lowering.b, codes, record.packed, axis, name, bias)
            kind = "int8" if is_signed(record.packed, codes.top) else "uint8"
            self.lowering.done(node, y, record, node.op_type, f"MatMulInteger uint8 x {kind}")

        return emit

    def pays(self, use: Use, record: WeightRecord) -> bool:
        """Whether `product` has a form for a use."""
        found = self._find(use, record)
        return found is not None and found.reason is None

    def _find(self, use: Use, record: WeightRecord) -> _Found | None:
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
        top = int(form.spec.levels[1] - form.spec.levels[0])
        reason = why_not(record.packed, axis, top)
        if record.packed.numel < SMALLEST:
            reason = f"small (below {SMALLEST} weights)"
        if reason is None and not is_signed(record.packed, top) and self.lowering.options.rows(x) != 1:
            reason = "8-bit weights that cannot be int8 pay at one row alone"
        return _Found(node, maker, axis, bias, reason)

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
