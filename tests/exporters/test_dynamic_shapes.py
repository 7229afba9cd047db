"""Which sizes of a file are dynamic, as found and as asked for."""

from __future__ import annotations

import re

import onnx
import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import ExportError
from qgraph.exporters.onnx import export
from tests.exporters.running import TOLERANCE, differ, run
from tests.models import CNN, GPT


def test_a_batch_of_one_is_dynamic_all_the_same(tmp_path):
    net = qgraph.prepare(CNN(), "W4", (torch.randn(1, 3, 16, 16),)).eval()
    report = export(net, tmp_path / "m.onnx", (torch.randn(1, 3, 16, 16),))
    assert report.dynamic == ("x: 0=batch",)
    x = torch.randn(6, 3, 16, 16)
    assert differ(net(x), run(tmp_path / "m.onnx", x=x)[0]) < TOLERANCE


class Loop(nn.Module):
    """Its length decides how often Python goes round, so a file has one length."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(8, 8)

    def forward(self, x):
        h = torch.zeros_like(x[:, 0])
        for i in range(x.shape[1]):
            h = self.cell(x[:, i], h)
        return h


def test_a_size_that_is_a_constant_is_reported_as_one(tmp_path):
    x = torch.randn(2, 4, 8)
    net = qgraph.prepare(Loop(), "W4", (x,)).eval()
    report = export(net, tmp_path / "m.onnx", (x,))
    assert report.dynamic == ("x: 0=batch",)
    line = Loop.forward.__code__.co_firstlineno + 2
    made = f"dimension 1 of x is made the constant 4 by {__file__}:{line} (in forward)"
    assert f"not dynamic: x: 0=batch, 1=sequence ({made})" in report.notes
    x = torch.randn(5, 4, 8)
    assert differ(net(x), run(tmp_path / "m.onnx", x=x)[0]) < TOLERANCE
    with pytest.raises(ExportError, match=re.escape(made)):
        export(net, tmp_path / "m.onnx", (x,), dynamic_shapes={"x": {1: "time"}})


@pytest.mark.parametrize(
    "shapes",
    [
        {"ids": {0: "rows", 1: "time"}},
        ({0: torch.export.Dim("rows", min=1, max=64), 1: torch.export.Dim("time", min=2, max=32)},),
        ({0: torch.export.Dim.DYNAMIC},),
        {},
    ],
    ids=["names", "dims", "dynamic", "static"],
)
def test_dynamic_shapes_as_given(shapes, tmp_path):
    ids = torch.randint(0, 33, (2, 7))
    net = qgraph.prepare(GPT(), "W4", (ids,)).eval()
    report = export(net, tmp_path / "m.onnx", (ids,), dynamic_shapes=shapes)
    count = len(next(iter(shapes.values()))) if isinstance(shapes, dict) and shapes else len(shapes and shapes[0])
    dims = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim
    assert sum(bool(dim.dim_param) for dim in dims) == count
    assert len(report.verified) == (8 if count else 4)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [({"idz": {0: "b"}}, "'idz'"), ({"ids": {5: "b"}}, "dimension 5"), ([None, None], "2 entries")],
)
def test_dynamic_shapes_that_do_not_fit(shapes, message, tmp_path):
    ids = torch.randint(0, 33, (2, 7))
    net = qgraph.prepare(GPT(), "W4", (ids,))
    with pytest.raises(ExportError, match=message):
        export(net, tmp_path / "m.onnx", (ids,), dynamic_shapes=shapes)


class Counted(nn.Module):
    def forward(self, x):
        return x * 2, {"lengths": [x.shape[1]]}


class Halves(nn.Module):
    """A size inside a child's result: a captured graph checks it, torch.export has it as a symbol."""

    def __init__(self):
        super().__init__()
        self.counted, self.fc = Counted(), nn.Linear(8, 4)

    def forward(self, x):
        y, counts = self.counted(x)
        half = counts["lengths"][0] // 2
        return self.fc(torch.cat([y[:, :half].mean(1), y[:, half:].mean(1)], -1))


def test_where_a_graph_holds_for_one_size_the_python_is_traced(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4)
    net = qgraph.prepare(Halves(), "W4", (x,)).eval()
    report = export(net, tmp_path / "m.onnx", (x,))
    assert report.dynamic == ("x: 0=batch, 1=sequence",) and "traced as Python" in " ".join(report.notes)
    x = torch.randn(5, 12, 4)
    assert differ(net(x), run(tmp_path / "m.onnx", x=x)[0]) < TOLERANCE


class RowByRow(nn.Module):
    """Python goes over the batch, so a file has one batch size; the sequence stays dynamic."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return torch.stack([self.fc(row) for row in x])


def test_a_batch_that_is_a_constant_leaves_the_sequence_dynamic(tmp_path):
    x = torch.randn(2, 6, 4)
    net = qgraph.prepare(RowByRow(), "W4", (x,)).eval()
    report = export(net, tmp_path / "m.onnx", (x,))
    assert report.dynamic == ("x: 1=sequence",)
    x = torch.randn(2, 11, 4)
    assert differ(net(x), run(tmp_path / "m.onnx", x=x)[0]) < TOLERANCE


class Patches(nn.Module):
    """Position embeddings of another number of patches are interpolated; one pixel more makes none."""

    def __init__(self):
        super().__init__()
        self.cut, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 2)
        self.places = nn.Parameter(torch.randn(1, 8, 4, 4))

    def forward(self, image):
        x = self.cut(image)
        places = self.places
        if x.shape[2] * x.shape[3] != 16:
            places = nn.functional.interpolate(places, size=x.shape[2:], mode="bilinear")
        return self.head((x + places).flatten(2).transpose(1, 2)).mean(1)


def test_sizes_that_were_asked_for_are_traced_where_the_example_takes_a_branch_of_its_own(tmp_path):
    torch.manual_seed(0)
    image = torch.randn(2, 3, 16, 16)
    prepared = qgraph.prepare(Patches(), "W4", (image,)).eval()
    shapes = {"image": {2: "height", 3: "width"}}
    report = qgraph.export(prepared, tmp_path / "m.onnx", (image,), dynamic_shapes=shapes, progress=False)
    assert any("twice the sizes" in run for run in report.verified)
    for height, width in ((16, 16), (32, 32), (24, 40)):
        other = torch.randn(2, 3, height, width)
        (found,) = run(tmp_path / "m.onnx", image=other)
        torch.testing.assert_close(torch.from_numpy(found), prepared(other).detach(), atol=1e-5, rtol=1e-4)


class Special(nn.Module):
    """At the sizes of the example something else is computed: no file can do both."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = self.head(x)
        return 2 * h if x.shape[1] // 8 == 1 else h


def test_sizes_that_were_asked_for_are_checked_at_twice_the_example_too(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4)
    prepared = qgraph.prepare(Special(), "W4", (x,)).eval()
    decides = f"{__file__}:{Special.forward.__code__.co_firstlineno + 2} (in forward) decides by a size"
    with pytest.raises(ExportError, match=re.escape(decides)) as raised:
        qgraph.export(prepared, tmp_path / "m.onnx", (x,), dynamic_shapes={"x": {1: "length"}}, progress=False)
    assert "on twice the sizes" in str(raised.value.__cause__)
    assert not list(tmp_path.iterdir())
