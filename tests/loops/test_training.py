"""One process: checkpointing, accumulation, averages, schedulers, autocast, clipping and resuming go on as before.

Where two ways of running must agree they do so bit for bit, unless a comment says what is summed in another order.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import qgraph
from qgraph.graph import coverage, sites
from tests.models import CNN, GPT

CONFIGS = ["A8W4@8", "A4W1-2:4", "W1.58"]


def batch(seed, size=4, length=9):
    ids = torch.randint(0, 33, (size, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def gpt(config="A8W4@8", capture=True):
    torch.manual_seed(0)
    return qgraph.prepare(GPT(), config, batch(0) if capture else None)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def same(ours, theirs):
    """Whether two dicts of tensors (or Nones) are equal bit for bit."""
    assert ours.keys() == theirs.keys()
    return all(b is None if a is None else torch.equal(a, b) for a, b in ((ours[k], theirs[k]) for k in theirs))


def close(ours, theirs, ulps):
    """Whether tensors agree to some float32 ulp of the largest value of each."""
    eps = torch.finfo(torch.float32).eps
    return all((ours[k] - theirs[k]).abs().max() <= ulps * eps * theirs[k].abs().max() for k in theirs)


def steps(model, optimizer, first, last, after=lambda step: None):
    """Train on the batches `first` to `last`, random numbers seeded by the step; returns the losses."""
    losses = []
    for step in range(first, last):
        torch.manual_seed(step)
        loss = model(*batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(step)
        losses.append(loss.item())
    return losses


# -- activation checkpointing ------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Blocks with dropout; `reentrant` says by which kind of checkpoint they run, None that there is none."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, 16)) for _ in range(3)
        )
        self.w = nn.Parameter(torch.randn(16, 16) * 0.2)

    def mix(self, x):
        return F.dropout(F.linear(x, self.w).tanh(), 0.2, self.training)

    def forward(self, x):
        x = self.first(x)
        for part in (*self.blocks, self.mix):
            x = x + (part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant))
        return x


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_checkpointed_forward_has_the_loss_and_gradients_of_a_plain_one(config, capture, reentrant):
    found = {}
    for kind in (None, reentrant):
        torch.manual_seed(0)
        model = qgraph.prepare(Checkpointed(kind), config, X if capture else None)
        found[kind] = []
        for step in range(2):  # without examples the first step captures
            torch.manual_seed(step)
            model.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            found[kind].append({"loss": loss.detach(), **gradients(model)})
        assert {s.name: s.reason for s in sites(model)} == {
            name: None for name, p in model.named_parameters() if name.split(".")[-1] in ("weight", "w")
        }
    assert all(map(same, found[reentrant], found[None]))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_compiled_forward_with_reentrant_checkpoints_is_quantized_where_it_runs_again(config):
    torch.manual_seed(0)
    model = qgraph.prepare(Checkpointed(True), config, X).eval()
    found = []
    for forward in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        loss = forward(X).square().mean()
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert same(*found)


class Derived(nn.Module):
    """Two weights made of one parameter, one of them handed to a checkpointed function, in a forward that branches."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.w = nn.Parameter(torch.randn(16, 16) * 0.2)

    def mix(self, x, w):
        return F.linear(F.linear(x, w), self.w * 2).tanh()

    def forward(self, x):
        if x.sum() > 1e9:  # no graph holds this, so the forward stays Python
            return x
        x, w = F.linear(x, self.w + 1), self.w.tanh()
        return self.mix(x, w) if self.reentrant is None else checkpoint(self.mix, x, w, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_derived_weight_keeps_its_quantizer_inside_a_checkpoint(reentrant):
    found = []
    for kind in (None, reentrant):
        torch.manual_seed(0)
        model = qgraph.prepare(Derived(kind), "W2", X)
        model(X).square().sum().backward()
        found.append((model.w.grad, [(s.name, s.reason) for s in sites(model)]))
    # Both kinds of checkpoint sum the gradients of the three uses of `w` in an order of their own.
    assert close({"w": found[1][0]}, {"w": found[0][0]}, ulps=8)
    assert found[0][1] == found[1][1] and len(found[0][1]) == 3


class Part(nn.Module):
    """Says how often its forward runs, and has statistics that each run changes."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)

    def forward(self, x):
        return self.norm(self.fc(x)).tanh()


class OnlyCheckpoints(nn.Module):
    """A forward that is nothing but a checkpointed child."""

    def __init__(self, reentrant):
        super().__init__()
        self.child, self.reentrant = Part(), reentrant

    def forward(self, x):
        return checkpoint(self.child, x, use_reentrant=self.reentrant)


class CheckpointsItself(Part):
    """As the layers of transformers do."""

    def __call__(self, x):
        return checkpoint(super().__call__, x, use_reentrant=False)


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = CheckpointsItself()

    def forward(self, x):
        return self.child(x)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize(
    ("make", "opaque"),
    [(lambda: OnlyCheckpoints(True), {""}), (lambda: OnlyCheckpoints(False), {""}), (Holds, set())],
    ids=["reentrant", "other", "own"],
)
def test_a_checkpointed_child_runs_again_in_backward_as_in_eager(make, opaque, capture):
    torch.manual_seed(0)
    model, x = make(), X.clone().requires_grad_()
    prepared = qgraph.prepare(model, "A4W2", x if capture else None)
    found = []
    for each in (model, prepared):
        runs = []
        each.child.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        with qgraph.disabled(prepared):
            for _ in range(2):  # without an example, the first is recorded
                each.zero_grad()
                each(x).square().sum().backward()
        found.append({"runs": torch.tensor(len(runs)), **gradients(each), **dict(each.child.norm.named_buffers())})
    assert found[0]["runs"] == 4 and same(found[1], found[0])
    assert {entry.path for entry in coverage(prepared).opaque} == opaque
    assert coverage(prepared).graphs > 0 and coverage(prepared).sites_quantized == coverage(prepared).sites == 1


class BySize(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)

    def forward(self, x):
        x = self.norm(self.fc(x))
        return x / 2 if x.shape[0] > 5 else x * 2


def test_a_graph_that_does_not_hold_inside_a_checkpoint_saves_nothing():
    torch.manual_seed(0)
    model = OnlyCheckpoints(False)
    model.child = BySize()
    prepared = qgraph.prepare(model, "A4W2", X)
    with qgraph.disabled(prepared):
        for x in (X, torch.cat([X, X]), X[:3], torch.cat([X, X])):
            for each in (model, prepared):
                each.zero_grad()
                each(x).square().sum().backward()
            assert same(gradients(prepared), gradients(model))
            assert same(dict(prepared.child.norm.named_buffers()), dict(model.child.norm.named_buffers()))
    assert coverage(prepared).guard_misses == 1 and {entry.path for entry in coverage(prepared).opaque} == {""}


class Leaves(nn.Module):
    """What it leaves in an attribute makes the run in backward another kind of call than the one in forward."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        y = self.fc(x)
        self.fc.seen = x.detach()
        return y + self.fc.seen.mean()


def test_a_checkpoint_may_end_a_run_that_is_being_recorded():
    torch.manual_seed(0)
    model = OnlyCheckpoints(False)
    model.child = Leaves()
    prepared, x = qgraph.prepare(model, "A4W2", X), X.clone().requires_grad_()
    with qgraph.disabled(prepared):
        for _ in range(2):
            for each in (model, prepared):
                each.zero_grad()
                each(x).square().sum().backward()
            assert same(gradients(prepared), gradients(model))


def test_a_checkpoint_keeps_no_activation_of_the_forward():
    class Watched(Checkpointed):
        def mix(self, x):
            hidden = F.linear(x, self.w)
            self.__dict__.setdefault("seen", []).append(weakref.ref(hidden.untyped_storage()))
            return hidden.tanh()

    model = qgraph.prepare(Watched(False), "W2", X)
    model.__dict__["seen"] = seen = []
    loss = model(X).sum()
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None
    loss.backward()
    assert len(seen) == 2
    assert torch.utils.checkpoint.CheckpointFunction.forward.__module__ == "torch.utils.checkpoint"


def test_checkpoint_sequential_over_prepared_layers():
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16) if i % 2 == 0 else nn.ReLU() for i in range(6)]
    plain = qgraph.prepare(nn.Sequential(*layers), "A4W2", X)
    saved = copy.deepcopy(plain)
    plain(X).sum().backward()
    checkpoint_sequential(saved, 3, X, use_reentrant=False).sum().backward()
    assert same(gradients(saved), gradients(plain))


