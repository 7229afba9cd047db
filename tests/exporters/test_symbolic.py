"""Calls with a dynamic size among their arguments: the size stays dynamic, and the file computes what torch does."""

from __future__ import annotations

import math
import re

import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraph
from qgraph.errors import ExportError

SIZES = {  # of (rows, n, 6) and whole numbers: what takes the size n
    "remainder": lambda y, i, n: i % n,
    "power": lambda y, i, n: (y.abs() + 1) ** (n - 5),
    "linspace": lambda y, i, n: y[..., 0] + torch.linspace(-1, 1, n),
    "linspace in another dtype": lambda y, i, n: (
        torch.linspace(0, n, steps=n * 2, dtype=torch.float64)[None] + i[:, :1]
    ),
    "one_hot": lambda y, i, n: F.one_hot(i % n, n) @ torch.arange(n),
    "roll": lambda y, i, n: y.roll(n // 2, 1),
    "roll two ways": lambda y, i, n: torch.roll(y, (-(n // 2), 1), (1, -1)),
    "mean over all": lambda y, i, n: F.avg_pool1d(y.mT, n),
    "mean over a plane": lambda y, i, n: F.avg_pool2d(y[:, None], (n, y.size(2)), stride=(n, 6)),
    "max over all": lambda y, i, n: F.max_pool1d(y.mT, kernel_size=n, stride=n),
    "max over a plane": lambda y, i, n: F.max_pool2d(y[:, None], y.shape[1:]),
    "rounded up": lambda y, i, n: y.new_zeros(2, -(-n // 4)) + i.sum(),
    "padded to a multiple": lambda y, i, n: F.pad(y, (0, 0, 0, -n % 4)),
    "a negative floor": lambda y, i, n: y[:, (3 - n) // 2 :],
}


class Sized(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.fc, self.name = nn.Linear(6, 6), name

    def forward(self, x, i):
        y = self.fc(x)
        return y, SIZES[self.name](y, i, x.shape[1])


@pytest.mark.parametrize("name", SIZES)
def test_a_call_with_a_dynamic_size_among_its_arguments(name, tmp_path):
    args = torch.randn(2, 7, 6), torch.randint(0, 50, (2, 4))
    prepared = qgraph.prepare(Sized(name), "W4", args).eval()
    report = qgraph.export(prepared, tmp_path / "m.onnx", args, dynamic_shapes={"x": {1: "n"}}, progress=False)
    assert report.dynamic == ("x: 1=n",)
    for n in (6, 9, 16):
        x = torch.randn(2, n, 6)
        for want, got in zip(prepared(x, args[1]), _run(tmp_path / "m.onnx", x, args[1]), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want.detach(), rtol=1e-5, atol=1e-5)


def _run(path, *inputs):
    session = ort.InferenceSession(str(path))
    known = dict(zip(("x", "i"), inputs, strict=True))
    return session.run(None, {i.name: known[i.name].numpy() for i in session.get_inputs()})


def _added(y, i, n):
    parts = y.flatten(0, 1)
    same = parts.view(2, int(parts.shape[0] / 2), 6)
    return same + y  # where the size becomes a constant


DECISIONS = {  # what another size decides otherwise, each in a line of its own
    "branch": lambda y, i, n: y * 2 if n > 10 else y,
    "rounded branch": lambda y, i, n: y * 2 if math.ceil(n / 4) > 2 else y,
    "loop": lambda y, i, n: sum(y[:, row] for row in range(n // 3)),
    "int of a quotient": lambda y, i, n: y[:, : int(n * 0.5)],
    "view by int, added": _added,
    "view by int": lambda y, i, n: y.flatten(0, 1).view(2, int(y.flatten(0, 1).shape[0] / 2), 6),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_a_file_that_holds_for_one_size_alone_is_refused_with_the_line_that_decides(name, monkeypatch, tmp_path):
    monkeypatch.setitem(SIZES, name, DECISIONS[name])
    args = torch.randn(2, 7, 6), torch.randint(0, 50, (2, 4))
    prepared = qgraph.prepare(Sized(name), "W4", args).eval()
    line = DECISIONS[name].__code__.co_firstlineno + (2 if name.endswith("added") else 0)
    with pytest.raises(ExportError, match=rf"{re.escape(__file__)}:{line} \(in"):
        qgraph.export(prepared, tmp_path / "m.onnx", args, dynamic_shapes={"x": {1: "n"}}, progress=False)
    assert not list(tmp_path.iterdir())
