"""The choice between onnxruntime's kernel and a float product."""

import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import ExportError
from qgraph.exporters.lowering import speeds
from qgraph.exporters.lowering.options import Options

KERNEL, FLOAT = "MatMulNBits", "unpacked"


@pytest.fixture
def table(monkeypatch):
    """A kernel that is faster up to 8 rows."""
    rows = [{"weights": 4096, "rows": n, "kernel": 2.0 if n < 16 else 0.5, "plain": 1.0} for n in (1, 8, 16, 64, 256)]
    monkeypatch.setattr(speeds, "_tables", lambda: [{speeds.key_of(4, False, True): rows}])


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
        ((4, 64), None, KERNEL),
        ((4, 5, 64), None, FLOAT),
    ],
)
def test_the_faster_form_is_taken_where_speed_is_asked_for(shape, purpose, form, table, tmp_path):
    layer = exported(tmp_path, shape, optimize_for=purpose)
    assert layer.form.startswith(form)
    says = " ".join(layer.notes)
    assert ("slower than a float product" in says) == (form == FLOAT)
    assert ("faster than a float product" in says) == (form == KERNEL and purpose != "size")


@pytest.mark.parametrize("dynamic", [True, False])
def test_what_is_not_known_is_taken_for_slower(dynamic, table, tmp_path, monkeypatch):
    """Fewer weights than were measured; rows that the graph does not tell."""
    if dynamic:
        monkeypatch.setattr(Options, "rows", lambda self, x: None)
        layer = exported(tmp_path, (4, 64))
        assert "at 256 rows" in layer.notes[0]
    else:
        rows = [{"weights": 4097, "rows": 1, "kernel": 2.0, "plain": 1.0}]
        monkeypatch.setattr(speeds, "_tables", lambda: [{speeds.key_of(4, False, True): rows}])
        layer = exported(tmp_path, (1, 64))
        assert "was not measured" in layer.notes[0]
    assert layer.form.startswith(FLOAT)


FASTEST = [
    ("W4", 64, 1024, FLOAT),
    ("W4", 1, 1024, KERNEL),
    ("W4", 1, 512, FLOAT),
    ("A8W4@128", 64, 512, FLOAT),
    ("A8W4@128", 1, 512, KERNEL),
    ("A8W4", 64, 512, "MatMulInteger"),
    ("A4W1", 1, 512, "MatMulInteger"),
]


@pytest.mark.parametrize(("config", "rows", "width", "form"), FASTEST)
def test_left_out_it_is_the_fastest_form_at_the_example(config, rows, width, form, tmp_path):
    """By the package's own table."""
    torch.manual_seed(0)
    x = torch.randn(rows, width)
    prepared = qgraph.prepare(nn.Linear(width, width), config, x).eval()
    layers = [
        qgraph.export(prepared, tmp_path / "a.onnx", (x,), optimize_for=purpose, progress=False).layers[0]
        for purpose in (None, "latency", "size")
    ]
    assert layers[0].form == layers[1].form and layers[0].notes == layers[1].notes
    assert layers[0].form.startswith(form) and layers[0].notes
    assert layers[2].form.startswith(KERNEL)


def test_the_table_of_the_package_has_every_kernel():
    for bits, int8 in ((4, False), (2, True), (4, True), (8, True)):
        for zero_points in (False, True):
            found = speeds.speed(speeds.key_of(bits, int8, zero_points), 1, 1 << 20)
            assert found is not None and found.kernel > 0 and found.plain > 0
            assert speeds.speed(speeds.key_of(bits, int8, zero_points), 1, 1 << 14) is None
    assert speeds.speed("3-bit", 1, 1) is None


def test_the_processor_counts_where_the_kernel_does_worst(monkeypatch):
    def table(kernel, plain, weights=4096):
        return {speeds.key_of(4, False, True): [{"weights": weights, "rows": 1, "kernel": kernel, "plain": plain}]}

    monkeypatch.setattr(speeds, "_tables", lambda: [table(1.5, 1.0), table(0.9, 1.0), table(0.1, 1.0, weights=8192)])
    assert speeds.speed(speeds.key_of(4, False, True), 1, 4096) == (0.9, 1.0)
    assert speeds.speed(speeds.key_of(4, False, True), 1, 8192) == (0.1, 1.0)


def test_a_purpose_that_is_none(tmp_path):
    with pytest.raises(ExportError, match="optimize_for='speed'; expected one of 'latency'"):
        exported(tmp_path, (2, 64), optimize_for="speed")
