"""Scales stored as float16: smaller files, the same numbers as the model whose scales are rounded."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import ExportError
from tests.models import GPT


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Conv1d(5, 5, 3, padding=1), nn.Linear(64, 8))


@pytest.mark.parametrize("target", ["ort", "standard", "qdq"])
@pytest.mark.parametrize("config", ["W4@32", "A8W8@32", "W1-2:4@32"])
def test_the_file_is_the_model_with_rounded_scales(config, target, tmp_path):
    x = torch.randn(3, 5, 64)
    prepared = qgraph.prepare(model(), config, x).eval()
    before = prepared(x).detach()
    options = {"target": target, "optimize_for": "size"}  # which takes kernels of small layers too
    full = qgraph.export(prepared, tmp_path / "full.onnx", (x,), **options)
    half = qgraph.export(prepared, tmp_path / "half.onnx", (x,), scale_dtype="float16", **options)
    assert torch.equal(prepared(x), before)  # the model itself is as it was
    kinds = {t.name: t.data_type for t in onnx.load(half.path).graph.initializer if t.name.endswith(".scale")}
    assert set(kinds.values()) == {onnx.TensorProto.FLOAT16} and len(kinds) == 3
    count = sum(np.prod(w.scale.shape) for w in qgraph.unpack(full.path).values())
    assert full.ideal_bytes - half.ideal_bytes == 2 * count
    assert half.max_difference <= 1e-5 or half.flips
    assert any("float16" in note and "from the trained one" in note for note in half.notes)
    got = onnxruntime.InferenceSession(half.path).run(None, {"input": x.numpy()})[0]
    away = float((torch.from_numpy(got) - before).abs().max() / before.abs().max())
    assert 1e-6 < away < 2e-2
    for name, weight in qgraph.unpack(half.path).items():
        trained = qgraph.unpack(full.path)[name]
        assert weight.scale.dtype == np.float32
        assert np.array_equal(weight.scale, trained.scale.astype(np.float16).astype(np.float32))
        assert np.array_equal(weight.codes, trained.codes)


def test_tied_and_gathered_weights_and_a_frozen_model(tmp_path):
    x = torch.randint(0, 65, (2, 16))
    torch.manual_seed(0)
    prepared = qgraph.prepare(GPT(65, 64, 1), "W4@32", x).eval()
    for found in (prepared, qgraph.freeze(prepared)):
        report = qgraph.export(found, tmp_path / "gpt.onnx", (x,), scale_dtype="float16", optimize_for="size")
        assert report.max_difference <= 1e-5 and len(report.verified) == 6


def test_a_scale_that_float16_does_not_hold_is_an_error(tmp_path):
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.mul_(1e-9)
    with pytest.raises(ExportError, match=r"weight has a scale of .*float16 does not hold.*leave scale_dtype"):
        qgraph.export(qgraph.prepare(layer, "W4"), tmp_path / "a.onnx", (torch.randn(2, 8),), scale_dtype="float16")
    with pytest.raises(ExportError, match="scale_dtype='half'"):
        qgraph.export(qgraph.prepare(layer, "W4"), tmp_path / "a.onnx", (torch.randn(2, 8),), scale_dtype="half")
    assert not list(tmp_path.iterdir())
