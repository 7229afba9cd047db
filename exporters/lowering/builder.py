"""A thin builder of ONNX nodes on onnx-ir: make a model from nothing, or splice nodes into an existing graph.

It knows nothing of quantization. Lowerings and packed-weight decoders write their nodes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import onnx
import onnx_ir as ir

DEFAULT_OPSET = 18
IR_VERSION = 10  # onnxruntime >= 1.18 reads it, and it has every type up to int4
MICROSOFT = "com.microsoft"
T = TypeVar("T")


class GraphBuilder:
    """Adds nodes and initializers to one `onnx_ir.Graph`, with unique names, in order.

    Parameters
    ----------
    graph : ir.Graph, optional
        The graph to splice into. Nodes go to its end, or before the node of the innermost `before(node)`
        block. Left out, an empty graph is made: add `input`s, `output`s and take the `model`.
    opset : int
        Opset of the default domain when the graph is made here.

    Example
    -------
    >>> b = GraphBuilder()
    >>> x = b.input("x", np.float32, (None, 2))
    >>> w = b.initializer("fc.weight", np.ones((2, 3), np.float32))
    >>> b.output(b.op("MatMul", [x, w], name="fc"), "y")
    >>> [node.op_type for node in b.nodes]
    ['MatMul']
    """

    def __init__(self, graph: ir.Graph | None = None, *, opset: int = DEFAULT_OPSET) -> None:
        if graph is None:
            graph = ir.Graph([], [], nodes=[], name="qgraph", opset_imports={"": opset})
        self.graph = graph
        self.nodes: list[ir.Node] = []  # what this builder added, in order
        self._anchor: ir.Node | None = None
        self._made: dict[Hashable, Any] = {}
        self._names = _names_of(graph)

    @property
    def opset(self) -> int:
        """Version of the default operator domain."""
        return self.graph.opset_imports.get("", DEFAULT_OPSET)

    @contextmanager
    def before(self, node: ir.Node) -> Iterator[GraphBuilder]:
        """While open, new nodes are inserted right before `node` (in the order they are made)."""
        previous, self._anchor = self._anchor, node
        try:
            yield self
        finally:
            self._anchor = previous

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        """The initializer called `name`, made on first use; with the same content it is the same value.

        Raises
        ------
        ValueError
            When the graph holds another tensor under that name.
        """
        found = self.graph.initializers.get(name)
        if found is not None:
            held = found.const_value
            if held is not None and _same(held.numpy(), array):
                return found
            raise ValueError(
                f"initializer {name!r}: the graph already holds another tensor of that name; "
                f"expected the same content ({array.dtype}, shape {array.shape}); pick another name"
            )
        array = _contiguous(array)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        self._names.add(name)
        return value

    def constant(self, array: np.ndarray, hint: str = "const") -> ir.Value:
        """A shared initializer, one per distinct content (tables, shapes, axes), called `qgraph.<hint>`."""
        array = _contiguous(array)
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        return self.once(key, lambda: self.initializer(self.unique(f"qgraph.{hint}"), array))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` computed the first time it was asked for under `key`."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A shared int64 vector (axes, shapes, slice bounds)."""
        return self.constant(np.asarray(values, np.int64), "ints")

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attrs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        domain: str = "",
        dtype: ir.DataType | None = None,
        shape: Sequence[int | str | None] | None = None,
    ) -> ir.Value:
        """Add a node with one output and return that output (see `ops` for several)."""
        value = self.ops(op_type, inputs, attrs, outputs=1, name=name, domain=domain)[0]
        if dtype is not None:
            value.type = ir.TensorType(dtype)
        if shape is not None:
            value.shape = ir.Shape(shape)
        return value

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attrs: Mapping[str, Any] | None = None,
        *,
        outputs: int,
        name: str | None = None,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """Add a node; return its outputs. Names are made unique: `name`, and `name:0`.. for the outputs."""
        name = self.unique(name or op_type)
        node = ir.node(op_type, inputs, dict(attrs or {}), domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = self.unique(f"{name}:{i}")
        if domain and domain not in self.graph.opset_imports:
            self.graph.opset_imports[domain] = 1
        if self._anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self._anchor, node)
        self.nodes.append(node)
        return node.outputs

    def cast(self, value: ir.Value, dtype: ir.DataType, *, name: str | None = None) -> ir.Value:
        """`Cast` to a type."""
        return self.op("Cast", [value], {"to": int(dtype)}, name=name, dtype=dtype)

    def reshape(self, value: ir.Value, shape: Sequence[int], *, name: str | None = None) -> ir.Value:
        """`Reshape` to a constant shape; a 0 means zero elements, not "as in the input"."""
        attrs = {"allowzero": 1} if 0 in shape and self.opset >= 14 else None
        return self.op("Reshape", [value, self.ints(shape)], attrs, name=name)

    def slice(
        self,
        value: ir.Value,
        starts: Sequence[int],
        ends: Sequence[int],
        axes: Sequence[int],
        *,
        name: str | None = None,
    ) -> ir.Value:
        """`Slice` with constant bounds."""
        return self.op("Slice", [value, self.ints(starts), self.ints(ends), self.ints(axes)], name=name)

    def input(self, name: str, dtype: Any, shape: Sequence[int | str | None]) -> ir.Value:
        """Declare a graph input. `dtype` is a numpy type."""
        value = ir.Value(
            name=self.unique(name),
            shape=ir.Shape(shape),
            type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))),
        )
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str | None = None, dtype: Any = None, shape: Any = None) -> None:
        """Declare a graph output, renamed when `name` is given; a missing type or shape is inferred."""
        if name is not None:
            value.name = name
        if dtype is not None:
            value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
        if shape is not None:
            value.shape = ir.Shape(shape)
        self.graph.outputs.append(value)

    def model(self) -> onnx.ModelProto:
        """The graph as an `onnx.ModelProto` (nodes must be in topological order)."""
        model = ir.Model(self.graph, ir_version=IR_VERSION, producer_name="qgraph")
        proto = ir.serde.serialize_model(model)
        # The checker wants a type and a shape on every output.
        if any(value.shape is None or value.type is None for value in self.graph.outputs):
            proto = onnx.shape_inference.infer_shapes(proto)
        return proto

    def unique(self, name: str) -> str:
        """`name`, or `name_1`, `name_2`.. when it is taken; the result is taken from now on."""
        candidate, count = name, 0
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate


def _names_of(graph: ir.Graph) -> set[str]:
    names = {value.name for value in graph.inputs if value.name} | set(graph.initializers)
    for node in graph:
        names |= {value.name for value in node.outputs if value.name} | ({node.name} if node.name else set())
    return names


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _contiguous(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes a scalar 1-D
