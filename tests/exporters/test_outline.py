"""Repeated modules as functions: only where a file would else be mostly nodes, and then it computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import qgraph
from tests.models import GPT


def stack(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(72, 72), nn.GELU())))


@pytest.mark.parametrize("config", ["A4W1-2:4", "W3"])
def test_many_small_layers_are_written_as_calls_and_run_as_before(config, tmp_path, monkeypatch):
    x = torch.randn(3, 72)
    prepared = qgraph.prepare(stack(24), config, x).eval()
    path, plain = tmp_path / "calls.onnx", tmp_path / "plain.onnx"
    report = qgraph.export(prepared, path, (x,), optimize_for="size", progress=False)  # kernels have more nodes
    monkeypatch.setattr("qgraph.exporters.onnx.NODE_BYTES", 10**9)
    qgraph.export(prepared, plain, (x,), optimize_for="size", progress=False)
    model = onnx.load(path)
    assert model.functions and not onnx.load(plain).functions
    assert {f"{i}" for i in range(0, 48, 2)} <= {node.name for node in model.graph.node}
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


@pytest.mark.parametrize(
    ("config", "target"), [("W3", "ort"), ("W4-70%", "standard"), ("A8W4@128", "ort"), ("A4W1-2:4", "standard")]
)
def test_a_file_is_its_content_and_sixteen_kilobytes(config, target, tmp_path):
    x = torch.randint(0, 65, (2, 16))
    torch.manual_seed(0)
    prepared = qgraph.prepare(GPT(65, 128, 2), config, x).eval()
    report = qgraph.export(prepared, tmp_path / "gpt.onnx", (x,), target=target, verify=False, progress=False)
    assert report.file_bytes <= 1.02 * report.ideal_bytes + 16 * 1024


def test_equal_blocks_are_one_function_and_so_is_a_quantizer_inside_it(tmp_path):
    x = torch.randint(0, 65, (2, 16))
    torch.manual_seed(0)
    prepared = qgraph.prepare(GPT(65, 128, 4), "A4W1-2:4", x).eval()
    report = qgraph.export(prepared, tmp_path / "gpt.onnx", (x,), progress=False)
    assert report.max_difference < 1e-4 and len(report.verified) == 6
    assert report.file_bytes <= 1.02 * report.ideal_bytes + 16 * 1024
    model = onnx.load(tmp_path / "gpt.onnx")
    called = {node.op_type for node in model.graph.node if node.name.startswith("blocks.")}
    inside = {node.op_type for function in model.functions for node in function.node if node.domain == "model"}
    assert {f"blocks.{i}" for i in range(4)} <= {node.name for node in model.graph.node}
    assert called & {function.name for function in model.functions} and inside
