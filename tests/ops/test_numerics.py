"""Dtypes, memory layouts, empty and degenerate tensors, NaN and Inf, for every method."""

import itertools

import pytest
import torch

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.errors import ConfigError
from qgraph.ops import Groups, fake_quantize, initial_step, quantize, sparsify, sparsity_mask

SPECS = {
    "ddt-8": QuantSpec(8),
    "ddt-4": QuantSpec(4),
    "ddt-1": QuantSpec(1),
    "ddt-linear-4": QuantSpec(4, "linear"),
    "ddt-ternary": QuantSpec(1.58),
    "ddt-binary": QuantSpec(1, "linear"),
    "ste-4": QuantSpec(4, method="ste"),
    "ste-linear-8": QuantSpec(8, "linear", method="ste"),
    "ste-binary": QuantSpec(1, "linear", method="ste"),
    "ste-ternary": QuantSpec(1.58, method="ste"),
    "ddt-absmean-2": QuantSpec(2, scale="absmean"),
    "ddt-windowed-1": QuantSpec(1, scale="windowed"),
    "ddt-windowed-ternary": QuantSpec(1.58, scale="windowed"),
    "ste-windowed-2": QuantSpec(2, method="ste", scale="windowed"),
    "absmean-binary": QuantSpec(1, "linear", method="ste", scale="absmean"),
    "absmean-ternary": QuantSpec(1.58, method="ste", scale="absmean"),
    "absmean-4": QuantSpec(4, "linear", method="ste", scale="absmean"),
    "lsq-4": QuantSpec(4, method="lsq"),
    "lsq-linear-4": QuantSpec(4, "linear", method="lsq"),
    "lsq-binary": QuantSpec(1, "linear", method="lsq"),
    "lsq-ternary": QuantSpec(1.58, method="lsq"),
    "seq-1": QuantSpec(1, method="seq"),
    "seq-ternary": QuantSpec(1.58, method="seq"),
    "seq-2": QuantSpec(2, method="seq"),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
GROUPS = [
    Groups("tensor"),
    Groups("channel", 1),
    Groups("channel", -1, 8),
    Groups("token", 0, 5),
    Groups("token"),
]
every_group = pytest.mark.parametrize("groups", GROUPS, ids=str)


def step_for(x, spec, groups):
    return initial_step(x, spec, groups) if spec.learns else None


def run(x, spec, groups, step=None):
    """Values and gradient, for an upstream gradient that depends on the logical position alone."""
    x = x.detach().requires_grad_()
    y = fake_quantize(x, spec, groups, step=step_for(x, spec, groups) if step is None else step)
    h = torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x.dtype)
    return y, torch.autograd.grad(y, x, h)[0]


@every_group
@every_spec
def test_every_layout_gives_the_same(spec, groups):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 3)
    y, grad = run(x, spec, groups)
    padded = torch.zeros(2, 6, 4, 7)
    padded[..., 2:5] = x
    layouts = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "sliced": padded[..., 2:5],
    }
    for name, other in layouts.items():
        assert torch.equal(other, x)
        found = run(other, spec, groups)
        # The order of summation differs: a few ulps.
        torch.testing.assert_close(found[0], y, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(found[1], grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@every_spec
def test_expanded_tensor(spec):
    torch.manual_seed(0)
    x = torch.randn(1, 1, 6).expand(2, 5, 6)
    for groups in GROUPS:
        y, grad = run(x, spec, groups)
        y2, grad2 = run(x.contiguous(), spec, groups)
        torch.testing.assert_close(y, y2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, grad2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [Groups("tensor"), Groups("channel", 0), Groups("channel", 1)], ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (2, 3, 4, 3, 2)])
def test_channels_last_stays_channels_last(shape, groups):
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape).contiguous(memory_format=layout)
    y, grad = run(x, QuantSpec(4), groups)
    assert y.is_contiguous(memory_format=layout)
    assert grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_spec
