"""The operations under torch.compile, torch.export, fake tensors, torch.func and autocast."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.ops import Groups, fake_quantize, quantize, sparsify

SPECS = [
    QuantSpec(4),
    QuantSpec(1.58),
    QuantSpec(1, "linear"),
    QuantSpec(4, granularity="block", group_size=16),
    QuantSpec(8, "linear", "block", 16, method="ste"),
    QuantSpec(4, "linear", method="ste", scale="absmean"),
    QuantSpec(4, method="lsq"),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
some_specs = pytest.mark.parametrize("spec", SPECS[2:5] + SPECS[6:], ids=str)  # compiling takes a second each


def quantized(x, spec, step):
    return fake_quantize(x, spec, Groups.for_activation(spec, conv=False), step=step)


def sample(shape=(3, 5, 40)):
    torch.manual_seed(0)
    return torch.randn(shape), torch.full((1, 1), 0.2, requires_grad=True), torch.randn(shape)


@some_specs
def test_compile_in_one_graph(spec):
    torch._dynamo.reset()
    x, step, h = sample()
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager", dynamic=True)
    inputs = [[x.clone().requires_grad_(), step] for _ in range(2)]
    inputs = [pair if spec.learns else pair[:1] for pair in inputs]
    y, y_compiled = (f(pair[0], spec, step) for f, pair in zip((quantized, compiled), inputs, strict=True))
    torch.testing.assert_close(y_compiled, y)
    grads, compiled_grads = (
        torch.autograd.grad(out, pair, h) for out, pair in zip((y, y_compiled), inputs, strict=True)
    )
    for ours, theirs in zip(compiled_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled_code_follows_the_spec():
    """Specs that differ in one number are not confused, and a number that varies does not become a symbol."""
    torch._dynamo.reset()
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    x, step, _ = sample()
    for bits, lam in ((4, 0.01), (4, 0.5), (8, 0.5)):
        spec = QuantSpec(bits, "affine", "block", 16, lam=lam)
        torch.testing.assert_close(compiled(x, spec, step), quantized(x, spec, step))


def test_compile_sparse():
    torch._dynamo.reset()
    w, _, h = sample((8, 40))
    w.requires_grad_()
    sparsity, groups, spec = SparsitySpec.parse("2:4"), Groups("channel"), QuantSpec(1, "linear")

    def prune_and_quantize(w):
        return fake_quantize(sparsify(w, sparsity, groups), spec, groups, dense=w)

    compiled = torch.compile(prune_and_quantize, fullgraph=True, backend="aot_eager")(w)
    y = prune_and_quantize(w)
    torch.testing.assert_close(compiled, y)
    torch.testing.assert_close(torch.autograd.grad(compiled, w, h), torch.autograd.grad(y, w, h))


@pytest.mark.parametrize("strict", [False, True])
@some_specs
def test_export_with_dynamic_sizes(spec, strict):
    class Module(torch.nn.Module):
        def forward(self, x):
            return quantized(x, spec, torch.tensor([[0.2]]))

    x, _, _ = sample()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    program = torch.export.export(Module(), (x,), dynamic_shapes=(sizes,), strict=strict)
    other = torch.randn(7, 2, 40)
    torch.testing.assert_close(program.module()(other), Module()(other))


@every_spec
def test_fake_tensors(spec):
    """Shapes flow without data: nothing branches on a value."""
    with FakeTensorMode():
        x = torch.randn(3, 5, 40, requires_grad=True)
        step = torch.ones(1, 1)
        y = quantized(x, spec, step)
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape
        groups = Groups.for_activation(spec, conv=False)
        assert quantize(x, spec, groups, step=step).scale.shape == groups.shape(x.shape)


@every_spec
def test_functional_gradient(spec):
    x, step, h = sample()
    step = step.detach()
    found = torch.func.grad(lambda v: (quantized(v, spec, step) * h).sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(quantized(leaf, spec, step), leaf, h)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_spec
def test_autocast_changes_nothing(spec):
    x, step, _ = sample()
    expected = quantized(x, spec, step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantized(x, spec, step)
    assert torch.equal(y, expected)


@every_spec
def test_checkpointing(spec):
    """Recomputation in the backward pass gives the same gradient."""
    x, step, h = sample()
    leaf = x.clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(quantized, leaf, spec, step.detach(), use_reentrant=False)
    (found,) = torch.autograd.grad(y, leaf, h)
    (expected,) = torch.autograd.grad(quantized(leaf, spec, step.detach()), leaf, h)
    assert torch.equal(found, expected)


def test_what_is_kept_for_the_backward_pass():
    """The input itself and a few scalars a group: no codes, no copies."""
    x = torch.randn(16, 512, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fake_quantize(x, QuantSpec(4), Groups("channel", 0, 128))
    own = [t for t in kept if t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()]
    assert sum(t.numel() for t in own) <= 6 * 16 * 4
