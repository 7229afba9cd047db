"""The properties that ddt.md lists, each over random inputs, and the closed form it gives."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import seeds, specs, values

from qgraph.config import QuantSpec
from qgraph.ops import Groups, ddt, fake_quantize, quantize

CHANNELS = Groups("channel")
lengths = st.sampled_from((2, 5, 16, 65))
every_specs = specs(methods=("ddt",))
every_affine_specs = specs(methods=("ddt",), schemes=("affine",))
# The paper's scale; what is said of the others is in test_scales.py.
ddt_specs = specs(methods=("ddt",), scales=("minmax",))
affine_specs = specs(methods=("ddt",), schemes=("affine",), scales=("minmax",))


def rows(seed, length):
    return values(seed, (3, length))


def spread(x):
    return (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)).clamp_min(1e-30)


def codes(x, spec):
    return quantize(x, spec, CHANNELS).codes.double()


@given(every_specs, seeds, lengths)
def test_infinite_ridge_leaves_the_mean(spec, seed, length):
    x = rows(seed, length)
    y = fake_quantize(x, replace(spec, lam=1e18), CHANNELS)
    expected = x.mean(-1, keepdim=True).expand_as(x) if spec.scheme == "affine" else torch.zeros_like(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9 * float(x.abs().max() + 1))


@given(every_specs, seeds, lengths)
def test_without_ridge_the_residual_is_orthogonal(spec, seed, length):
    """Least squares: the residual is orthogonal to the (centred) codes, and has zero mean if affine."""
    x, spec = rows(seed, length), replace(spec, lam=0.0)
    q = codes(x, spec)
    residual = (x - fake_quantize(x, spec, CHANNELS)) / spread(x)
    size = float(x.abs().max() / spread(x).min())
    if spec.scheme == "affine":
        q = q - q.mean(-1, keepdim=True)
        assert residual.mean(-1).abs().max() < 1e-9 * (1 + size)
    assert ((residual * q).mean(-1).abs() < 1e-9 * (1 + size) * (1 + q.abs().amax(-1))).all()


@given(ddt_specs, seeds, lengths, st.floats(-0.5, 0.5), st.floats(-0.5, 0.5))
def test_without_ridge_no_other_map_of_the_codes_is_nearer(spec, seed, length, stretch, shift):
    """Not plain dequantization, and not a map moved from the fitted one in slope or offset."""
    x, spec = rows(seed, length), replace(spec, lam=0.0)
    y, q = fake_quantize(x, spec, CHANNELS), codes(x, spec)
    best = (x - y).square().mean(-1)
    slack = 1e-9 * (best + x.square().mean(-1)) + 1e-30
    if spec.scheme == "affine":
        step, low = spread(x) / spec.levels[1], x.amin(-1, keepdim=True)
        others = [step * q + low, y * (1 + stretch) + shift * spread(x)]
    else:
        others = [q * x.abs().amax(-1, keepdim=True) / spec.levels[1], y * (1 + stretch)]
    for other in others:
        assert (best <= (x - other).square().mean(-1) + slack).all()


@given(
    affine_specs,
    seeds,
    lengths,
    st.sampled_from((0.125, 0.5, 2.0, 64.0)),
    st.integers(-8, 8),
)
def test_equivariance(spec, seed, length, factor, shift):
    """DDT(c x + t) = c DDT(x) + t for c > 0; on a coarse grid c x + t is exact and no tie moves."""
    x = rows(seed, length).mul(64).round().div(64).clamp(-1e6, 1e6)
    moved = fake_quantize(factor * x + shift, spec, CHANNELS)
    expected = factor * fake_quantize(x, spec, CHANNELS) + shift
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9 * (1 + factor * float(x.abs().max())))


@given(every_specs, seeds, lengths, st.sampled_from((0.125, 2.0, 1024.0)))
def test_scaling(spec, seed, length, factor):
    """Both schemes commute with a positive factor."""
    x = rows(seed, length)
    y = fake_quantize(x, spec, CHANNELS)
    torch.testing.assert_close(fake_quantize(factor * x, spec, CHANNELS), factor * y, rtol=1e-12, atol=0)


@given(ddt_specs, seeds, lengths)
def test_noise_free_input_passes_unchanged(spec, seed, length):
    """x on the levels and lam = 0: y = x and the gradient is the identity."""
    low, high = spec.levels
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(low, high + 1, (3, length), generator=generator).double()
    q[:, 0], q[:, 1] = low, high  # the extremes are present, so the scale is the true one
    if spec.scheme == "linear" and spec.levels[1] == 1:
        q = torch.where(q >= 0, 1.0, -1.0).double()  # mean|x| is the step only if all magnitudes are equal
    x = (q * 0.25 + (3.5 if spec.scheme == "affine" else 0)).requires_grad_()
    y = fake_quantize(x, replace(spec, lam=0.0), CHANNELS)
    h = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad(y, x, h)
    torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, h, rtol=1e-9, atol=1e-9)


@given(st.sampled_from(("affine", "linear")), seeds, st.sampled_from((16, 300)))
def test_error_falls_with_every_bit(scheme, seed, length):
    """8 bits approach y = x: the error stays within half a step and the ridge's share of the values."""
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    worst = [float((fake_quantize(x, QuantSpec(bits, scheme), CHANNELS) - x).abs().max()) for bits in (2, 4, 6, 8)]
    assert worst == sorted(worst, reverse=True)
    step = float(spread(x).max() / 255) if scheme == "affine" else float(x.abs().max() / 127)
    assert worst[-1] < step


