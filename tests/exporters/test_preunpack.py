"""Files whose weights are stored as a runtime holds them."""

import logging

import onnx
import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import ExportError, InspectError
from qgraph.exporters.report import read_report
from tests.models import CNN, GPT


def kinds(path):
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize(
    ("config", "target", "unpacking"),
    [
        ("W1-2:4", "ort", {"Pad", "GatherElements", "Cast"}),  # 4-bit codes of MatMulNBits
        ("W3", "standard", {"Cast", "BitShift", "Gather"}),  # floats
        ("A8sW7", "standard", {"Gather", "BitShift"}),  # 8-bit codes
    ],
)
def test_nothing_is_unpacked_at_load_and_the_numbers_are_the_same(config, target, unpacking, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    prepared = qgraph.prepare(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 40)), config, x).eval()
    if "s" in config:
        qgraph.calibrate(prepared, [(x,)])
    paths = [str(tmp_path / name) for name in ("packed.onnx", "plain.onnx")]
    options = {"target": target, "optimize_for": "size"}  # which takes kernels of small layers too
    packed, plain = (qgraph.export(prepared, path, (x,), preunpacked=path == paths[1], **options) for path in paths)
    assert kinds(paths[0]) & unpacking and not kinds(paths[1]) & unpacking
    assert plain.max_difference < 1e-5 and plain.flips == packed.flips
    assert plain.packed_bytes == sum(layer.bytes for layer in packed.layers) and packed.packed_bytes is None
    read = read_report(paths[1])
    assert [layer.bytes for layer in read.layers] == [layer.bytes for layer in plain.layers]
    assert (read.packed_bytes, read.ideal_bytes) == (plain.packed_bytes, plain.ideal_bytes)
    assert plain.ideal_bytes < plain.file_bytes < plain.ideal_bytes + 8000
    assert "weights unpacked" in str(plain) and qgraph.inspect(paths[1]).to_dict()
    with pytest.raises(InspectError, match="preunpacked=True"):
        qgraph.unpack(paths[1])


@pytest.mark.parametrize("target", ["ort", "standard"])
def test_tied_gathered_and_convolution_weights(target, tmp_path, caplog):
    torch.manual_seed(0)
    for model, x in ((GPT(65, 64, 2), torch.randint(0, 65, (2, 16))), (CNN(), torch.randn(2, 3, 16, 16))):
        prepared = qgraph.prepare(model, "W4", x).eval()
        options = {"target": target, "optimize_for": "size"}
        report = qgraph.export(prepared, tmp_path / "a.onnx", (x,), preunpacked=True, **options)
        assert report.max_difference < 1e-5 and report.packed_bytes is not None
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]  # nothing on the terminal


def test_a_target_that_has_it_already(tmp_path):
    prepared = qgraph.prepare(nn.Linear(4, 4), "W4")
    with pytest.raises(ExportError, match="preunpacked=True with target='qdq'"):
        qgraph.export(prepared, tmp_path / "a.onnx", (torch.randn(2, 4),), target="qdq", preunpacked=True)
