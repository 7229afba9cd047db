"""The deployable module: codes in place of weights, the same results."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import qgraph
from qgraph import CaptureError
from qgraph.frozen import FrozenWeight
from qgraph.ops.bits import pack_bits, unpack_bits

CONFIGS = ("W8", "A8W4", "W3@32", "A4W1", "W1.58@tensor", "A8W4-2:4@32", "W1-50%", "A8sW7", "2:4")


class Net(nn.Module):
    """Rows looked up and tied to the head, a convolution, a product in the model's own forward, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.head.weight = self.rows.weight
        self.conv, self.cell = nn.Conv1d(16, 24, 3, padding=1), nn.LSTM(24, 12, batch_first=True)
        self.w = nn.Parameter(torch.randn(12, 16))

    def forward(self, ids: Tensor) -> Tensor:
        y = self.conv(self.rows(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.cell(y)[0] @ self.w)


IDS = torch.arange(14).view(2, 7)


def prepared(config: str, model: nn.Module | None = None, x: Tensor = IDS) -> nn.Module:
    torch.manual_seed(0)
    found = qgraph.prepare(Net() if model is None else model, config, (x,)).eval()
    if "sW" in config:
        qgraph.calibrate(found, [x])
    return found


def nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 33])
def test_bits_come_back(width, count):
    codes = torch.randint(0, 2**width, (count,), generator=torch.Generator().manual_seed(count))
    data = pack_bits(codes, width)
    assert data.dtype == torch.uint8 and data.shape == (-(-count * width // 8),)
    assert torch.equal(unpack_bits(data, width, count).long(), codes)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_frozen_model_computes_the_same_without_a_float_weight(config):
    model = prepared(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = qgraph.freeze(model)
    wanted, got = model(IDS).detach(), frozen(IDS).detach()
    # A weight is within float rounding; activation codes on a rounding tie are not met with this seed.
    assert float((got - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())
    assert {name.rpartition(".")[2] for name, _ in frozen.named_parameters()} <= {"bias", "bias_ih_l0", "bias_hh_l0"}
    assert isinstance(frozen, Net) and not frozen.training
    assert config == "2:4" or nbytes(frozen) < 0.5 * nbytes(model)
    assert model.rows.weight is not None and torch.equal(model(IDS), wanted)  # as it was
    for same in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(same(IDS), got)
    other = qgraph.freeze(prepared(config))
    other.load_state_dict({name: torch.zeros_like(value) for name, value in frozen.state_dict().items()})
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(IDS), got)


def test_tied_weights_stay_one():
    frozen = qgraph.freeze(prepared("W4"))
    assert frozen.rows.qgraph.weight is frozen.head.qgraph.weight
    assert len([m for m in frozen.modules() if isinstance(m, FrozenWeight) and m.site == "rows.weight"]) == 1


def test_pruning_that_has_not_begun_is_not_frozen_in():
    model = prepared("A8W4-2:4", nn.Linear(8, 4), x := torch.randn(2, 8))
    pruned = model(x)
    model.qgraph.weight__sparsifier.sparsity = None
    wanted = model(x)
    assert not torch.allclose(wanted, pruned)
    assert torch.allclose(qgraph.freeze(model)(x), wanted, atol=1e-6)


def test_results_follow_the_type_of_the_model():
    layer = qgraph.freeze(prepared("W4", nn.Linear(8, 4), torch.randn(2, 8)))
    assert layer.qgraph.weight().dtype == torch.float32
    layer.bfloat16()
    assert layer(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.qgraph.weight().dtype == torch.bfloat16


def test_inspect_compare_and_export_take_a_frozen_model(tmp_path):
    model = prepared("A8W4", nn.Sequential(nn.Linear(64, 70), nn.ReLU(), nn.Linear(70, 8)), x := torch.randn(3, 64))
    frozen = qgraph.freeze(model)
    assert [(r.name, r.weight) for r in qgraph.inspect(frozen).layers] == [
        (r.name, r.weight) for r in qgraph.inspect(model).layers
    ]
    assert qgraph.compare(model, frozen, (x,)).worst.snr_db > 100
    report = qgraph.export(frozen, tmp_path / "m.onnx", (x,), progress=False)
    assert report.max_difference <= 1e-5
    wanted = frozen[0].qgraph.weight.quantized().codes.numpy()
    assert (qgraph.unpack(tmp_path / "m.onnx")["0.weight"].codes == wanted).all()


class Mixed(nn.Module):
    """A weight whose norm is used too, and a forward that branches on data."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.normed = nn.Linear(4, 4), nn.Linear(4, 4)
        self.branching = Branching()

    def forward(self, x: Tensor) -> Tensor:
        y = self.branching(self.plain(x))
        return self.normed(y) + self.normed.weight.norm()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w if x.sum() > 0 else x @ self.w.t()


def test_what_something_else_uses_stays_float_and_is_named():
    model = prepared("W4", Mixed(), x := torch.randn(3, 4))
    with pytest.warns(UserWarning, match=r"normed\.weight.*stay float") as caught:
        frozen = qgraph.freeze(model)
    assert "branching.w" in str(caught[0].message) and "plain.weight" not in str(caught[0].message)
    assert frozen.plain.weight is None and frozen.normed.weight is not None
    for value in (x, -x):
        assert torch.allclose(frozen(value), model(value), atol=1e-6)


def test_what_a_frozen_model_cannot_do_is_said():
    model = prepared("W4")
    frozen = qgraph.freeze(model)
    with pytest.raises(CaptureError, match=r"is frozen.*in train mode"):
        frozen.train()(IDS)
    with pytest.raises(CaptureError, match="cannot be switched off"), qgraph.disabled(frozen):
        pass
    assert torch.equal(frozen.eval()(IDS), qgraph.freeze(model)(IDS))
    with pytest.raises(CaptureError, match="frozen already"):
        qgraph.freeze(frozen)
    with pytest.raises(CaptureError, match="not prepared"):
        qgraph.freeze(Net())
    with pytest.raises(CaptureError, match="no eval graph"):
        qgraph.freeze(qgraph.prepare(Net(), "W4"))