@given(every_affine_specs, st.floats(-1e4, 1e4, width=32), lengths, st.sampled_from((torch.float32, torch.float64)))
def test_constant_group_is_exact(spec, value, length, dtype):
    x = torch.full((2, length), value, dtype=dtype, requires_grad=True)
    y = fake_quantize(x, spec, CHANNELS)
    y.backward(torch.randn(2, length, dtype=dtype))
    assert torch.equal(y, x)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("lam", [0.0, 0.01])
@pytest.mark.parametrize("bits", [1, 1.58, 2, 8])
def test_constant_group_of_a_linear_scheme(bits, lam):
    """The ridge shrinks it: y = x E / (E + lam), E the mean square of the codes; exact without it, and for 0."""
    spec = QuantSpec(bits, "linear", lam=lam)
    energy = spec.levels[1] ** 2
    for value in (0.0, 1.7, -3.0):
        x = torch.full((2, 9), value, requires_grad=True)
        y = fake_quantize(x, spec, CHANNELS)
        y.sum().backward()
        torch.testing.assert_close(y, x * (energy / (energy + lam)))
        assert x.grad.isfinite().all()
        if value == 0 or lam == 0:
            torch.testing.assert_close(y, x, rtol=3e-7, atol=0)  # two roundings


@pytest.mark.parametrize("bits", [1, 1.58, 2, 8])
def test_a_constant_group_of_a_linear_scheme_is_continuous(bits):
    """Why a constant group is not made an exception: its neighbours, a hair from constant, are shrunk too."""
    spec, x = QuantSpec(bits, "linear"), torch.full((1, 9), 1.7, dtype=torch.float64)
    near = x.clone()
    near[0, 3] += 1e-9
    torch.testing.assert_close(fake_quantize(near, spec, CHANNELS), fake_quantize(x, spec, CHANNELS), rtol=1e-8, atol=0)


