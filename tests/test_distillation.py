"""Distillation: the loss is that of the two models' outputs, the teacher gets no gradient and is not changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraph


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 8)

    def forward(self, x, scale=1.0):
        return self.b(self.drop(torch.relu(self.norm(self.a(x))))) * scale


class Output:
    def __init__(self, logits):
        self.logits = logits


X = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


def prepared(config="A4W2"):
    torch.manual_seed(0)
    return qgraph.prepare(Net(), config, (X,))


def test_its_own_float_model_is_the_teacher():
    model = prepared()
    model.drop.eval()
    before = copy.deepcopy(model.norm)
    output, loss = qgraph.distill(model, X, scale=2.0, temperature=3.0)
    assert not torch.equal(model.norm.running_mean, before.running_mean)
    assert model.norm.num_batches_tracked == 1  # the student's batch alone
    assert [module.training for module in (model, model.a, model.norm, model.drop)] == [True, True, True, False]
    again = prepared().eval()
    with torch.no_grad(), qgraph.disabled(again):
        target = again(X, scale=2.0)
    expected = F.kl_div(
        F.log_softmax(output / 3, -1), F.log_softmax(target / 3, -1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(loss, 9 * expected)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert loss > 0


def test_nothing_to_learn_from_itself_without_quantizers():
    model = prepared().eval()
    with qgraph.disabled(model):
        for loss in ("kl", "mse"):
            assert abs(qgraph.distill(model, X, loss=loss).loss.item()) < 1e-6


def test_another_module_is_the_teacher():
    model, teacher = prepared(), nn.Sequential(nn.Linear(32, 8), nn.Dropout(0.0))
    output, loss = qgraph.distill(model.eval(), X, teacher=teacher, loss="mse")
    torch.testing.assert_close(loss, F.mse_loss(output, teacher(X)))
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    own = qgraph.distill(model, X, teacher=teacher, loss=lambda a, b: (a - b).abs().max())
    torch.testing.assert_close(own.loss, (output - teacher(X)).abs().max())


@pytest.mark.parametrize("wrap", [lambda t: (t, None), lambda t: {"logits": t}, Output])
def test_outputs_that_hold_logits(wrap):
    class Wrapped(Net):
        def forward(self, x):
            return wrap(super().forward(x))

    torch.manual_seed(0)
    model = qgraph.prepare(Wrapped(), "W2", (X,)).eval()
    output, loss = qgraph.distill(model, X)
    assert not isinstance(output, torch.Tensor)
    torch.testing.assert_close(loss, qgraph.distill(prepared("W2").eval(), X).loss)


def test_compiled():
    torch._dynamo.reset()
    model = prepared("W2").eval()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(qgraph.distill(compiled, X).loss, qgraph.distill(model, X).loss)


def test_errors_say_what_to_do():
    with pytest.raises(qgraph.CaptureError, match=r"qgraph\.prepare"):
        qgraph.distill(Net(), X)
    with pytest.raises(qgraph.ConfigError, match="temperature"):
        qgraph.distill(prepared(), X, temperature=0)
    with pytest.raises(qgraph.ConfigError, match="'kl', 'mse'"):
        qgraph.distill(prepared(), X, loss="l2")
    with pytest.raises(qgraph.ConfigError, match="select="):
        qgraph.distill(prepared(), X, teacher=Nothing())
    with pytest.raises(qgraph.ConfigError, match=r"\(16, 8\).*\(16, 32\)"):
        qgraph.distill(prepared(), X, teacher=nn.Identity())


class Nothing(nn.Module):
    def forward(self, x):
        return "no tensor"
