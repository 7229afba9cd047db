"""Mean-magnitude scales, the gradient window, and ParetoQ's learned range, against formulas written out."""

import pytest
import torch

from qgraph.config import QuantSpec
from qgraph.errors import ConfigError
from qgraph.ops import Groups, fake_quantize, initial_step, quantize

CHANNELS = Groups("channel")


def sample(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, h = torch.randn(2, 4, 50, generator=generator, dtype=torch.float64)
    return (x + 0.3).requires_grad_(), h


def gradient(x, h, spec, **kwargs):
    y = fake_quantize(x, spec, CHANNELS, **kwargs)
    return y.detach(), torch.autograd.grad(y, x, h)[0]


@pytest.mark.parametrize("scale", ["absmean", "windowed"])
@pytest.mark.parametrize(("bits", "factor"), [(1, 2.0), (2, 1.2479)])
def test_ddt_about_the_mean(bits, factor, scale):
    """Levels centred at the mean, s = c mean|x - mean|; windowed: no gradient through f half a step beyond them."""
    x, h = sample()
    spec = QuantSpec(bits, scale=scale)
    found = gradient(x, h, spec)
    top = 2**bits - 1
    mean = x.detach().mean(1, keepdim=True)
    s = factor * (x.detach() - mean).abs().mean(1, keepdim=True)
    f = (x - mean + top / 2 * s) / s
    if scale == "windowed":
        far = (x.detach() - mean).abs() > (top / 2 + 0.5) * s
        assert 0 < far.double().mean() < 0.3
        f = torch.where(far, f.detach(), f)
    q = f + (f.detach().round().clamp(0, top) - f.detach())
    qc, xc = q - q.mean(1, keepdim=True), x - x.mean(1, keepdim=True)
    slope = (xc * qc).mean(1, keepdim=True) / (qc.square().mean(1, keepdim=True) + 0.01)
    y = slope * qc + x.mean(1, keepdim=True)
    torch.testing.assert_close(found[0], y.detach())
    torch.testing.assert_close(found[1], torch.autograd.grad(y, x, h)[0])
    if bits == 1:  # one bit splits a group at its mean, wherever its outlier lies
        codes = quantize(x.detach(), spec, CHANNELS).codes
        assert torch.equal(codes.bool(), x.detach() > mean)


def test_the_step_suits_gaussian_values():
    """No step nearby has a smaller squared error; with two bits, as Max found, 0.996 standard deviations."""
    x = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for spec in (QuantSpec(2, scale="absmean", lam=0), QuantSpec(1.58, scale="absmean", lam=0)):
        step = {2: 0.9957, 1.58: 1.224}[spec.bits]
        errors = []
        for factor in (0.9, 1.0, 1.1):
            f = x / (factor * step) + (1.5 if spec.bits == 2 else 0)
            q = f.round().clamp(*spec.levels)
            qc = q - (q.mean() if spec.bits == 2 else 0)
            errors.append((x - qc * (x * qc).mean() / qc.square().mean()).square().mean())
        ours = (x - fake_quantize(x, spec, CHANNELS)).square().mean()
        assert errors[1] == min(errors)
        torch.testing.assert_close(ours, errors[1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("scale", ["absmean", "windowed"])
@pytest.mark.parametrize("bits", [1, 2])
def test_straight_through_about_the_mean(bits, scale):
    """y = m + s (q - c) with m, s differentiated and the codes straight-through inside the window."""
    x, h = sample()
    found = gradient(x, h, QuantSpec(bits, method="ste", scale=scale))
    top = 2**bits - 1
    m = x.mean(1, keepdim=True)
    s = {1: 2.0, 2: 1.2479}[bits] * (x - m).abs().mean(1, keepdim=True)
    f = (x - m) / s + top / 2
    if scale == "windowed":
        f = torch.where((f < -0.5) | (f > top + 0.5), f.detach(), f)
    y = m + s * (f + (f.round().clamp(0, top) - f).detach() - top / 2)
    torch.testing.assert_close(found[0], y.detach())
    torch.testing.assert_close(found[1], torch.autograd.grad(y, x, h)[0])


@pytest.mark.parametrize("method", ["ddt", "ste"])
def test_windowed_binary_signs(method):
    """Linear: the window is twice the mean magnitude, and pruned places, whose position is 0, lie inside."""
    x, h = sample()
    spec = QuantSpec(1, "linear", method=method, scale="windowed")
    open_spec = QuantSpec(1, "linear", method=method, scale="absmean")
    far = x.detach().abs() > 2 * x.detach().abs().mean(1, keepdim=True)
    differ = gradient(x, h, spec)[1] != gradient(x, h, open_spec)[1]
    assert far.any()
    if method == "ddt":  # a learned scale spreads what the window holds back over the group
        assert torch.equal(differ, far)
    pruned = torch.where(x.detach().abs() > 0.5, 0, x.detach())  # the large ones go
    dense = gradient(x, h, spec, dense=None)[0]
    assert dense.isfinite().all()
    if method == "ddt":
        y = fake_quantize(pruned, spec, CHANNELS, dense=x)
        z = fake_quantize(pruned, open_spec, CHANNELS, dense=x)
        (found,), (expected,) = torch.autograd.grad(y, x, h), torch.autograd.grad(z, x, h)
        assert torch.equal(found[pruned == 0], expected[pruned == 0])


@pytest.mark.parametrize(("bits", "levels"), [(1, 2), (1.58, 3), (2, 4)])
def test_seq_as_published(bits, levels):
    """ParetoQ: eq. 3 and the published backward pass, with g = 1 / sqrt of the tensor's size."""
    x, h = sample()
    spec = QuantSpec(bits, method="seq")
    size = torch.full((4, 1), 1.1, dtype=torch.float64, requires_grad=True)
    y = fake_quantize(x, spec, CHANNELS, step=size)
    grad_x, grad_size = torch.autograd.grad(y, (x, size), h)
    t, half, shift = x.detach() / 1.1, levels / 2, 0.0 if levels == 3 else 0.5
    inside = t.abs() <= (1.0 if bits == 1 else 0.99)
    if bits == 1:
        level = slope = t.sign()
    else:
        level = ((t.clamp(-0.99, 0.99) * half - shift).round() + shift) / half
        edge = (half - shift) / half if levels == 4 else 1.0
        edge = level if levels == 3 else edge * t.sign()
        slope = torch.where(inside, level - t, edge)
    torch.testing.assert_close(y.detach(), 1.1 * level)
    assert len((y.detach() / 1.1).mul(100).round().unique()) == levels
    torch.testing.assert_close(grad_x, torch.where(inside, h, 0))
    torch.testing.assert_close(grad_size, (h * slope).sum(1, keepdim=True) / x.numel() ** 0.5)
    found = quantize(x, spec, CHANNELS, step=size)
    torch.testing.assert_close(found.dequantize().double(), y.detach(), rtol=1e-6, atol=1e-6)


def test_seq_start():
    """mean|x| at one bit, else max|x|; a layer of zeros can learn."""
    x = sample()[0].detach()
    torch.testing.assert_close(initial_step(x, QuantSpec(1, method="seq"), CHANNELS), x.abs().mean(1, keepdim=True))
    torch.testing.assert_close(initial_step(x, QuantSpec(2, method="seq"), CHANNELS), x.abs().amax(1, keepdim=True))
    assert torch.equal(
        initial_step(torch.zeros(2, 64), QuantSpec(2, method="seq"), CHANNELS), torch.full((2, 1), 1 / 8)
    )


def test_specs_that_make_no_sense():
    with pytest.raises(ConfigError, match="whose step is learned"):
        QuantSpec(1, method="lsq", scale="windowed")
    with pytest.raises(ConfigError, match="2, 3 or 4 levels"):
        QuantSpec(3, method="seq")