# -- accumulation, averages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_accumulated_gradients_are_those_of_one_large_batch(config):
    whole, parts = gpt(config).eval(), gpt(config).eval()  # in eval, since dropout draws by batch
    ids, targets = batch(3, size=8)
    whole(ids, targets).backward()
    for part in range(4):
        rows = slice(2 * part, 2 * part + 2)
        (parts(ids[rows], targets[rows]) / 4).backward()
    # The same terms, summed in another order; up to 72 of them a weight.
    assert close(gradients(parts), gradients(whole), ulps=72)


def test_weights_that_change_between_micro_batches_are_seen():
    model = gpt().eval()
    ids, targets = batch(3)
    model(ids, targets).backward()
    changes = [
        lambda p: p.add_(0.1),
        lambda p: p.data.mul_(1.5),  # does not count as a change for autograd
        lambda p: setattr(p, "data", p.data * 0.7),
        lambda p: p.copy_(torch.randn_like(p)),
    ]
    for change in changes:
        before = model(ids)
        with torch.no_grad():
            for parameter in model.parameters():
                change(parameter)
        fresh = gpt().eval()
        fresh.load_state_dict(model.state_dict())
        assert not torch.equal(model(ids), before) and torch.equal(model(ids), fresh(ids))


@pytest.mark.parametrize("capture", [True, False])
def test_an_average_by_deepcopy_follows_the_weights_and_is_quantized_itself(capture):
    model = gpt(capture=capture)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def update(step):
        with torch.no_grad():
            for mean, own in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(own, 0.25)

    steps(model, optimizer, 0, 5, update)
    ids = batch(9)[0]
    fresh = gpt().eval()
    fresh.load_state_dict(average.state_dict())
    assert torch.equal(average(ids), fresh(ids))
    assert not torch.equal(average(ids), model.eval()(ids))
    with qgraph.disabled(model):  # the copy has quantizers of its own
        assert torch.equal(average(ids), fresh(ids))
    assert coverage(average).sites_quantized == coverage(fresh).sites_quantized > 0


