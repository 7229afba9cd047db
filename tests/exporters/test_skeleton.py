"""A file without the content of its large weights is checked in little memory."""

from __future__ import annotations

import onnx
import pytest
import torch
from google.protobuf.message import DecodeError
from torch import nn

import qgraph
from qgraph.errors import ExportError
from qgraph.exporters.skeleton import skeleton
from qgraph.exporters.verify import check
from qgraph.exporters.write import STREAMED_ABOVE


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "m.onnx"
    model, x = nn.Sequential(nn.Linear(1024, 1200), nn.ReLU(), nn.Linear(1200, 8)), torch.randn(2, 1024)
    qgraph.export(qgraph.prepare(model, "W8", x).eval(), path, x, target="standard", verify=False, progress=False)
    return path


def test_large_weights_are_inputs_and_all_else_is_as_in_the_file(path):
    whole, found = onnx.load(path), skeleton(path)
    (large,) = [tensor for tensor in whole.graph.initializer if len(tensor.raw_data) >= STREAMED_ABOVE]
    (described,) = [value for value in found.graph.input if value.name == large.name]
    assert [dim.dim_value for dim in described.type.tensor_type.shape.dim] == list(large.dims)
    assert described.type.tensor_type.elem_type == large.data_type
    whole.graph.initializer.remove(large)
    found.graph.input.remove(described)
    assert found == whole and found.ByteSize() < 100_000


def test_a_file_that_ends_early_is_refused(path, tmp_path):
    content, cut = path.read_bytes(), tmp_path / "cut.onnx"
    for length in (3, 40, 4000, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:length])
        with pytest.raises((DecodeError, IndexError)):
            skeleton(cut)
    with pytest.raises(ExportError, match=r"onnx\.checker refuses the file"):
        check(cut)


def test_an_invalid_file_is_refused(path, tmp_path):
    model = onnx.load(path)
    model.graph.node[0].op_type = "Nothing"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="Nothing"):
        check(tmp_path / "m.onnx")
