"""`monitor`: its numbers against their definitions, where they go, and that the model is left alone."""

from __future__ import annotations

import copy
import csv
import json
import math

import pytest
import torch
from torch import nn

import qgraph
from qgraph.analysis.readings import NUMBERS
from qgraph.errors import ConfigError, InspectError
from qgraph.ops import quantize
from qgraph.ops.codes import outside, step_and_offset
from tests.models import CASES, CNN


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def net(config="W2", **rules):
    return qgraph.prepare(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 5)), config, torch.randn(2, 24))


def trained(prepared, steps, rate=0.05, run=None, **options):
    """A watched training; the codes of each step as they were when it was counted."""
    optimizer = torch.optim.SGD(prepared.parameters(), rate)
    x, y = torch.randn(16, 24), torch.randn(16, 5)
    codes = []
    with qgraph.monitor(prepared, **options) as watch:
        for _ in range(steps):
            ((run or prepared)(x) - y).square().mean().backward()
            codes.append(quantize(prepared[0].weight, *spec_of(prepared), step=prepared[0].qgraph["weight"].step).codes)
            watch.step()
            optimizer.step()
            optimizer.zero_grad()
    return watch, codes


def spec_of(prepared):
    quantizer = prepared[0].qgraph["weight"]
    return quantizer.spec, quantizer.groups


def test_numbers_are_those_of_their_definitions():
    prepared = net("W3")
    readings = []
    watch, codes = trained(prepared, 10, rate=0.5, every=4, callback=lambda step, found: readings.append((step, found)))
    assert [step for step, _ in readings] == [2, 6] and watch.summary().measurements == 2
    for step, (reading, _) in readings:
        first, second, third = codes[step - 2 : step + 1]
        assert reading.site == "0.weight" and reading.path == "0" and reading.step == step
        assert reading.flips == pytest.approx(float((first != second).double().mean()))
        assert reading.returned == pytest.approx(float(((first != second) & (third == first)).double().mean()))
        shares = torch.bincount(third.flatten().int(), minlength=8).double() / third.numel()
        assert reading.usage == pytest.approx(math.exp(-sum(float(p) * math.log(p) for p in shares if p)) / 8)
        assert reading.dead == 0 and reading.problem is None
    assert any(reading.flips > 0 for _, (reading, _) in readings)
    assert readings[0][1][0].drift is None and readings[1][1][0].drift > 0


MINMAX = [
    qgraph.QuantSpec(1, scale="minmax"),
    qgraph.QuantSpec(1.58),
    qgraph.QuantSpec(2, granularity="block", group_size=8, scale="minmax"),
    qgraph.QuantSpec(4),
    qgraph.QuantSpec(4, granularity="tensor"),
    qgraph.QuantSpec(8),
]
WINDOWED = [qgraph.QuantSpec(bits, scheme, scale="windowed") for bits in (1, 2) for scheme in ("affine", "linear")]
CONFIGS = [
    *(qgraph.QConfig(weight=spec) for spec in (*MINMAX, *WINDOWED)),
    *(qgraph.QConfig.parse(text) for text in ("W1", "W2-2:4", "W1-50%", "A4W1-2:4@16")),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_straight_through_gradient_comes_out_of_the_closed_form_one(config):
    # Rows of 256 values: some of each lie outside the window on both sides, so that every group tells.
    prepared = qgraph.prepare(nn.Sequential(nn.Linear(256, 16), nn.Tanh(), nn.Linear(16, 2, bias=False)), config)
    prepared[0].weight.data.normal_()
    site = prepared[0].qgraph["weight"]
    seen = []

    def keep(module, args, output):
        output.register_hook(lambda h: seen.append(h.double()))

    site.register_forward_hook(keep)
    watch = qgraph.monitor(prepared, every=3, match="0*")
    for _ in range(3):
        prepared.zero_grad()
        prepared(torch.randn(16, 256)).square().mean().backward()
        watch.step()
    (reading,) = watch.summary().readings
    weight = prepared[0].weight.detach()
    g, h = prepared[0].weight.grad.double(), seen[-1]
    if site.spec.scale == "windowed":
        (piece,) = site.groups.pieces(weight)
        step, offset = step_and_offset(piece, site.spec, False)
        far = outside((piece - (0 if offset is None else offset)) / step, site.spec)
        assert far.any(-1).all()
        h = h.masked_fill(far.reshape(h.shape), 0.0)
    beyond, straight = float((g - h).norm()), float(h.norm())
    # h is g divided by regression slopes near 1: a few float32 roundings, relative to both norms
    assert reading.corrective == pytest.approx(beyond / (beyond + straight), abs=1e-4)
    assert reading.corrective > 0


def test_other_methods_have_no_corrective_path():
    for spec in (qgraph.QuantSpec(2, method="ste"), qgraph.QuantSpec(2, method="lsq")):
        watch, _ = trained(net(qgraph.QConfig(weight=spec)), 3, every=3)
        assert [reading.corrective for reading in watch.summary().readings] == [None, None]


def test_what_is_not_measured_costs_nothing_and_the_model_is_left_alone(monkeypatch):
    torch.manual_seed(1)
    plain, watched = net("A4W2-2:4"), None
    watched = copy.deepcopy(plain)
    calls = []
    monkeypatch.setattr("qgraph.analysis.monitor.Monitor._operands", lambda *a, **k: calls.append(1) or [])
    trained(copy.deepcopy(plain), 25, every=10)
    assert len(calls) == 3 + 3 + 3
    monkeypatch.undo()
    torch.manual_seed(2)
    trained(watched, 6, every=3)
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05)
    x, y = torch.randn(16, 24), torch.randn(16, 5)
    for _ in range(6):
        (plain(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert not any(module._forward_hooks for module in watched.modules())


def test_evaluations_between_steps_and_compiled_models_are_no_matter():
    prepared, x = net("W2"), torch.randn(4, 24)
    compiled = torch.compile(prepared, backend="eager")

    def run(inputs):
        with torch.no_grad():
            compiled(x)
        return compiled(inputs)

    torch.manual_seed(3)
    state = copy.deepcopy(prepared)
    watch, _ = trained(prepared, 3, run=run, every=3)
    torch.manual_seed(3)
    plain = trained(state, 3, every=3)[0].summary().readings
    for reading, other in zip(watch.summary().readings, plain, strict=True):
        # compiled code sums in another order
        assert reading.numbers() == pytest.approx(other.numbers(), rel=1e-4) and reading.site == other.site
    assert qgraph.monitor(compiled).summary().readings == ()


def test_a_csv_file_a_writer_and_data(tmp_path):
    class Writer:
        def __init__(self):
            self.rows = []

        def add_scalar(self, name, value, step):
            self.rows.append((name, value, step))

    writer, path = Writer(), tmp_path / "weights.csv"
    watch, _ = trained(net(), 6, every=3, csv=path, writer=writer)
    trained(net(), 3, every=3, csv=path, first_step=6)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["site"]) for row in rows] == [
        (step, site) for step in ("2", "5", "8") for site in ("0.weight", "2.weight")
    ]
    assert set(NUMBERS) < set(rows[0]) and rows[0]["drift"] == "" and float(rows[2]["usage"]) > 0
    assert ("qgraph/0.weight/flips", float, 5) in [(name, type(value), step) for name, value, step in writer.rows]
    data = json.loads(json.dumps(watch.summary().to_dict(), allow_nan=False))
    assert data["measurements"] == 2 and [w["site"] for w in data["weights"]] == ["0.weight", "2.weight"]
    text = str(watch.summary())
    assert "2 measurements, the last at step 5" in text and "all is well" in text


