"""Running files: made-up inputs, timings in turns, comparison with a model."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from qgraph.errors import InspectError
from qgraph.runtime import compare_outputs, feed_for, session_for, time_files, verify


def write(path: Path, scale: float = 2.0, kind: int = TensorProto.FLOAT, name: str = "input") -> Path:
    """A file that multiplies (batch, 3) by a constant."""
    value = helper.make_tensor("scale", kind, [1], [scale] if kind == TensorProto.FLOAT else [b"a"])
    node = helper.make_node("Mul" if kind == TensorProto.FLOAT else "Equal", [name, "scale"], ["y"])
    out = TensorProto.FLOAT if kind == TensorProto.FLOAT else TensorProto.BOOL
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, kind, ["batch", 3])],
        [helper.make_tensor_value_info("y", out, ["batch", 3])],
        [value],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    return path


class Twice(nn.Module):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * (self.factor if not self.training else 0.0)


def test_dynamic_sizes_are_given_by_name(tmp_path: Path) -> None:
    session = session_for(write(tmp_path / "a.onnx"))
    assert feed_for(session)["input"].shape == (1, 3)
    assert feed_for(session, {"batch": 5})["input"].shape == (5, 3)
    assert np.array_equal(feed_for(session)["input"], feed_for(session)["input"])


def test_what_cannot_be_made_up(tmp_path: Path) -> None:
    with pytest.raises(InspectError, match=r"cannot make up a tensor\(string\)"):
        feed_for(session_for(write(tmp_path / "a.onnx", kind=TensorProto.STRING)))


def test_files_take_turns(tmp_path: Path) -> None:
    files = [write(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    first, second = time_files(files, runs=3, sizes={"batch": 2})
    assert first.speedup == 1.0
    assert second.speedup == pytest.approx(first.median_ms / second.median_ms)
    assert second.file_bytes == files[1].stat().st_size


def test_a_file_of_the_model_and_one_of_another(tmp_path: Path) -> None:
    example = (torch.randn(4, 3),)
    model = Twice().train()
    same = verify(write(tmp_path / "a.onnx"), model, example)
    assert (same.max_difference, same.beyond, same.values, same.same_decisions) == (0.0, 0, 12, 1.0)
    assert model.training
    other = verify(write(tmp_path / "b.onnx", -2.0), model, example)
    assert other.max_difference == pytest.approx(2.0)
    assert other.beyond == 12


def test_names_and_shapes_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InspectError, match="takes tokens, and the example holds input; no tokens among them"):
        verify(write(tmp_path / "a.onnx", name="tokens"), Twice(), (torch.randn(4, 3),))
    with pytest.raises(InspectError, match=r"a\.onnx takes input of \['batch', 3\], and does not run on the inputs"):
        verify(write(tmp_path / "a.onnx"), Twice(), (torch.randn(4, 5),))
    with pytest.raises(InspectError, match="the model does not run on the inputs: RuntimeError"):
        verify(write(tmp_path / "a.onnx"), Twice(torch.ones(7)), (torch.randn(4, 3),))
    with pytest.raises(InspectError, match="gives outputs of shapes"):
        compare_outputs("a.onnx", [np.zeros((2, 3))], [np.zeros((2, 4))])


def test_values_that_are_no_numbers_are_beyond_rounding() -> None:
    found = compare_outputs("a.onnx", [np.array([1.0, np.nan])], [np.array([1.0, 2.0])])
    assert found.beyond == 1
    assert found.max_difference == float("inf")
    assert compare_outputs("a.onnx", [np.zeros((0, 2))], [np.zeros((0, 2))]).values == 0


def test_files_that_do_not_load(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(InspectError, match="onnxruntime does not load it"):
        session_for(tmp_path / "a.onnx")
    with pytest.raises(InspectError, match="no such file"):
        session_for(tmp_path / "b.onnx")
