"""Schedules: what they set at which step, resumed, compiled, copied, captured late and exported."""

import copy
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import qgraph
from qgraph.modules import Sparsifier, WeightQuantizer
from qgraph.schedules import FreezeMasks, ProgressiveBits, QuantizationStart, SparsityRamp


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Own(nn.Module):
    """A weight that no standard layer holds: its quantizer is made when the forward is captured."""

    def __init__(self):
        super().__init__()
        self.w, self.inner = nn.Parameter(torch.randn(8, 32)), nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(nn.functional.linear(x, self.w))


X = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


def prepared(config, example=True):
    torch.manual_seed(0)
    return qgraph.prepare(Net(), config, (X,) if example else None)


def modules(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def floats(model):
    with qgraph.disabled(model):
        return model(X)


def levels(model):
    """The most values that a row of the first weight takes."""
    weight = modules(model, WeightQuantizer)[0](model.a.weight)
    return max(len(row.unique()) for row in weight)


def test_quantization_starts_at_its_step():
    model = prepared("A4W2")
    schedule = QuantizationStart(model, at=3)
    for step in range(6):
        assert torch.equal(model(X), floats(model)) == (step < 3)
        assert schedule.last_step == step
        schedule.step()


def test_part_of_a_model_may_start_later():
    model = prepared("W2")
    QuantizationStart(model, at=1, match="b")
    found = {module.site: module.enabled for module in modules(model, WeightQuantizer)}
    assert found == {"a.weight": True, "b.weight": False}


def test_bits_follow_the_steps_and_the_config_before_the_first():
    model = prepared("W8")
    schedule, seen = ProgressiveBits(model, {2: 4, 4: 1.58, 6: 1}), []
    for _ in range(8):
        seen.append((levels(model), modules(model, WeightQuantizer)[0].spec.scheme))
        schedule.step()
    assert [n for n, _ in seen[2:]] == [16, 16, 3, 3, 2, 2]
    assert seen[0][0] == seen[1][0] > 16
    assert seen[4][1] == "linear"
    assert seen[6][1] == "affine"
    assert modules(model, WeightQuantizer)[0].spec == qgraph.QuantSpec(1)
    assert "1-bit affine" in str(qgraph.inspect(model).layers[0].weight)


def test_bits_of_activations():
    model = prepared("A8W8")
    ProgressiveBits(model, {0: 2}, operand="activation")
    assert qgraph.inspect(model).layers[0].activation.bits == 2
    assert qgraph.inspect(model).layers[0].weight.bits == 8


def test_the_ramp_is_cubic_and_ends_at_the_config():
    model = prepared("W4-80%")
    schedule, ratios = SparsityRamp(model, start=2, end=10, changes=4), []
    for _ in range(12):
        weight = modules(model, Sparsifier)[0](model.a.weight)
        ratios.append(float((weight == 0).float().mean()))
        schedule.step()
    expected = [0.8 * (1 - (1 - stage / 4) ** 3) for stage in (0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4)]
    assert np.allclose(ratios, expected, atol=1 / model.a.weight.numel())


def test_n_of_m_starts_dense():
    model, kept = prepared("W1.58-2:4"), []
    schedule = SparsityRamp(model, 0, 4, changes=4)
    for _ in range(6):
        weight = modules(model, Sparsifier)[0](model.a.weight)
        kept.append(int((weight != 0).reshape(-1, 4).sum(1).max()))
        schedule.step()
    assert kept == [4, 3, 2, 2, 2, 2]
    assert str(qgraph.inspect(model).layers[0].sparsity) == "2:4"


def train(model, schedules, steps, optimizer=None, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr) if optimizer is None else optimizer
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
    return model(X).detach()


def test_frozen_masks_stay_and_free_ones_move():
    def masks(at):
        model = prepared("W4-50%")
        schedule, seen = FreezeMasks(model, at), []
        for _ in range(3):
            train(model, [schedule], 2, lr=3.0)
            seen.append(modules(model, Sparsifier)[0](model.a.weight) != 0)
        return seen

    frozen, free = masks(1), masks(100)
    assert torch.equal(frozen[0], frozen[2])
    assert not torch.equal(free[0], free[2])


def test_a_resumed_run_has_the_same_bits():
    def make():
        model = prepared("W4-50%")
        return model, [
            SparsityRamp(model, 1, 4, 3), ProgressiveBits(model, {0: 8, 3: 2}), FreezeMasks(model, 5),
            QuantizationStart(model, 2),
        ]  # fmt: skip

    whole, schedules = make()
    for stop in (1, 3, 6, 7):
        model, first = make()
        train(model, first, stop)
        state = [schedule.state_dict() for schedule in first]
        resumed, again = make()
        resumed.load_state_dict(model.state_dict())
        for schedule, saved in zip(again, state, strict=True):
            schedule.load_state_dict(saved)
        assert torch.equal(train(resumed, again, 9 - stop), train(*make(), 9))
    train(whole, schedules, 9)
    for schedule in schedules:  # and back
        state = schedule.state_dict() | {"last_step": 0}
        schedule.load_state_dict(state)
    assert torch.equal(whole(X), floats(whole))


def test_sites_captured_later_and_copies_follow():
    model = qgraph.prepare(Own(), "W8")
    schedule = ProgressiveBits(model, {0: 1})
    model(X)
    assert [module.spec.bits for module in modules(model, WeightQuantizer)] == [1, 1]
    schedule.step()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), model(X))
        assert [module.spec.bits for module in modules(other, WeightQuantizer)] == [1, 1]


