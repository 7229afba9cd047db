"""What a prepared model goes on doing as any torch module: dtypes, hooks, compile, checkpoints; and clear errors."""

from __future__ import annotations

import copy
import functools
import types
import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import qgraph
from qgraph.graph import coverage, sites
from tests.models import CNN, GPT, Encoder, Functional


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def test_state_dict_goes_from_the_original_to_the_prepared_model_and_back():
    model, other = mlp(), mlp()
    prepared = qgraph.prepare(mlp(), "W4", X)
    prepared.load_state_dict(model.state_dict(), strict=True)
    with qgraph.disabled(prepared):
        assert torch.equal(prepared(X), model(X))
    other.load_state_dict(prepared.state_dict(), strict=True)
    assert torch.equal(other(X), model(X))


def test_learned_steps_exist_right_after_prepare_and_load_strictly():
    config = qgraph.QConfig(qgraph.QuantSpec(4, "linear", method="lsq"), None, None)
    first, second = qgraph.prepare(mlp(), config), qgraph.prepare(mlp(), config, X)
    steps = [n for n, _ in first.named_parameters() if n.endswith("step")]
    assert steps == ["0.qgraph.weight.step", "2.qgraph.weight.step"]
    assert list(first.state_dict()) == list(second.state_dict())
    second.load_state_dict(first.state_dict(), strict=True)
    optimizer = torch.optim.SGD(second.parameters(), 0.1)
    before = second[0].qgraph.weight.step.detach().clone()
    second(X).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, second[0].qgraph.weight.step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_to_another_dtype(dtype):
    prepared = qgraph.prepare(mlp(), "A8W4@8", X)
    moved = copy.deepcopy(prepared).to(dtype)
    out = moved(X.to(dtype))
    assert out.dtype == dtype
    assert torch.allclose(out.float(), prepared(X), atol=0.05)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in moved.parameters())


@pytest.mark.parametrize("make", [CNN, GPT, Encoder], ids=["cnn", "gpt", "encoder"])
def test_autocast_gives_eagers_dtypes_and_with_quantizers_off_eagers_values(make):
    torch.manual_seed(0)
    model = make().eval()
    x = {CNN: torch.randn(2, 3, 16, 16), GPT: torch.randint(0, 33, (2, 7)), Encoder: torch.randn(2, 7, 16)}[make]
    prepared = qgraph.prepare(model, "A8W4", x)
    with torch.autocast("cpu", torch.bfloat16):
        with qgraph.disabled(prepared):
            assert torch.equal(prepared(x), model(x))
        out = prepared(x)
        assert out.dtype == model(x).dtype
    out.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in prepared.parameters() if p.grad is not None)


def test_autocast_region_inside_a_forward_is_kept():
    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            y = self.fc(x)
            with torch.autocast("cpu", enabled=False):
                z = y.float() @ y.float().T
            with torch.autocast("cpu", torch.bfloat16):
                return z, self.fc(x)

    model, x = Region(), torch.randn(3, 8)
    prepared = qgraph.prepare(model, "W4", x)
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on), qgraph.disabled(prepared):
            a, b = prepared(x), model(x)
            assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(a, b, strict=True))
    assert not torch.is_autocast_enabled("cpu")


def test_hooks_made_before_and_after_prepare_run():
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda m, i, o: seen.append("before"))
    prepared = qgraph.prepare(model, "W4", X)
    prepared[2].register_forward_pre_hook(lambda m, i: seen.append("pre"))
    prepared[2].register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    seen.clear()
    prepared(X).sum().backward()
    assert seen == ["before", "pre", "backward"]


def test_a_hook_that_changes_the_output_is_honoured():
    prepared = qgraph.prepare(mlp(), "W4", X)
    plain = prepared(X)
    handle = prepared[0].register_forward_hook(lambda m, i, o: o * 0)
    assert not torch.equal(prepared(X), plain)
    handle.remove()
    assert torch.equal(prepared(X), plain)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
