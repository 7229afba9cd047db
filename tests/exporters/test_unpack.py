"""qgraph.unpack: what a file holds is what the model computes with; a damaged file is refused, at no cost."""

from __future__ import annotations

import random

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import qgraph
from qgraph.modules import collecting
from tests.models import Recurrent

CONFIGS = ["W1", "W1.58", "W3", "W8@32", "W4@tensor", "W1-2:4", "W4-4:8@32", "W2-70%", "W1-95%", "-2:4", "A4W2"]


class Every(nn.Module):
    """A layer of each kind: channels along 0 and along 1, looked up, multiplied, convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(33, 36)
        self.conv = nn.Conv1d(36, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 36, 3, padding=1)
        self.head = nn.Linear(36, 33, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.conv(self.emb(ids).transpose(1, 2)).relu()).transpose(1, 2))


def exported(config, path, target="ort"):
    torch.manual_seed(0)
    ids = torch.randint(0, 33, (2, 9))
    prepared = qgraph.prepare(Every(), config, ids).eval()
    report = qgraph.export(prepared, path, (ids,), target=target, verify=False, progress=False)
    with collecting() as collected, torch.no_grad():
        prepared(ids)
    return report, collected


@pytest.mark.parametrize("target", ["ort", "standard"])
@pytest.mark.parametrize("config", CONFIGS)
def test_codes_scales_masks_and_weights_come_back(config, target, tmp_path):
    report, collected = exported(config, tmp_path / "m.onnx", target)
    found = qgraph.unpack(tmp_path / "m.onnx")
    assert set(found) == set(collected.weights) and len(found) >= 3
    for name, compact in collected.weights.items():
        quantized = compact.expand()
        own = found[name]
        assert np.array_equal(own.weight, quantized.dequantize().numpy())
        assert (own.codes is None) == (quantized.codes is None)
        if quantized.codes is not None:
            assert np.array_equal(own.codes, quantized.codes.numpy())
            assert np.array_equal(own.scale, quantized.scale.numpy())
        assert (own.zero_point is None) == (quantized.zero_point is None)
        assert (own.mask is not None) == quantized.sparse
        assert own.spec == quantized.spec and own.groups == quantized.groups
    stored = {layer.format for layer in report.layers if layer.op != "activation"}  # which the tied head has by itself
    assert stored == {weight.format for weight in found.values()}


def test_recurrent_weights(tmp_path):
    ids = torch.randint(0, 20, (2, 7))
    prepared = qgraph.prepare(Recurrent(), "W3", ids).eval()
    qgraph.export(prepared, tmp_path / "r.onnx", (ids,), verify=False, progress=False)
    found = qgraph.unpack(tmp_path / "r.onnx")
    shapes = {name: tuple(p.shape) for name, p in prepared.named_parameters()}
    assert len(found) > 6 and all(found[name].weight.shape == shapes[name] for name in found)


def test_not_ours(tmp_path):
    torch.onnx.export(nn.Linear(3, 2), (torch.randn(1, 3),), tmp_path / "f.onnx", dynamo=True, verbose=False)
    with pytest.raises(qgraph.InspectError, match=r"written by qgraph\.export"):
        qgraph.unpack(tmp_path / "f.onnx")
    with pytest.raises(FileNotFoundError):
        qgraph.unpack(tmp_path / "none.onnx")


@pytest.mark.parametrize("config", ["W3", "A4W1-2:4", "W2-70%", "W1-95%"])
def test_damaged_files_are_refused_or_read(config, tmp_path):
    """500 mutations each: cut short, bits flipped, bytes put in, and sizes in the metadata changed."""
    exported(config, tmp_path / "m.onnx")
    assert refused((tmp_path / "m.onnx").read_bytes(), tmp_path / "broken.onnx", mutations=500) > 50


@pytest.mark.parametrize("target", ["ort", "standard"])
def test_damaged_files_of_stacked_weights_are_refused_or_read(target, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(24) for part in (nn.Linear(12, 12), nn.LayerNorm(12), nn.ReLU())))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 12)
    qgraph.export(qgraph.prepare(model, "A4W3", x).eval(), tmp_path / "m.onnx", x, target=target, progress=False)
    data = (tmp_path / "m.onnx").read_bytes()
    held = [entry.key for entry in onnx.load_from_string(data).metadata_props]
    assert b"stack0" in data and "qgraph.leftovers" not in held, "to be of use the file is one that is written small"
    assert refused(data, tmp_path / "broken.onnx", mutations=300) > 30


def refused(data: bytes, path, mutations: int) -> int:
    """How many mutations of a file are refused; the others are read, and into no more than a file can hold."""
    chance, count = random.Random(0), 0
    for _ in range(mutations):
        path.write_bytes(mutated(data, chance))
        try:
            found = qgraph.unpack(path)
            assert sum(weight.weight.nbytes for weight in found.values()) < 64 * 4 * len(data)
        except qgraph.InspectError:
            count += 1
    return count


def mutated(data: bytes, chance: random.Random) -> bytes:
    kind = chance.randrange(4)
    broken = bytearray(data)
    if kind == 0:
        return bytes(broken[: chance.randrange(len(broken))])
    if kind == 1:
        for _ in range(chance.randint(1, 20)):
            broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        place = chance.randrange(len(broken))
        broken[place:place] = chance.randbytes(chance.randint(1, 9))
    else:
        model = onnx.load_from_string(data)
        entry = next(item for item in model.metadata_props if item.key == "qgraph.layers")
        digits = [i for i, letter in enumerate(entry.value) if letter.isdigit()]
        place = chance.choice(digits)
        entry.value = entry.value[:place] + str(chance.randrange(10**12)) + entry.value[place + 1 :]
        return model.SerializeToString()
    return bytes(broken)


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        exported("A4W1-2:4", tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_verify_is_the_command_line_s_comparison(tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(0, 33, (2, 9))
    prepared = qgraph.prepare(Every(), "W4", ids).eval()
    qgraph.export(prepared, tmp_path / "m.onnx", (ids,), progress=False)
    assert qgraph.verify(tmp_path / "m.onnx", prepared, (ids,)).beyond == 0
    with torch.no_grad():
        prepared.conv.bias += 1.0
    assert qgraph.verify(tmp_path / "m.onnx", prepared, (ids,)).beyond > 0


def test_a_file_needs_no_qgraph(tmp_path):
    exported("W1", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"ids": np.zeros((1, 4), np.int64)})[0].shape == (1, 4, 33)