def frozen_forward(x, at, sparse, spec):
    """The forward pass at `x` with the scale, d_S and d_Q of the point `at`: a smooth function of x."""
    source = at if sparse is None else sparse
    shift = source - at
    if spec.scheme == "affine":
        offset, step = source.amin(-1, keepdim=True), spread(source) / spec.levels[1]
    elif spec.levels[1] == 1:
        count = source.shape[-1] if sparse is None else (source != 0).sum(-1, keepdim=True).clamp_min(1)
        offset, step = 0.0, source.abs().sum(-1, keepdim=True) / count
    else:
        offset, step = 0.0, source.abs().amax(-1, keepdim=True) / spec.levels[1]
    f = (source - offset) / step
    if spec.bits == 1 and spec.scheme == "linear":
        level = torch.where(f > 0, 1.0, torch.where(f < 0, -1.0, 0.0 if sparse is not None else 1.0))
    else:
        level = f.round().clamp(*spec.levels)
    q = (x + shift - offset) / step + (level - f)
    if spec.scheme == "affine":
        qc = q - q.mean(-1, keepdim=True)
        mean = x.mean(-1, keepdim=True)
        return (x * qc).mean(-1, keepdim=True) / (qc.square().mean(-1, keepdim=True) + spec.lam) * qc + mean
    return (x * q).mean(-1, keepdim=True) / (q.square().mean(-1, keepdim=True) + spec.lam) * q


class Frozen(torch.autograd.Function):
    """Frozen forward pass with the hand-written backward pass, for gradcheck."""

    @staticmethod
    def forward(ctx, x, at, sparse, spec):
        ctx.save_for_backward(at, sparse)
        ctx.spec = spec
        return frozen_forward(x, at, sparse, spec)

    @staticmethod
    def backward(ctx, h):
        at, sparse = ctx.saved_tensors
        cut = [None if t is None else t.unsqueeze(1) for t in (h, at, sparse)]
        _, stats = ddt.centred_codes(cut[1], cut[2], ctx.spec)
        return ddt.gradient(cut[0], cut[1], cut[2], stats, ctx.spec).squeeze(1), None, None, None


@given(ddt_specs, seeds, st.sampled_from((2, 5, 16)))
def test_gradient_is_that_of_the_frozen_forward_pass(spec, seed, length):
    """Finite differences (gradcheck, float64) with d_Q held constant."""
    x = torch.randn(2, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(frozen_forward(x, x, None, spec), fake_quantize(x, spec, CHANNELS), atol=1e-9)
    assert torch.autograd.gradcheck(Frozen.apply, (x.clone().requires_grad_(), x, None, spec))


@given(specs(methods=("ddt",), schemes=("linear",), scales=("minmax",)), seeds, st.sampled_from((4, 16)))
def test_gradient_with_the_pruning_frozen(spec, seed, length):
    """The same with d_S held constant."""
    x = torch.randn(2, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sparse = torch.where(x.abs() >= x.abs().median(-1, keepdim=True).values, x, 0)
    y = fake_quantize(sparse, spec, CHANNELS, dense=x)
    assert torch.allclose(frozen_forward(x, x, sparse, spec), y, atol=1e-9)
    assert torch.autograd.gradcheck(Frozen.apply, (x.clone().requires_grad_(), x, sparse, spec))


@given(affine_specs, seeds, lengths)
def test_closed_form_of_the_paper(spec, seed, length):
    """dL/dx = mean h + (m/V) qc + r (h - mean h) + (m / (V s)) (xc - 2 a qc), written out as in ddt.md."""
    x = rows(seed, length).requires_grad_()
    spec = replace(spec, lam=0.01)
    h = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (grad,) = torch.autograd.grad(fake_quantize(x, spec, CHANNELS), x, h)
    with torch.no_grad():
        s = spread(x) / spec.levels[1]
        q = ((x - x.amin(-1, keepdim=True)) / s).round()
        qc, xc = q - q.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
        v = qc.square().mean(-1, keepdim=True) + spec.lam
        a = (xc * qc).mean(-1, keepdim=True) / v
        m, mean_h = (h * qc).mean(-1, keepdim=True), h.mean(-1, keepdim=True)
        expected = mean_h + m / v * qc + a / s * (h - mean_h) + m / (v * s) * (xc - 2 * a * qc)
    constant = (x.amax(-1) == x.amin(-1)).unsqueeze(-1)
    expected = torch.where(constant, mean_h, expected)
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-8)