def test_weights_that_are_computed_are_quantized(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(norm(nn.Linear(16, 8)), nn.Tanh(), nn.Linear(8, 2))
    prepared = qgraph.prepare(model, "W2", X) if norm is not nn.utils.weight_norm else None
    if prepared is None:
        prepared = qgraph.prepare(model, "W2", X, inplace=True)  # torch cannot deep-copy the old weight_norm
    assert [s.reason for s in sites(prepared)] == [None, None]
    prepared(X).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in prepared.parameters())


def test_parametrization_added_after_prepare_is_still_quantized():
    class Double(nn.Module):
        def forward(self, w):
            return w * 2

    prepared = qgraph.prepare(mlp(), "W1", X)
    parametrize.register_parametrization(prepared[0], "weight", Double())
    out = prepared(X)
    weight = next(s for s in sites(prepared) if s.path == "0")
    assert weight.reason is None and torch.isfinite(out).all()


def test_torch_compile_gives_the_same_without_a_graph_break():
    torch._dynamo.reset()
    prepared = qgraph.prepare(GPT(), "A8W4@8", torch.randint(0, 33, (2, 7))).eval()
    compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True)
    x = torch.randint(0, 33, (2, 7))
    assert torch.allclose(compiled(x), prepared(x), atol=1e-6)
    compiled(x).sum().backward()
    torch._dynamo.reset()


def test_multihead_attention_fast_path_does_not_step_around_the_quantizers():
    torch.manual_seed(0)
    model = Encoder().eval()
    x = torch.randn(2, 5, 16)
    prepared = qgraph.prepare(model, "W1", x)
    with torch.no_grad():
        assert not torch.allclose(prepared(x), model(x), atol=1e-3)
        with qgraph.disabled(prepared):
            assert torch.equal(prepared(x), model(x))
    names = {s.name for s in sites(prepared)}
    assert {"encoder.layers.0.self_attn.in_proj_weight", "encoder.layers.0.self_attn.out_proj.weight"} <= names


def test_rules_choose_by_path_type_and_leave_float_what_they_exclude():
    config = qgraph.QConfig.parse("W2").with_rules(qgraph.Rule("2", None))
    prepared = qgraph.prepare(mlp(), config, X)
    assert {s.name: s.reason for s in sites(prepared)} == {"0.weight": None, "2.weight": "a rule leaves it float"}
    h = torch.randn(3, 32)
    assert torch.equal(prepared[2](h), F.linear(h, prepared[2].weight, prepared[2].bias))


def test_a_tied_weight_has_one_quantizer_also_when_used_transposed():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(10, 8)

        def forward(self, ids):
            return self.emb(ids) @ self.emb.weight.t()

    prepared = qgraph.prepare(Tied(), "W2@4", torch.randint(0, 10, (2, 3)))
    quantizers = {id(s.quantizer) for s in sites(prepared)}
    assert len(sites(prepared)) == 2 and len(quantizers) == 1


