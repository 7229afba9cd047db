"""Hand-written forward and backward passes against plain autograd, over random specs, groups and shapes."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import SHAPES, groupings, seeds, sparsities, specs, values

from qgraph.ops import fake_quantize, initial_step, reference, sparsify

# float64 throughout: the two differ by rounding alone, of sums of at most some hundred terms of the size of h.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@st.composite
def cases(draw, **kinds):
    spec, shape = draw(specs(**kinds)), draw(st.sampled_from(SHAPES))
    return spec, draw(groupings(shape)), values(draw(seeds), shape)


def step_of(x, spec, groups):
    return initial_step(x, spec, groups).requires_grad_() if spec.method == "lsq" else None


def close(found, expected, x):
    torch.testing.assert_close(found, expected, rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"] * scale_of(x))


def scale_of(x):
    return max(float(x.detach().abs().max()), 1.0)


def gradients(function, x, *args, **kwargs):
    x = x.clone().requires_grad_()
    y = function(x, *args, **kwargs)
    h = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    inputs = [x] + [t for t in (kwargs.get("step"),) if t is not None]
    return y, torch.autograd.grad(y, inputs, h)


@given(cases())
def test_dense(case):
    spec, groups, x = case
    step = step_of(x, spec, groups)
    found, found_grads = gradients(fake_quantize, x, spec, groups, step=step)
    expected, expected_grads = gradients(reference.fake_quantize, x, spec, groups, step=step)
    close(found, expected, x)
    for ours, theirs in zip(found_grads, expected_grads, strict=True):
        close(ours, theirs, x)


@given(cases(schemes=("linear",)), sparsities())
def test_sparse_end_to_end(case, sparsity):
    """The total derivative with respect to the parameter, pruning error included."""
    spec, groups, x = case
    step = step_of(x, spec, groups)

    def ours(w, step):
        return fake_quantize(sparsify(w, sparsity, groups), spec, groups, dense=w, step=step)

    def theirs(w, step):
        mask = reference.sparsity_mask(w, sparsity, groups)
        x_s = w + torch.where(mask, 0, -w).detach()  # x_S = x + d_S
        return reference.fake_quantize(x_s, spec, groups, dense=w, step=step)

    found, found_grads = gradients(ours, x, step=step)
    expected, expected_grads = gradients(theirs, x, step=step)
    close(found, expected, x)
    for mine, plain in zip(found_grads, expected_grads, strict=True):
        close(mine, plain, x)


@given(cases(methods=("ddt",)))
def test_float32_is_close_to_float64(case):
    """Statistics in float32 lose no more than rounding: no cancellation at 8 bits, no overflow.

    A value on a rounding tie may fall on either side, so the values are drawn once, in float32, and the codes must
    agree for the comparison to be one of precision.
    """
    spec, groups, x = case
    x = x.float()
    y, (grad,) = gradients(fake_quantize, x, spec, groups)
    y64, (grad64,) = gradients(fake_quantize, x.double(), spec, groups)
    same = torch.isclose(y.double(), y64, rtol=1e-5, atol=1e-5 * scale_of(x))
    if not bool(same.all()):  # a tie: one code apart, in few places
        assert spec.bits < 8 or same.double().mean() > 0.5
        return
    # The upstream gradient differs in its random values between dtypes; compare through a fixed one.
    x32, x64 = x.clone().requires_grad_(), x.double().requires_grad_()
    h = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    (grad,) = torch.autograd.grad(fake_quantize(x32, spec, groups), x32, h)
    (grad64,) = torch.autograd.grad(fake_quantize(x64, spec, groups), x64, h.double())
    if spec.lam > 0:
        torch.testing.assert_close(grad.double(), grad64, rtol=2e-4, atol=2e-4)


@given(cases(methods=("ddt",)))
def test_double_backward(case):
    """A gradient penalty differentiates through the backward pass; held to autograd through the reference."""
    spec, groups, x = case
    penalties = []
    for function in (fake_quantize, reference.fake_quantize):
        w = x.clone().requires_grad_()
        h = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape).requires_grad_()
        (first,) = torch.autograd.grad(function(w, spec, groups), w, h, create_graph=True)
        penalties.append(torch.autograd.grad(first.square().sum(), (w, h), allow_unused=True))
    for ours, theirs in zip(*penalties, strict=True):
        theirs = torch.zeros_like(x) if theirs is None else theirs
        ours = torch.zeros_like(x) if ours is None else ours
        size = max(float(theirs.abs().max()), 1.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * size)


@given(cases(methods=("ste", "lsq")))
def test_double_backward_of_the_baselines(case):
    spec, groups, x = case
    step = step_of(x, spec, groups)
    results = []
    for function in (fake_quantize, reference.fake_quantize):
        w = x.clone().requires_grad_()
        h = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape).requires_grad_()
        (first,) = torch.autograd.grad(function(w, spec, groups, step=step), w, h, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), h)[0])
    close(*results, x)
