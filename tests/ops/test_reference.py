"""Hand-written forward and backward passes against plain autograd, over random specs, groups and shapes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from ops_cases import SHAPES, groupings, seeds, sparsities, specs, values

from qgraph.ops import ddt_cpu, fake_quantize, initial_step, native, quantize, reference, sparsify

# float64 throughout: the two differ by rounding alone, of sums of some hundred terms of the size of h.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@st.composite
def cases(draw, **kinds):
    spec, shape = draw(specs(**kinds)), draw(st.sampled_from(SHAPES))
    return spec, draw(groupings(shape)), values(draw(seeds), shape)


def step_of(x, spec, groups):
    # Not the start itself, at which the largest value lies on the edge of the levels, inside or out by a rounding.
    return initial_step(x, spec, groups).mul(0.93).requires_grad_() if spec.learns else None


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
    """Statistics in float32 lose no more than rounding: nothing large cancels at 8 bits, nothing overflows.

    Values on a rounding tie may fall on either side; that is no matter of precision, such draws are left out.
    """
    spec, groups, x = case
    spec, x = replace(spec, lam=max(spec.lam, 0.01)), x.float()
    assume(torch.equal(quantize(x, spec, groups).codes, quantize(x.double(), spec, groups).codes))
    h = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    results = []
    for w in (x.clone().requires_grad_(), x.double().requires_grad_()):
        y = fake_quantize(w, spec, groups)
        results.append((y.double(), torch.autograd.grad(y, w, h.to(w.dtype))[0].double()))
    (y, grad), (y64, grad64) = results
    torch.testing.assert_close(y, y64, rtol=0, atol=2e-6 * scale_of(x))
    # A position f = (x - b) / s carries an error of eps |x| / s, up to levels * eps * |x| / range.
    torch.testing.assert_close(grad, grad64, rtol=1e-3, atol=1e-3)


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


@given(cases(methods=("ste", "lsq", "seq")))
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


@given(cases(methods=("ddt",)), st.sampled_from((1, 1 << 19)))
def test_cpu_passes_are_the_general_ones(case, chunk):
    """Without a compiler float32 takes passes of its own; whatever the chunk, codes are equal, values close."""
    spec, groups, x = case
    x = x.float()
    h = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "applies", lambda *_: False)
        patch.setattr(ddt_cpu, "CHUNK", chunk)
        w = x.clone().requires_grad_()
        y = fake_quantize(w, spec, groups)
        (grad,) = torch.autograd.grad(y, w, h)
        patch.setattr(ddt_cpu, "applies", lambda *_: False)
        expected = fake_quantize(w, spec, groups)
        (expected_grad,) = torch.autograd.grad(expected, w, h)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6 * scale_of(x))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)