def test_a_tied_layer_has_its_quantizers_once_and_before_its_first_call():
    """The optimizer is made right after `prepare`: a learned step that comes later, or that nothing uses, is none."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            return self.head(self.emb(ids))

    lsq = qgraph.QuantSpec(4, method="lsq")
    config = qgraph.QConfig(lsq, qgraph.QuantSpec(4, method="lsq", granularity="tensor"), None)
    prepared = qgraph.prepare(Tied(), config)
    before = [name for name, _ in prepared.named_parameters()]
    prepared(torch.randint(0, 10, (2, 3))).sum().backward()
    assert [name for name, _ in prepared.named_parameters()] == before
    assert "head.qgraph.input.step" in before
    assert all(parameter.grad is not None for parameter in prepared.parameters())


def test_training_lowers_the_loss_and_pruned_weights_come_back():
    torch.manual_seed(0)
    prepared = qgraph.prepare(mlp(), "A4W1-2:4", X)
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    target = torch.randn(5, 4)
    losses = []
    masks = []
    for _ in range(60):
        loss = F.mse_loss(prepared(X), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        sparsifier = prepared[0].qgraph.weight__sparsifier
        masks.append(sparsifier(prepared[0].weight) != 0)
    assert losses[-1] < 0.5 * losses[0]
    assert bool((~masks[0] & masks[-1]).any())
    assert all(bool((m.reshape(-1, 4).sum(1) == 2).all()) for m in masks)


def test_inplace_keeps_the_optimizers_parameters():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    prepared = qgraph.prepare(model, "W4", X, inplace=True)
    assert prepared is model
    before = model[0].weight.detach().clone()
    prepared(X).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, prepared[0].weight)


def test_lora_style_products_are_quantized_where_they_are_used():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.a, self.b = (nn.Parameter(torch.randn(*s)) for s in ((6, 8), (2, 8), (6, 2)))

        def forward(self, x):
            return F.linear(x, self.w + self.b @ self.a)

    prepared = qgraph.prepare(Lora(), "W2", torch.randn(3, 8))
    assert [(s.op, s.reason) for s in sites(prepared)] == [("linear", None)]


def test_threads_capture_at_once_without_disturbing_each_other():
    import threading

    models, outs = [qgraph.prepare(mlp(), "W4") for _ in range(4)], [None] * 4
    expected = qgraph.prepare(mlp(), "W4", X)(X)

    def work(i):
        outs[i] = models[i](X)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(o, expected) for o in outs)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_coverage_counts_graphs_and_misses():
    prepared = qgraph.prepare(mlp(), "W4", X)
    found = coverage(prepared)
    assert (found.modules, found.captured, found.graphs) == (3, 3, 6)
    assert (found.sites, found.sites_quantized, found.guard_misses) == (2, 2, 0)


class Unfit(nn.Module):
    """Weights that are no real numbers: of a complex product, of a complex layer, a table of whole numbers."""

    def __init__(self):
        super().__init__()
        self.w, self.spectral = (
            nn.Parameter(torch.randn(16, 6, dtype=torch.cfloat)),
            nn.Linear(6, 6, dtype=torch.cfloat),
        )
        self.table = nn.Parameter(torch.randint(0, 9, (7, 2)), requires_grad=False)
        self.fc, self.python = nn.Linear(6, 3), False

    def forward(self, x):
        if self.python and float(x.sum()) > 1e9:
            return x
        rows = F.embedding(x[:, 0].abs().long(), self.table)
        return self.fc(self.spectral(x.to(torch.cfloat) @ self.w).abs()), rows


@pytest.mark.parametrize("python", [False, True])
@pytest.mark.parametrize("config", ["A8W4", "W2-2:4"])
def test_weights_that_are_no_real_numbers_are_left_alone_and_reported(config, python):
    model = Unfit()
    model.python = python
    prepared = qgraph.prepare(model, config, X)
    reasons = {site.name: site.reason for site in sites(prepared)}
    complex_ones = dict.fromkeys(("w", "spectral.weight"), "its values are complex64, which no quantizer takes")
    whole = {"table": "its values are int64, which no quantizer takes"}
    assert reasons == {**complex_ones, **whole, "fc.weight": None}
    with qgraph.disabled(prepared, "fc*"):
        assert all(torch.equal(a, b) for a, b in zip(prepared(X), model(X), strict=True))
    with pytest.raises(qgraph.CaptureError, match="which no quantizer takes"):
        qgraph.prepare(model, config, X, strict=True)


def scaled(layer):
    """A layer with a forward of its own, as those who patch models write it."""
    before = layer.forward

    def forward(self, x, shift=1.0):
        return before(x) * self.scale + shift

    layer.scale, layer.forward = 2.0, types.MethodType(forward, layer)
    return layer


class Patched(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bare = scaled(nn.Linear(16, 8)), nn.Linear(8, 8), nn.Module()
        self.b.forward = lambda x: F.linear(x, self.b.weight * 2)
        self.bare.w = nn.Parameter(torch.randn(8, 3))
        self.bare.forward = functools.partial(torch.matmul, other=self.bare.w)

    def forward(self, x):
        return self.bare(self.b(self.a(x, shift=0.5)))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_forward_that_was_set_on_an_object_is_captured(inplace, tmp_path):
    model = Patched()
    expected = model(X)
    prepared = qgraph.prepare(model, "W4", X, inplace=inplace)
    names = ("a.weight", "b.weight.derived", "bare.w")
    assert [(site.name, site.reason, site.captured) for site in sites(prepared)] == [(n, None, True) for n in names]
    for same in (prepared, copy.deepcopy(prepared)):
        assert not torch.equal(same(X), expected)
        with qgraph.disabled(same):
            assert torch.equal(same(X), expected)
    compiled = torch.compile(prepared, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(X), prepared(X))
    report = qgraph.export(prepared.eval(), tmp_path / "patched.onnx", (X,), progress=False)
    assert len(report.layers) == 3


def test_a_learned_step_of_a_weight_that_is_passed_to_a_child():
    class Child(nn.Module):
        def forward(self, x, w):
            return F.linear(weight=w, input=x)

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.child = nn.Parameter(torch.randn(4, 16)), Child()

        def forward(self, x):
            return self.child(x, self.w)

    prepared = qgraph.prepare(Parent(), qgraph.QConfig(qgraph.QuantSpec(4, "linear", method="lsq"), None, None), X)
    assert [s.reason for s in sites(prepared)] == [None]
    prepared(X).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())


def test_settings_that_change_after_the_capture_are_seen():
    from types import SimpleNamespace

    class Configured(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.config, self.scales, self.flip = nn.Linear(16, 4), SimpleNamespace(double=False), [1.0], False

        def forward(self, x):
            y = self.fc(x.flip(0) if self.flip else x) * self.scales[0]
            return y * 2 if self.config.double else y

    prepared = qgraph.prepare(Configured(), "W4", X)
    plain = prepared(X)
    for other in (prepared, copy.deepcopy(prepared)):
        other.config.double = True
        assert torch.equal(other(X), plain * 2)
        other.config.double = False
        other.scales[0] = 4.0
        assert torch.equal(other(X), plain * 4)
        other.scales[0] = 1.0
        other.flip = True
        assert torch.equal(other(X.flip(0)), plain)
        other.flip = False
        assert torch.equal(other(X), plain)


def test_learned_steps_are_children_that_move_with_their_module():
    config = qgraph.QConfig(qgraph.QuantSpec(4, "linear", method="lsq"), None, None)
    prepared = qgraph.prepare(Functional(), config, torch.randn(2, 1, 9, 9)).to(torch.float64)
    steps = [p for n, p in prepared.named_parameters() if n.endswith("step")]
    assert len(steps) == 4 and all(step.dtype == torch.float64 for step in steps)
    assert not any(m.training for m in prepared.eval().modules())
    met = []
    prepared.apply(met.append)
    assert len(met) == len(list(prepared.modules()))


def test_other_tracers_give_the_prepared_model_or_an_error():
    x = torch.randn(3, 4)
    prepared = qgraph.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "A8W4", x).eval()
    traced = torch.jit.trace(prepared, x)
    assert torch.equal(traced(-x), prepared(-x))
    with pytest.raises(qgraph.CaptureError, match=r"symbolic_trace.* Trace the float model"):
        torch.fx.symbolic_trace(prepared)


class Label(tuple):
    """Two numbers that are read by name alone."""

    def __len__(self):
        raise NotImplementedError

    degree = property(lambda self: self[0])


class Registered(nn.Module):
    """Notes its subclasses, each by a name."""

    kinds: ClassVar = {}

    def __init_subclass__(cls, *, name, **_):
        Registered.kinds[name] = cls

    def __init__(self):
        super().__init__()
        self.fc, self.label = nn.Linear(4, 4), Label((2, 1))


class Scaled(Registered, name="scaled"):
    def forward(self, x):
        return self.fc(x) * self.label.degree


def test_classes_with_rules_of_their_own():
    prepared = qgraph.prepare(Scaled(), "W4", torch.randn(2, 4))
    assert Registered.kinds == {"scaled": Scaled}
    assert isinstance(prepared, Scaled)
    assert not coverage(prepared).opaque
