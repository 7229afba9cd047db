"""The choice between onnxruntime's kernel and a float product."""

import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import ExportError
from qgraph.exporters.lowering import speeds

KERNEL, FLOAT = "MatMulNBits", "unpacked"


@pytest.fixture
def table(monkeypatch):
    """A kernel that is faster up to 8 rows."""
    rows = [{"weights": 4096, "rows": n, "kernel": 2.0 if n < 16 else 0.5, "plain": 1.0} for n in (1, 8, 16, 64, 256)]
    monkeypatch.setattr(speeds, "_table", lambda: {speeds.key_of(4, False, True): rows})


def exported(tmp_path, shape, **options):
    torch.manual_seed(0)
    x = torch.randn(shape)
    prepared = qgraph.prepare(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), "W4", x).eval()
    report = qgraph.export(prepared, tmp_path / "a.onnx", (x,), **options)
    assert report.max_difference < 1e-5
    return report.layers[0]


@pytest.mark.parametrize(
    ("shape", "purpose", "form"),
    [
        ((4, 64), "latency", KERNEL),
        ((4, 5, 64), "latency", FLOAT),  # 20 rows
        ((4, 64), "throughput", FLOAT),
        ((4, 5, 64), "size", KERNEL),
        ((4, 5, 64), None, KERNEL),
    ],
)
def test_the_faster_form_is_taken_where_speed_is_asked_for(shape, purpose, form, table, tmp_path):
    layer = exported(tmp_path, shape, optimize_for=purpose)
    assert layer.form.startswith(form)
    says = "slower than a float product" in " ".join(layer.notes)
    assert says == (form == FLOAT or purpose is None)


def test_the_table_of_the_package_has_every_kernel():
    for bits, int8 in ((4, False), (2, True), (4, True), (8, True)):
        for zero_points in (False, True):
            found = speeds.speed(speeds.key_of(bits, int8, zero_points), 1, 1 << 20)
            assert found is not None and found.kernel > 0 and found.plain > 0
    assert speeds.speed("3-bit", 1, 1) is None


def test_a_purpose_that_is_none(tmp_path):
    with pytest.raises(ExportError, match="optimize_for='speed'; expected one of 'latency'"):
        exported(tmp_path, (2, 64), optimize_for="speed")
