"""Static activation ranges: filled by `calibrate`, kept in training, carried along with the model."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import qgraph
from qgraph import CalibrationError, QConfig, QuantSpec

STATIC = "A8sW7"


class Net(nn.Module):
    """A convolution, a batch norm, a Linear, and a product in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 16, 8)
        self.w = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().flatten(1)) @ self.w


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 2, 6, 6, generator=generator) * (i + 1) for i in range(count)]


def prepared(example: bool = True, config: str | QConfig = STATIC) -> nn.Module:
    torch.manual_seed(0)
    return qgraph.prepare(Net(), config, (batches()[0],) if example else None)


@pytest.mark.parametrize("example", [True, False])
def test_minmax_finds_the_extremes_of_what_each_quantizer_is_given(example):
    model = prepared(example)
    found = qgraph.calibrate(model, batches())
    data = torch.cat(batches())
    assert found["conv.input"] == (float(data.min()), float(data.max()))
    assert found["fc.input"][0] == 0  # behind a relu
    assert set(found) == {"conv.input", "fc.input", "w.input"}
    assert model.training  # as it was
    model.eval()(data)


def test_average_is_what_training_keeps():
    trained, calibrated = prepared(), prepared()
    trained.train()
    for x in batches():
        trained(x)
    found = qgraph.calibrate(calibrated, iter(batches()), method="average")
    range = trained.conv.qgraph.input.range
    assert found["conv.input"] == pytest.approx((float(range.low), float(range.high)), rel=1e-6)
    assert int(range.batches) == int(calibrated.conv.qgraph.input.range.batches) == 4
    trained.eval()(batches()[0])  # no calibration needed


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_an_outlier_is_cut_off(method):
    model = prepared(config="A4s")
    data = torch.randn(300, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    data[0, 0, 0, 0] = 12
    low, high = qgraph.calibrate(model, [data], method=method, percentile=99)["conv.input"]
    assert high < 9 and low < -1.5
    if method == "percentile":
        q = torch.sort(data.flatten()).values
        assert high == pytest.approx(float(q[-216]), abs=0.01)  # 1 % of 21600 values lie above


def test_mse_is_the_best_of_the_shrunken_ranges():
    torch.manual_seed(0)
    x = torch.randn(4096, 4)
    model = qgraph.prepare(nn.Linear(4, 2), "A4s", (x,))
    low, high = qgraph.calibrate(model, [x], method="mse")["input"]

    def error(share: float) -> float:
        model.qgraph.input.range.set(share * float(x.min()), share * float(x.max()), 1.0, 1)
        step, zero = model.qgraph.input.range.scale()
        levels = ((x / step).round() + zero).clamp(0, 15) - zero
        return float(((levels * step - x) ** 2).mean())

    best = min(error(i / 100) for i in range(1, 101))
    assert error(high / float(x.max())) <= best * 1.01


def test_gain_of_the_denoising_transform_is_its_regression():
    torch.manual_seed(0)
    x = torch.randn(512, 4)
    model = qgraph.prepare(nn.Linear(4, 2), "A3s", (x,))
    qgraph.calibrate(model, [x])
    by_histogram = float(model.qgraph.input.range.gain)
    fresh = qgraph.prepare(nn.Linear(4, 2), "A3s", (x,))
    fresh.train()(x)
    assert by_histogram == pytest.approx(float(fresh.qgraph.input.range.gain), abs=1e-3)


def test_running_average_keeps_on_from_a_calibration():
    model = prepared()
    qgraph.calibrate(model, batches(2))
    before = float(model.conv.qgraph.input.range.high)
    model.train()(torch.full((3, 2, 6, 6), 30.0))
    assert float(model.conv.qgraph.input.range.high) == pytest.approx(before + (30 - before) / 3, rel=1e-5)


def test_a_batch_with_nan_is_left_out_of_the_averages():
    model = prepared()
    model.train()
    model(batches()[0])
    before = float(model.conv.qgraph.input.range.high)
    assert model(torch.full((3, 2, 6, 6), float("nan"))).isnan().all()
    assert float(model.conv.qgraph.input.range.high) == before
    assert int(model.conv.qgraph.input.range.batches) == 1


def test_batches_may_be_tensors_tuples_lists_and_mappings():
    x = batches()[0]
    ranges = [qgraph.calibrate(prepared(), [batch]) for batch in (x, (x,), [x], {"x": x})]
    assert all(found == ranges[0] for found in ranges)


def test_eval_before_any_range_names_the_site_and_the_call():
    with pytest.raises(CalibrationError, match=r"'conv\.input'.*qgraph\.calibrate"):
        prepared().eval()(batches()[0])
    with pytest.raises(CalibrationError, match=r"conv\.input"):
        qgraph.export(prepared(), "never-written.onnx", (batches()[0],), progress=False)


def test_what_gives_no_range_is_refused():
    model, x = prepared(), batches()[0]
    with pytest.raises(CalibrationError, match="empty"):
        qgraph.calibrate(model, iter(()))
    with pytest.raises(CalibrationError, match=r"conv\.input.*NaN.*batch 2"):
        qgraph.calibrate(model, [x, x * float("nan")])
    assert int(model.conv.qgraph.input.range.batches) == 0  # nothing was written
    with pytest.raises(CalibrationError, match="without labels"):
        qgraph.calibrate(model, [(x, torch.zeros(3))])
    with pytest.raises(CalibrationError, match="batch 1 is a int"):
        qgraph.calibrate(model, [3])
    with pytest.raises(CalibrationError, match="put one batch in a list"):
        qgraph.calibrate(model, x)
    with pytest.raises(CalibrationError, match="one of minmax"):
        qgraph.calibrate(model, [x], method="max")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no activation of this model has a static range"):
        qgraph.calibrate(prepared(config="A8W4"), [x])
    with pytest.raises(CalibrationError, match="not prepared"):
        qgraph.calibrate(Net(), [x])


class Branch(nn.Module):
    """Two layers, of which an argument chooses one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, left: bool = True) -> Tensor:
        return self.left(x) if left else self.right(x)


def test_a_quantizer_that_no_batch_reaches_is_named():
    x = torch.randn(3, 4)
    model = qgraph.prepare(Branch(), STATIC, (x,)).eval()
    qgraph.calibrate(model, [x])  # the other one was never met: it has no graph
    with pytest.raises(CalibrationError, match=r"right\.input"):
        model(x, False)
    qgraph.calibrate(model, [(x, False), (x, True)])
    with pytest.raises(CalibrationError, match=r"no batch reached left\.input"):
        qgraph.calibrate(model, [(x, False)])


def test_ranges_go_with_copies_pickles_checkpoints_and_state_dicts(tmp_path):
    model, x = prepared(), batches()[0]
    qgraph.calibrate(model, batches())
    wanted = model.eval()(x)
    qgraph.save(model, tmp_path / "m.safetensors")
    loaded = qgraph.load(tmp_path / "m.safetensors", Net(), (x,))
    other = prepared()
    other.load_state_dict(model.state_dict())
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, other):
        assert torch.equal(same.eval()(x), wanted)
    with qgraph.disabled(model):
        assert not torch.equal(model(x), wanted)
    assert torch.equal(model(x), wanted)


def test_compiled_code_updates_and_uses_the_range():
    model, eager = prepared(), prepared()
    compiled = torch.compile(model, backend="eager")
    for x in batches(2):
        assert torch.allclose(compiled(x), eager(x))
    name = "conv.qgraph.input.range.high"
    assert model.state_dict()[name] == eager.state_dict()[name]
    x = batches()[0]
    assert torch.allclose(torch.compile(model.eval(), backend="eager")(x), eager.eval()(x))
    assert qgraph.calibrate(compiled, [x])


def test_a_static_range_can_be_a_rule():
    spec = QuantSpec(8, "linear", "tensor", method="ste", range="static")
    part = QConfig(weight=QuantSpec(8, "linear"), activation=spec)
    config = QConfig.parse("A8W4").with_rules(qgraph.Rule("conv", part))
    assert QConfig.from_yaml(config.to_yaml()) == config
    model = prepared(config=config)
    assert list(qgraph.calibrate(model, batches())) == ["conv.input"]


def test_quantizers_of_one_tensor_keep_their_own_range():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.a + x @ self.b

    x = torch.randn(3, 4)
    model = qgraph.prepare(Twice(), STATIC, (x,))
    assert set(qgraph.calibrate(model, [x])) == {"a.input", "b.input"}