def test_a_match_and_switched_off_layers():
    prepared = net()
    watch, _ = trained(prepared, 3, every=3, match="2*")
    assert [reading.site for reading in watch.summary().readings] == ["2.weight"]
    qgraph.set_enabled(prepared, False, "2*")
    watch, _ = trained(prepared, 3, every=3)
    assert [reading.site for reading in watch.summary().readings] == ["0.weight"]


@pytest.mark.parametrize("name", ["parametrized", "cross_attention"])
def test_weights_that_a_forward_computes(name):
    case = CASES[name]
    inputs = case.inputs(0)
    prepared = qgraph.prepare(case.make(), "W2", inputs)
    watch = qgraph.monitor(prepared, every=3)
    for _ in range(3):
        watch.step()
    readings = watch.summary().readings
    assert any("derived" in reading.site for reading in readings)
    assert all(math.isfinite(reading.snr_db) and reading.flips == 0 for reading in readings)


def test_bits_that_a_schedule_changes_are_no_drift():
    prepared = net("W4")
    bits = qgraph.ProgressiveBits(prepared, {0: 8, 4: 3})
    readings = []
    watch = qgraph.monitor(prepared, every=3, match="0*", callback=lambda step, found: readings.extend(found))
    for _ in range(9):
        watch.step()
        bits.step()
    assert [reading.spec.split("-")[0] for reading in readings] == ["8", "3", "3"]
    assert [reading.drift for reading in readings] == [None, None, 0.0]
    assert [reading.flips for reading in readings] == [0.0, None, 0.0]


def test_oscillation_is_seen():
    prepared = net("W4")
    watch = qgraph.monitor(prepared, every=3)
    for sign in (1, -1, 1):
        with torch.no_grad():
            prepared[0].weight.add_(sign * 0.02 * torch.randn(32, 24, generator=torch.Generator().manual_seed(0)))
        watch.step()
    found = watch.summary()
    assert found.worst.kind == "oscillation" and found.worst.site == "0.weight"
    assert "lower the learning rate" in str(found) and "try:" in str(found)


def test_wrong_use_is_said(tmp_path):
    prepared = net()
    with pytest.raises(InspectError, match="Sequential is not prepared"):
        qgraph.monitor(nn.Sequential())
    with pytest.raises(InspectError, match="int is not prepared"):
        qgraph.monitor(3)
    for every in (2, 10.0, True):
        with pytest.raises(ConfigError, match="every is a whole number of at least 3"):
            qgraph.monitor(prepared, every=every)
    with pytest.raises(InspectError, match="without add_scalar"):
        qgraph.monitor(prepared, writer=open)
    with pytest.raises(InspectError, match="callback is a list"):
        qgraph.monitor(prepared, callback=[])
    with pytest.raises(ConfigError, match=r"no quantized weight matches 'blocks\*'; there are 0\.weight, 2\.weight"):
        qgraph.monitor(prepared, match="blocks*").step()
    with pytest.raises(InspectError, match="no quantized weight"):
        qgraph.monitor(net("A8")).step()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InspectError, match=r"other\.csv holds another table, its columns are a, b"):
        qgraph.monitor(prepared, csv=tmp_path / "other.csv")
    watch = qgraph.monitor(prepared)
    watch.close()
    with pytest.raises(InspectError, match="after close"):
        watch.step()
    assert "no measurement yet" in str(watch.summary())


def test_a_model_that_captures_at_its_first_call():
    prepared = qgraph.prepare(CNN(), "W2")
    watch = qgraph.monitor(prepared, every=3)
    for _ in range(3):
        prepared(torch.randn(4, 3, 16, 16)).sum().backward()
        watch.step()
    assert len(watch.summary().readings) == 3
