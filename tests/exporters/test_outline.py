"""Repeated steps as functions: only where a file would else be mostly nodes, and then it computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import qgraph


def stack(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(72, 72), nn.GELU())))


@pytest.mark.parametrize("config", ["A4W1", "A4W1-2:4", "W3"])
def test_many_small_layers_are_written_as_calls_and_run_as_before(config, tmp_path, monkeypatch):
    x = torch.randn(3, 72)
    prepared = qgraph.prepare(stack(16), config, x).eval()
    path, plain = tmp_path / "calls.onnx", tmp_path / "plain.onnx"
    report = qgraph.export(prepared, path, (x,), progress=False)
    monkeypatch.setattr("qgraph.exporters.onnx.NODE_BYTES", 10**9)
    qgraph.export(prepared, plain, (x,), progress=False)
    model = onnx.load(path)
    assert len(model.functions) >= 1 and not onnx.load(plain).functions
    assert path.stat().st_size < plain.stat().st_size
    assert report.max_difference < 1e-5
    onnx.checker.check_model(model)
    outputs = [
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})[0]
        for file in (path, plain)
    ]
    assert np.array_equal(*outputs)


def test_a_standard_file_stays_plain(tmp_path):
    x = torch.randn(3, 72)
    prepared = qgraph.prepare(stack(16), "A4W1", x).eval()
    path = tmp_path / "standard.onnx"
    qgraph.export(prepared, path, (x,), target="standard", progress=False)
    model = onnx.load(path)
    assert not model.functions and {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