def test_narrow_types_are_computed_in_float32(spec, dtype):
    """The result is that of the float32 computation, rounded once."""
    torch.manual_seed(0)
    x, groups = torch.randn(4, 33).to(dtype), Groups("channel", 0, 16)
    step = step_for(x.float(), spec, groups)
    y, grad = run(x, spec, groups, step)
    assert y.dtype == grad.dtype == dtype
    wide = x.float().requires_grad_()
    y32 = fake_quantize(wide, spec, groups, step=step)
    h = torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(dtype).float()
    (grad32,) = torch.autograd.grad(y32, wide, h)
    assert torch.equal(y, y32.to(dtype))
    assert torch.equal(grad, grad32.to(dtype))


@every_spec
def test_float64_stays_float64(spec):
    x = torch.randn(4, 33, dtype=torch.float64)
    y, grad = run(x, spec, Groups("channel"))
    assert y.dtype == grad.dtype == torch.float64
    assert not torch.equal(y, y.float().double())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (0, 0)])
@every_spec
def test_empty(spec, shape):
    for groups in (Groups("tensor"), Groups("channel"), Groups("channel", 0, 2), Groups("token")):
        x = torch.zeros(shape, requires_grad=True)
        y = fake_quantize(x, spec, groups, step=step_for(x, spec, groups))
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape
        found = quantize(x, spec, groups, step=step_for(x, spec, groups))
        assert found.scale.shape == groups.shape(shape)
        assert found.dequantize().shape == x.shape


def test_scalar():
    y = fake_quantize(torch.tensor(3.25), QuantSpec(2), Groups("tensor"))
    assert torch.equal(y, torch.tensor(3.25))
    assert torch.equal(fake_quantize(torch.tensor(3.25), QuantSpec(2), Groups("token")), torch.tensor(3.25))


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1e-30, 3e30])
@every_spec
def test_constant_groups_are_finite(spec, value):
    x = torch.full((3, 7), value)
    y, grad = run(x, spec, Groups("channel"))
    assert y.isfinite().all()
    assert grad.isfinite().all()
    if value == 0:
        assert torch.equal(y, x) or spec.learns  # a learned step has no knowledge of the zeros
    elif spec.scheme == "affine" and spec.method != "seq":  # whose levels lie about 0
        assert torch.equal(y, x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_spec
def test_nan_and_inf_are_not_hidden(spec, bad):
    """The group that holds one shows it, wherever it stands; the other groups are as without it."""
    torch.manual_seed(0)
    clean = torch.randn(3, 12)
    groups = Groups("channel", 0, 4)
    step = step_for(clean, spec, groups)
    expected, _ = run(clean, spec, groups, step)
    for position in (4, 6, 7):
        x = clean.clone()
        x[1, position] = bad
        y, _ = run(x, spec, groups, step)
        assert not y[1, 4:8].isfinite().all()
        assert not y[1, position].isfinite()
        others = torch.ones(3, 12, dtype=torch.bool)
        others[1, 4:8] = False
        assert torch.equal(y[others], expected[others])
        if not spec.learns:  # lsq has scales of its own: its codes cannot show it, see the next test
            restored = quantize(x, spec, groups).dequantize()
            assert not restored[1, 4:8].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.learns], ids=str)
def test_nan_shows_in_deployed_lsq(spec, bad):
    x = torch.randn(3, 12)
    step = initial_step(x, spec, Groups("channel"))
    x[1, 5] = bad
    restored = quantize(x, spec, Groups("channel"), step=step).dequantize()
    assert not restored[1].isfinite().all()
    assert restored[0].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("pattern", ["1:4", "70%", "50%[2x2]"])