def test_compiled_code_follows():
    torch._dynamo.reset()
    model = prepared("W4-50%")
    compiled = torch.compile(model, backend="aot_eager")
    schedules = [QuantizationStart(compiled, 1), SparsityRamp(compiled, 1, 3, 2), ProgressiveBits(compiled, {4: 2})]
    schedules.append(FreezeMasks(compiled, 5))
    for _ in range(7):
        found = compiled(X)
        torch.testing.assert_close(found, model(X))
        found.square().mean().backward()
        with torch.no_grad():
            model.a.weight -= model.a.weight.grad
        for schedule in schedules:
            schedule.step()


@pytest.mark.parametrize("steps", [0, 2, 3, 6])
def test_a_file_holds_what_the_model_then_is(tmp_path, steps):
    model = prepared("W4-50%")
    schedules = [QuantizationStart(model, 1), SparsityRamp(model, 2, 4, 2), ProgressiveBits(model, {4: 2})]
    schedules.append(FreezeMasks(model, 5))
    train(model, schedules, steps)
    model.eval()
    qgraph.export(model, tmp_path / "model.onnx", (X,), progress=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    np.testing.assert_allclose(found, model(X).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_errors_say_what_to_do():
    model = prepared("W4")
    with pytest.raises(qgraph.CaptureError, match=r"qgraph\.prepare"):
        QuantizationStart(Net(), 1)
    with pytest.raises(qgraph.ConfigError, match="no Sparsifier"):
        SparsityRamp(model, 0, 10)
    with pytest.raises(qgraph.ConfigError, match="'nowhere'"):
        QuantizationStart(model, 1, match="nowhere")
    with pytest.raises(qgraph.ConfigError, match="ends after it starts"):
        SparsityRamp(prepared("W4-50%"), 10, 10)
    for bits in ({}, {-1: 4}, {0: 9}, {1.5: 4}):
        with pytest.raises(qgraph.ConfigError):
            ProgressiveBits(model, bits)
    learned = qgraph.QConfig(qgraph.QuantSpec(4, method="lsq"))
    with pytest.raises(qgraph.ConfigError, match="learned step"):
        ProgressiveBits(prepared(learned), {0: 2})
    for state in ({}, {"last_step": -1}, {"last_step": 1, "masks": {}}, None):
        with pytest.raises(qgraph.CheckpointError, match="state_dict returned"):
            QuantizationStart(model, 1).load_state_dict(state)
    with pytest.raises(qgraph.CheckpointError, match="no pruned sites"):
        FreezeMasks(prepared("W4-50%"), 0).load_state_dict({"last_step": 1, "masks": {"other": torch.ones(1)}})
