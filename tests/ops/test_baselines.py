"""The gradients of ste and lsq against the published formulas, written out."""

import pytest
import torch

from qgraph.config import QuantSpec
from qgraph.ops import Groups, fake_quantize, initial_step, scale_is_mean

CHANNELS = Groups("channel")


def sample(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, h = torch.randn(2, 4, 50, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), h


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_gradients_as_published(bits):
    """Esser et al.: ds = -v/s + round(v/s) inside, -Qn or Qp outside (eq. 3), times 1 / sqrt(N Qp)."""
    x, h = sample()
    spec = QuantSpec(bits, "linear", method="lsq")
    qp = spec.levels[1]
    step = torch.full((4, 1), 0.3, dtype=torch.float64, requires_grad=True)
    grad_x, grad_s = torch.autograd.grad(fake_quantize(x, spec, CHANNELS, step=step), (x, step), h)
    f = x.detach() / step.detach()
    inside = (f > -qp) & (f < qp)
    slope = torch.where(inside, f.round() - f, torch.where(f > 0, float(qp), float(-qp)).double())
    torch.testing.assert_close(grad_x, torch.where(inside, h, 0))
    torch.testing.assert_close(grad_s, (h * slope).sum(1, keepdim=True) / (x.shape[1] * qp) ** 0.5)
    assert bool(inside.any())
    assert bits > 2 or not bool(inside.all())


def test_lsq_counts_all_values_that_share_a_step():
    """One step for all channels: N is the whole tensor, and the gradient the sum over the channels."""
    x, h = sample()
    spec = QuantSpec(4, "linear", method="lsq")
    shared = torch.full((1, 1), 0.3, dtype=torch.float64, requires_grad=True)
    each = torch.full((4, 1), 0.3, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(fake_quantize(x, spec, CHANNELS, step=shared), shared, h)
    (parts,) = torch.autograd.grad(fake_quantize(x, spec, CHANNELS, step=each), each, h)
    torch.testing.assert_close(found, parts.sum().reshape(1, 1) / 2)  # sqrt of 4 times the values


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4, 8])
@pytest.mark.parametrize("scheme", ["affine", "linear"])
def test_lsq_start(bits, scheme):
    """LSQ: 2 mean|x| / sqrt(Qp), binary mean|x|; LSQ+ (affine): range / Qp; and zeros can learn."""
    if (bits, scheme) == (1.58, "affine"):
        return
    x = sample()[0].detach()
    spec = QuantSpec(bits, scheme, method="lsq")
    size, factor = x.abs().mean(1, keepdim=True), 2 / spec.levels[1] ** 0.5
    if scheme == "affine":
        size, factor = x.amax(1, keepdim=True) - x.amin(1, keepdim=True), 1 / spec.levels[1]
    elif bits == 1:
        factor = 1.0
    torch.testing.assert_close(initial_step(x, spec, CHANNELS), factor * size)
    zero_start = initial_step(torch.zeros(2, 64), spec, CHANNELS)
    torch.testing.assert_close(zero_start, torch.full((2, 1), factor / 8))


def test_lsq_step_below_zero_counts_as_its_magnitude():
    x, h = sample()
    spec = QuantSpec(4, "linear", method="lsq")
    plus = torch.full((4, 1), 0.3, dtype=torch.float64, requires_grad=True)
    minus = torch.full((4, 1), -0.3, dtype=torch.float64, requires_grad=True)
    y, y_minus = (fake_quantize(x, spec, CHANNELS, step=s) for s in (plus, minus))
    assert torch.equal(y, y_minus)
    torch.testing.assert_close(torch.autograd.grad(y, plus, h)[0], -torch.autograd.grad(y_minus, minus, h)[0])


def test_lsq_learns_a_better_step():
    """Training the step alone on the squared error improves on the published start."""
    x = sample()[0].detach()
    spec = QuantSpec(2, "linear", method="lsq")
    step = initial_step(x, spec, CHANNELS).requires_grad_()
    optimizer = torch.optim.Adam([step], lr=0.01)
    errors = []
    for _ in range(200):
        error = (fake_quantize(x, spec, CHANNELS, step=step) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert min(errors) < 0.95 * errors[0]


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
def test_absmean_gradient_against_autograd(bits):
    """y = s (x / s + noise) with s = c mean|x| differentiated and the noise constant."""
    x, h = sample()
    spec = QuantSpec(bits, "linear", method="ste", scale="absmean")
    (found,) = torch.autograd.grad(fake_quantize(x, spec, CHANNELS), x, h)
    s = (1.0 if bits < 2 else 2 / spec.levels[1] ** 0.5) * x.abs().mean(1, keepdim=True)
    f = x / s
    q = torch.where(x >= 0, 1.0, -1.0).double() if bits == 1 else f.round().clamp(*spec.levels)
    y = s * (f + (q - f).detach())
    torch.testing.assert_close(fake_quantize(x, spec, CHANNELS), y)
    torch.testing.assert_close(found, torch.autograd.grad(y, x, h)[0])
    assert not torch.allclose(found, h)


@pytest.mark.parametrize(("method", "expected_decibels"), [("ddt", 6.7), ("ste", 5.8)])
def test_two_linear_bits_are_ternary(method, expected_decibels):
    """The levels are the same, so are scale, codes and gradient. Gaussian values; a scale of max|x| gives ddt 2.4."""
    x, h = torch.randn(2, 4, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    two, ternary = (QuantSpec(bits, "linear", method=method) for bits in (2, 1.58))
    assert scale_is_mean(two) and not scale_is_mean(QuantSpec(3, "linear")) and not scale_is_mean(QuantSpec(1))
    y, expected = (fake_quantize(x, spec, CHANNELS) for spec in (two, ternary))
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(out, x, h)[0] for out in (y, expected)))
    decibels = 10 * torch.log10(x.square().mean() / (x - y).square().mean())
    assert abs(decibels - expected_decibels) < 0.2


@pytest.mark.parametrize("spec", [QuantSpec(2, method="ste"), QuantSpec(1.58, method="ste")], ids=str)
def test_straight_through_is_the_identity(spec):
    x, h = sample()
    assert torch.equal(torch.autograd.grad(fake_quantize(x, spec, CHANNELS), x, h)[0], h)