def test_averaged_model_with_batch_norm():
    torch.manual_seed(0)
    images = torch.randn(6, 3, 16, 16)
    model = qgraph.prepare(CNN(), "A8W4", images)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reference = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(4):
        torch.manual_seed(step)
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        for name, parameter in model.named_parameters():
            mean = reference[name]
            reference[name] = parameter.detach().clone() if step == 0 else mean.lerp(parameter.detach(), 0.1)
    assert close(dict(average.module.named_parameters()), reference, ulps=8)
    update_bn([images], average)
    average.eval()
    fresh = qgraph.prepare(CNN(), "A8W4", images).eval()
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(average(images), fresh(images))


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_an_optimizer_made_before_prepare_trains_as_one_made_after():
    losses = []
    for before in (True, False):
        torch.manual_seed(0)
        model = GPT()
        early = torch.optim.AdamW(model.parameters(), 1e-2) if before else None
        prepared = qgraph.prepare(model, "A8W4@8", batch(0), inplace=True)
        assert prepared is model
        losses.append(steps(prepared, early or torch.optim.AdamW(prepared.parameters(), 1e-2), 0, 5))
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


def test_scheduler_and_clipping():
    model = gpt("A4W2")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=6, cycle_momentum=False)
    rates = []
    for step in range(5):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        model(*batch(step)).backward()
        own = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert torch.isclose(norm, own)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        moved = torch.stack([(p.detach() - before[name]).norm() for name, p in model.named_parameters()]).norm()
        assert moved <= 0.1 * rates[-1] * 1.001 + 1e-6  # the clipped norm times the rate, and rounding
    assert len(set(rates)) == 5


def test_autocast_and_grad_scaler():
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(*batch(0))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**10 and losses[-1] < 0.8 * losses[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.eval()(batch(0)[0]).dtype == torch.bfloat16
    assert model(batch(0)[0]).dtype == torch.float32


def test_a_scaler_skips_a_step_of_infinite_gradients():
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model(*batch(0)) * 1e3).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(dict(model.state_dict()), dict(before)) and scaler.get_scale() < 2.0**126


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["file", "state_dict"])
@pytest.mark.parametrize(
    "config",
    [
        "A8W4@8",
        "A4W1-2:4",
        qgraph.QConfig(
            qgraph.QuantSpec(4, "linear", method="lsq"), qgraph.QuantSpec(8, "linear", "tensor", method="lsq")
        ),
    ],
    ids=str,
)
def test_a_resumed_run_repeats_the_one_that_was_not_stopped(config, way, tmp_path):
    whole = gpt(config)
    expected = steps(whole, torch.optim.AdamW(whole.parameters(), 1e-2), 0, 6)
    stopped = gpt(config)
    optimizer = torch.optim.AdamW(stopped.parameters(), 1e-2)
    losses = steps(stopped, optimizer, 0, 3)
    saved = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    qgraph.save(stopped, tmp_path / "model.safetensors")
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    torch.manual_seed(99)  # another start than the run's
    if way == "file":
        resumed = qgraph.load(tmp_path / "model.safetensors", GPT(), batch(0))
    else:
        resumed = qgraph.prepare(GPT(), config, batch(0))
        resumed.load_state_dict(state["model"], strict=True)
    optimizer = torch.optim.AdamW(resumed.parameters(), 1e-2)
    optimizer.load_state_dict(state["optimizer"])
    losses += steps(resumed, optimizer, 3, 6)
    assert losses == expected
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))