def test_pruning_does_not_hide_nan(pattern, bad):
    torch.manual_seed(0)
    w = torch.randn(4, 12)
    w[2, 3] = bad
    assert sparsity_mask(w, SparsitySpec.parse(pattern), Groups("channel"))[2, 3]
    assert not sparsify(w, SparsitySpec.parse(pattern), Groups("channel"))[2, 3].isfinite()
    for spec in (QuantSpec(1, "linear"), QuantSpec(1.58), QuantSpec(4, "linear")):
        w_s = sparsify(w, SparsitySpec.parse(pattern), Groups("channel"))
        assert not fake_quantize(w_s, spec, Groups("channel"), dense=w)[2].isfinite().all()


@pytest.mark.parametrize("factor", [1e-33, 1e-20, 1e20, 1e33])
@every_spec
def test_magnitude_does_not_matter(spec, factor):
    """Statistics are in units of the step: nothing squares the values themselves."""
    torch.manual_seed(0)
    x, groups = torch.rand(3, 20) + 0.5, Groups("channel")
    x[:, ::3] *= -1
    step = step_for(x, spec, groups)
    y, grad = run(x, spec, groups, step)
    y2, grad2 = run(x * factor, spec, groups, None if step is None else step * factor)
    close = torch.isclose(y2 / factor, y, rtol=1e-4, atol=1e-5)
    assert close.double().mean() > 0.95  # x * factor is rounded: a value near a tie may change its code
    if bool(close.all()):
        torch.testing.assert_close(grad2, grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_subnormal_range_counts_as_constant(bits):
    x = torch.full((1, 6), 1e-40)
    x[0, 3] = 3e-40
    y, grad = run(x, QuantSpec(bits), Groups("channel"))
    assert y.isfinite().all()
    assert grad.isfinite().all()
    assert (y - x).abs().max() < 1e-38


def test_offset_far_from_zero_keeps_its_digits():
    """Values of 1000 with a spread of 1: the statistics are those of the spread."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, dtype=torch.float64)
    y, grad = run((x + 1000).float(), QuantSpec(8), Groups("channel"))
    y64, grad64 = run((x + 1000).float().double(), QuantSpec(8), Groups("channel"))
    torch.testing.assert_close(y.double(), y64, rtol=0, atol=2e-4)  # an ulp of 1000 is 6e-5
    torch.testing.assert_close(grad.double(), grad64, rtol=0, atol=2e-4)


def test_zero_group_of_the_symmetric_8_bit_activation():
    spec = QuantSpec(8, "linear", "block", 4, method="ste")
    x = torch.zeros(2, 8)
    x[1] = torch.linspace(-3, 4, 8)
    y, grad = run(x, spec, Groups.for_activation(spec, conv=False))
    assert torch.equal(y[0], torch.zeros(8))
    for block in (slice(0, 4), slice(4, 8)):
        s = x[1, block].abs().max() / 127
        torch.testing.assert_close(y[1, block], s * torch.round(x[1, block] / s), rtol=0, atol=0)
    assert torch.equal(grad, torch.linspace(-1, 1, 16).reshape(2, 8))


def test_inputs_are_left_alone():
    """In-place work is on temporaries alone, also where a dtype needs no conversion."""
    x = torch.randn(4, 24)
    for spec, groups in itertools.product(SPECS.values(), (Groups("channel"), Groups("token", 0, 5))):
        kept = x.clone()
        step = step_for(x, spec, groups)
        old_step = None if step is None else step.clone()
        leaf = x.requires_grad_()
        h = torch.ones_like(x)
        fake_quantize(leaf, spec, groups, step=step).backward(h)
        quantize(x, spec, groups, step=step)
        assert torch.equal(x.detach(), kept)
        assert torch.equal(h, torch.ones_like(x))
        assert step is None or torch.equal(step, old_step)
        x = x.detach()


def test_lsq_without_a_step_says_what_to_pass():
    with pytest.raises(ConfigError, match="initial_step"):
        fake_quantize(torch.randn(2, 3), QuantSpec(4, method="lsq"), Groups("channel"))
    with pytest.raises(ConfigError, match="initial_step"):
        quantize(torch.randn(2, 3), QuantSpec(4, method="lsq"), Groups("channel"))
