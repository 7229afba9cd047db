"""What is deployed equals what was trained, in integers of the right range."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import SHAPES, groupings, seeds, sparsities, specs, values

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.ops import Groups, fake_quantize, initial_step, quantize, sparsify

cases = st.sampled_from(SHAPES).flatmap(lambda s: st.tuples(st.just(s), groupings(s), seeds, specs()))
dtypes = st.sampled_from((torch.float32, torch.float64, torch.bfloat16))


def check(found, y, x, spec, groups):
    low, high = spec.levels
    assert found.codes.dtype == torch.int16
    assert found.codes.shape == x.shape
    assert int(found.codes.min()) >= low
    assert int(found.codes.max()) <= high
    assert found.scale.shape == groups.shape(x.shape)
    assert found.scale.dtype == torch.float32
    assert (found.zero_point is None) == (spec.scheme == "linear")
    restored = found.dequantize()
    assert restored.dtype == torch.float32
    # Float32 scale and zero point: each product is within some ulps of the largest magnitude of the group.
    # For narrower y, one rounding of y more.
    size = torch.stack([x.double().abs(), y.double().abs()]).amax(0)
    largest = [p.amax(-1, keepdim=True).expand_as(p) for p in groups.pieces(size)]
    ulps = 8 * torch.finfo(torch.float32).eps + (torch.finfo(y.dtype).eps if y.dtype == torch.bfloat16 else 0)
    error = (restored.double() - y.double()).abs()
    assert (error <= ulps * groups.join(largest, x.shape) + 1e-30).all()


@given(cases, dtypes)
def test_dequantize_is_fake_quantize(case, dtype):
    shape, groups, seed, spec = case
    x = values(seed, shape, dtype)
    step = initial_step(x, spec, groups) if spec.learns else None
    y = fake_quantize(x, spec, groups, step=step)
    check(quantize(x, spec, groups, step=step), y, x, spec, groups)


@given(
    st.sampled_from(SHAPES).flatmap(lambda s: st.tuples(st.just(s), groupings(s), seeds)),
    specs(schemes=("linear",)),
    sparsities(),
)
def test_sparse(case, spec, sparsity):
    shape, groups, seed = case
    x = values(seed, shape, torch.float32)
    step = initial_step(x, spec, groups) if spec.learns else None
    pruned = sparsify(x, sparsity, groups)
    y = fake_quantize(pruned, spec, groups, dense=x, step=step)
    found = quantize(pruned, spec, groups, dense=x, step=step)
    check(found, y, x, spec, groups)
    assert found.sparse
    assert (found.codes[pruned == 0] == 0).all()
    if spec.bits == 1:
        assert torch.equal(found.codes, pruned.sign().to(torch.int16))


def test_a_constant_group_has_scale_one_and_code_zero():
    x = torch.tensor([[2.5, 2.5, 2.5], [0.0, 1.0, 2.0]])
    for method in ("ddt", "ste"):
        found = quantize(x, QuantSpec(4, method=method), Groups("channel"))
        assert found.codes[0].tolist() == [0, 0, 0]
        assert found.scale[0].item() == 1
        assert found.zero_point[0].item() == -2.5
        assert torch.equal(found.dequantize()[0], x[0])


def test_binary_codes():
    x = torch.tensor([[-1.0, 0.0, 2.0, -3.0]])
    spec, groups = QuantSpec(1, "linear"), Groups("channel")
    assert quantize(x, spec, groups).codes.tolist() == [[-1, 1, 1, -1]]
    assert quantize(x, spec, groups, dense=x + 0.0).codes.tolist() == [[-1, 0, 1, -1]]


def test_sparsity_alone_keeps_values():
    w = torch.randn(3, 8)
    pruned = sparsify(w, SparsitySpec.parse("2:4"), Groups("channel"))
    found = quantize(pruned, None, Groups("channel"), dense=w)
    assert found.codes is None
    assert found.scale is None
    assert found.spec is None
    assert found.sparse
    assert torch.equal(found.dequantize(), pruned)
    assert found.values.data_ptr() != pruned.data_ptr()


def test_no_gradient_is_recorded():
    w = torch.randn(3, 8, requires_grad=True)
    found = quantize(w, QuantSpec(4), Groups("channel"))
    assert not found.scale.requires_grad
    assert not found.dequantize().requires_grad
