"""Nodes that only lay values out anew: fewer of them, and the same values at every size."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qgraph
from qgraph.exporters.layouts import MOVES, gather_moves
from qgraph.exporters.lowering.builder import GraphBuilder


def run(b: GraphBuilder, *inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(b.model().SerializeToString(), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


def text(b: GraphBuilder) -> list[str]:
    """Each node and what it is told, in order."""
    lines = []
    for node in b.graph:
        told = node.attributes["perm"].as_ints() if "perm" in node.attributes else ""
        if node.op_type == "Reshape":
            told = node.inputs[1].const_value.numpy().tolist()
        lines.append(f"{node.op_type} {told if told == '' else list(told)}".strip())
    return lines


def moved(b: GraphBuilder, x: ir.Value, op: str, given: list[int], shape: list[int | str]) -> ir.Value:
    if op == "Transpose":
        return b.op(op, [x], {"perm": given}, shape=shape, dtype=ir.DataType.FLOAT)
    return b.op(op, [x, b.ints(given)], shape=shape, dtype=ir.DataType.FLOAT)


def heads() -> GraphBuilder:
    """What torch makes of queries, keys and values, but that its last Reshapes take a sequence of seven alone."""
    b = GraphBuilder()
    x = b.input("x", np.float32, ("s", "b", 24))
    y = moved(b, x, "Reshape", [0, 0, 3, 8], ["s", "b", 3, 8])
    y = moved(b, y, "Unsqueeze", [0], [1, "s", "b", 3, 8])
    y = moved(b, y, "Transpose", [3, 1, 2, 0, 4], [3, "s", "b", 1, 8])
    y = moved(b, y, "Squeeze", [3], [3, "s", "b", 8])
    for i in range(3):
        z = b.op("Gather", [y, b.constant(np.asarray(i, np.int64))], shape=["s", "b", 8], dtype=ir.DataType.FLOAT)
        z = moved(b, z, "Reshape", [0, -1, 4], ["s", "2*b", 4])
        z = moved(b, z, "Transpose", [1, 0, 2], ["2*b", "s", 4])
        z = moved(b, z, "Reshape", [-1, 2, 7, 4], ["b", 2, "s", 4])
        b.output(b.op("Neg", [z]), f"y{i}", np.float32, ("b", 2, "s", 4))
    return b


def test_heads_of_an_attention_are_one_reshape_and_one_transpose():
    x = np.random.default_rng(0).normal(size=(7, 5, 24)).astype(np.float32)
    before, b = run(heads(), x), heads()
    gather_moves(b.graph, {})
    after = ["Reshape [0, 0, 3, 2, 4]", "Transpose [2, 1, 3, 0, 4]", *["Gather", "Neg"] * 3]
    assert text(b) == after
    assert all(map(np.array_equal, before, run(b, x)))
    for size in ((2, 1), (1, 3), (4, 0), (0, 2)):  # at which the shapes of before do not hold
        other = np.resize(x, (*size, 24))
        want = other.reshape(*size, 3, 2, 4).transpose(2, 1, 3, 0, 4)
        assert all(np.array_equal(y, -w) for y, w in zip(run(b, other), want, strict=True))
    gather_moves(b.graph, {})
    assert text(b) == after


def test_what_is_followed_stays_or_is_put_in_the_place_of_the_last():
    b = heads()
    values = {node.op_type: node.outputs[0] for node in b.graph if node.op_type in ("Unsqueeze", "Squeeze")}
    gather_moves(b.graph, values)
    assert text(b)[:4] == ["Reshape [0, 0, 3, 8]", "Unsqueeze", "Transpose [3, 1, 2, 0, 4]", "Squeeze"]
    b = heads()
    last = {str(i): node.inputs[0] for i, node in enumerate(b.graph) if node.op_type == "Neg"}
    gather_moves(b.graph, last)
    assert [value.producer().op_type for value in last.values()] == ["Gather"] * 3


@pytest.mark.parametrize(
    ("sizes", "steps"),
    [
        (["s", "b"], [("Reshape", [5, 7], ["b", "s"])]),  # no order of the factors: values of one row come apart
        (["s", "b"], [("Transpose", [1, 0], ["b", "s"]), ("Reshape", [-1], ["b*s"])]),  # both are needed
        (["s + 1", "b"], [("Reshape", [0, 5, 1], ["s + 1", "b", 1]), ("Transpose", [0, 2, 1], ["s + 1", 1, "b"])]),
        ([None, "b"], [("Unsqueeze", [0], [1, None, "b"]), ("Squeeze", [0], [None, "b"])]),
    ],
)
def test_nothing_is_done_where_sizes_do_not_tell_or_nothing_is_saved(sizes, steps):
    b = GraphBuilder()
    y = b.input("x", np.float32, sizes)
    for step in steps:
        y = moved(b, y, *step)
    b.output(b.op("Neg", [y]), "y")
    before = text(b)
    gather_moves(b.graph, {})
    assert text(b) == before


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_run_of_them(data):
    """Dimensions are lists of factors, (size, name), of which some have names; two steps back undo two of the run."""
    factors = [(3, "s"), (5, "b"), (2, None), (4, None)]
    dims = [[factor] for factor in data.draw(st.permutations(factors))]
    b = GraphBuilder()
    x = np.random.default_rng(0).normal(size=[size for ((size, _),) in dims]).astype(np.float32)
    y = b.input("x", np.float32, declared(dims))
    for kind in data.draw(st.lists(st.sampled_from(("turn", "merge", "split", "one", "none")), min_size=2, max_size=7)):
        at = data.draw(st.integers(0, len(dims) - 1))
        if kind == "turn":
            order = data.draw(st.permutations(range(len(dims))))
            dims = [dims[i] for i in order]
            y = moved(b, y, "Transpose", order, declared(dims))
            continue
        if kind == "one":
            dims = [*dims[:at], [], *dims[at:]]
            y = moved(b, y, "Unsqueeze", [at], declared(dims))
            continue
        if kind == "none":
            axes = [i for i, dim in enumerate(dims) if not dim]
            dims = [dim for dim in dims if dim]
            y = moved(b, y, "Squeeze", axes, declared(dims)) if axes else y
            continue
        end = at + (2 if kind == "merge" else 1)
        merged = [each for dim in dims[at:end] for each in dim]
        dims = [*dims[:at], *([merged] if kind == "merge" else [[each] for each in merged]), *dims[end:]]
        y = moved(b, y, "Reshape", [math.prod(size for size, _ in dim) for dim in dims], declared(dims))
    b.output(b.op("Neg", [y]), "y")
    before, count = run(b, x), len(text(b))
    gather_moves(b.graph, {})
    assert len(text(b)) <= count and np.array_equal(run(b, x)[0], before[0])


def declared(dims: list[list[tuple[int, str | None]]]) -> list[int | str]:
    """The sizes of a value as the tracer says them."""
    shape: list[int | str] = []
    for dim in dims:
        number, names = math.prod(size for size, name in dim if name is None), [name for _, name in dim if name]
        shape.append(number if not names else "*".join([str(number)] * (number != 1) + names))
    return shape


def test_an_encoder_takes_what_it_needs(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    x = torch.randn(2, 5, 32)
    prepared = qgraph.prepare(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "W4", (x,)).eval()
    report = qgraph.export(prepared, tmp_path / "model.onnx", (x,), progress=False)
    assert report.max_difference < 1e-5
    moves = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type in MOVES]
    assert len(moves) <= 2 * 7 + 4  # of each layer seven; beside them the weights
