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
from qgraph.exporters.layouts import MOVES, gather_moves, keep_rows
from qgraph.exporters.lowering.builder import GraphBuilder
from qgraph.exporters.lowering.graph import remove_unused
from qgraph.exporters.lowering.records import DOMAIN
from qgraph.modules import ActivationForm
from qgraph.ops import Groups


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
            told = "" if node.inputs[1].const_value is None else node.inputs[1].const_value.numpy().tolist()
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


def flattened(bias_shape: tuple[int, ...] = (6,), turned: int = 1) -> GraphBuilder:
    """A product as GPT-2 has it: rows of any number, flattened for it."""
    b = GraphBuilder()
    y = b.op("Relu", [b.input("x", np.float32, ("b", "s", 2, 4))], shape=("b", "s", 2, 4), dtype=ir.DataType.FLOAT)
    sizes = b.op("Concat", [b.op("Shape", [y], {"end": 2}), b.ints([6])], {"axis": 0})
    y = moved(b, y, "Reshape", [-1, 8], ["b*s", 8])
    rng = np.random.default_rng(1)
    weight = b.initializer("weight", rng.normal(size=(6, 8) if turned else (8, 6)).astype(np.float32))
    bias = b.initializer("bias", rng.normal(size=bias_shape).astype(np.float32))
    y = b.op("Gemm", [y, weight, bias], {"transB": turned}, shape=("b*s", 6), dtype=ir.DataType.FLOAT)
    y = b.op("Reshape", [y, sizes], {"allowzero": 1}, shape=("b", "s", 6), dtype=ir.DataType.FLOAT)
    b.output(b.op("Neg", [y]), "y", np.float32, ("b", "s", 6))
    return b


@pytest.mark.parametrize("turned", [0, 1])
def test_rows_are_not_flattened_for_a_product(turned):
    x = np.random.default_rng(0).normal(size=(3, 5, 2, 4)).astype(np.float32)
    before, b = run(flattened(turned=turned), x), flattened(turned=turned)
    keep_rows(b.graph, {}, {})
    remove_unused(b.graph)
    assert text(b) == ["Relu", "Reshape [0, 0, 8]", *["Transpose [1, 0]"] * turned, "MatMul", "Add", "Neg"]
    np.testing.assert_allclose(run(b, x)[0], before[0], rtol=1e-6, atol=1e-6)
    assert run(b, x[:0])[0].shape == (0, 5, 6)


@pytest.mark.parametrize("kept", ["followed", "bias", "quantizer"])
def test_rows_stay_flat_where_more_hangs_on_them(kept):
    b = flattened((15, 6) if kept == "bias" else (6,))
    gemm = next(node for node in b.graph if node.op_type == "Gemm")
    follow = {"fc": gemm.outputs[0]} if kept == "followed" else {}
    if kept == "quantizer":  # of a kind whose groups are not rows
        with b.before(gemm):
            x = b.op("Activation", [gemm.inputs[0]], {"site": "fc"}, domain=DOMAIN, shape=("b*s", 8))
        gemm.replace_input_with(0, x)
    before = text(b)
    keep_rows(b.graph, follow, {"fc": ActivationForm(qgraph.QuantSpec(4), Groups("channel", 0), None)})
    assert text(b) == before


@pytest.mark.parametrize("config", ["A4W4", "A8W4@32", "A8sW7"])
def test_quantizers_between_are_held_to_torch(config, tmp_path):
    """Their rows are laid out otherwise than torch's, and are compared all the same."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64)
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    prepared = qgraph.prepare(Attends(attention), config, (x,)).eval()
    if "s" in config:
        qgraph.calibrate(prepared, [(x,)], progress=False)
    for target in ("standard", "ort"):
        report = qgraph.export(prepared, tmp_path / "model.onnx", (x,), target=target, progress=False)
        assert report.max_difference < 1e-5 or report.flips
        kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
        assert "Gemm" not in kinds and "Shape" not in kinds


class Attends(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_an_encoder_takes_what_it_needs(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    x = torch.randn(2, 5, 32)
    prepared = qgraph.prepare(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "W4", (x,)).eval()
    report = qgraph.export(prepared, tmp_path / "model.onnx", (x,), progress=False)
    assert report.max_difference < 1e-5
    moves = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type in MOVES]
    assert len(moves) <= 2 * 6 + 4  # of each layer six; beside them the weights
