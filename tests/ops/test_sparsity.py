"""Masks against a reference that sorts in Python, their invariants, and that pruned weights come back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import SHAPES, groupings, seeds, sparsities, values

import qgraph
from qgraph.config import QConfig, QuantSpec, SparsitySpec
from qgraph.errors import ConfigError
from qgraph.ops import Groups, fake_quantize, quantize, reference, selection, sparsify, sparsity_mask

cases = st.sampled_from(SHAPES).flatmap(lambda s: st.tuples(st.just(s), groupings(s), seeds))


@given(cases, sparsities())
def test_mask_against_the_reference(case, sparsity):
    """Ties included: `values` repeats some magnitudes."""
    shape, groups, seed = case
    w = values(seed, shape)
    assert torch.equal(sparsity_mask(w, sparsity, groups), reference.sparsity_mask(w, sparsity, groups))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["2:4", "3:5", "1:32", "70%", "50%[2x3]"])
def test_mask_in_every_dtype(pattern, dtype):
    w = torch.randn(6, 70, generator=torch.Generator().manual_seed(3)).to(dtype)
    sparsity, groups = SparsitySpec.parse(pattern), Groups("channel")
    assert torch.equal(sparsity_mask(w, sparsity, groups), sparsity_mask(w.double(), sparsity, groups))


@given(st.integers(1, 32).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))), st.integers(1, 70), seeds)
def test_exactly_n_of_every_m(counts, length, seed):
    """Also where all magnitudes are equal, or zero; the ragged run at the end keeps n, or all it has."""
    n, m = counts
    sparsity = SparsitySpec("n:m", n=n, m=m)
    w = torch.randn(3, length, generator=torch.Generator().manual_seed(seed))
    w[1], w[2] = 1.0, 0.0
    mask = sparsity_mask(w, sparsity, Groups("channel"))
    for run in mask.split(m, dim=1):
        assert (run.sum(dim=1) == min(n, run.shape[1])).all()
    assert mask[1].nonzero().flatten().tolist() == [i for i in range(length) if i % m < n]
    assert torch.equal(mask[1], mask[2])


@given(st.floats(0.01, 0.99), st.integers(1, 300), seeds)
def test_exact_fraction(ratio, length, seed):
    w = torch.randn(2, length, generator=torch.Generator().manual_seed(seed)).mul(2).round()  # many ties
    mask = sparsity_mask(w, SparsitySpec("unstructured", ratio=ratio), Groups("channel"))
    assert int(mask.sum()) == max(1, 2 * length - round(ratio * 2 * length))
    if not bool(mask.all()):
        assert w[mask].abs().min() >= w[~mask].abs().max()


def test_tiles_are_kept_or_pruned_whole():
    w = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    mask = sparsity_mask(w, SparsitySpec.parse("50%[2x4]"), Groups("channel"))
    tiles = [tile for band in mask.split(2, 0) for tile in band.split(4, 1)]
    assert all(bool(tile.all()) or not bool(tile.any()) for tile in tiles)
    assert sum(bool(tile.all()) for tile in tiles) == len(tiles) - round(0.5 * len(tiles))


def test_a_tile_at_the_edge_is_judged_by_its_mean():
    """Its few values weigh as much as those of a full tile."""
    w = torch.ones(2, 5)
    w[:, 4] = 2.0
    mask = sparsity_mask(w, SparsitySpec("block", ratio=0.5, block_shape=(2, 4)), Groups("channel"))
    assert mask.tolist() == [[False] * 4 + [True]] * 2


def test_runs_follow_the_channels_also_under_one_scale():
    """Per-tensor scales do not let a run cross from one channel into the next."""
    w = torch.tensor([[3.0, 1.0, 2.0], [1.0, 9.0, 2.0]])
    expected = [[True, False, False], [False, True, False]]
    for groups in (Groups("tensor"), Groups("channel"), Groups("channel", 0, 2), Groups("token")):
        assert sparsity_mask(w, SparsitySpec("n:m", n=1, m=3), groups).tolist() == expected
    transposed = sparsity_mask(w.t(), SparsitySpec("n:m", n=1, m=3), Groups("tensor", 1))
    assert transposed.t().tolist() == expected


@pytest.mark.parametrize("pattern", ["2:4", "70%", "50%[2x2]"])
def test_identity_gradient_and_empty(pattern):
    sparsity = SparsitySpec.parse(pattern)
    w = torch.randn(4, 9, requires_grad=True)
    h = torch.randn(4, 9)
    y = sparsify(w, sparsity, Groups("channel"))
    assert torch.equal(y, torch.where(sparsity_mask(w, sparsity, Groups("channel")), w, 0))
    assert torch.equal(torch.autograd.grad(y, w, h)[0], h)
    for shape in ((0,), (0, 4), (4, 0)):
        assert sparsify(torch.zeros(shape), sparsity, Groups("channel")).shape == shape


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(1, "linear"),
        QuantSpec(1.58),
        QuantSpec(4, "linear"),
        QuantSpec(4, "linear", method="ste"),
        QuantSpec(1, "linear", method="ste", scale="absmean"),
        None,
    ],
    ids=str,
)
def test_pruned_weights_come_back(spec):
    """Training recovers a support that is wrong at the start: true weights sit where pruning put zeros."""
    torch.manual_seed(0)
    groups, sparsity = Groups("channel"), SparsitySpec("n:m", n=2, m=4)
    target = torch.tensor([[0.0, 0.0, 1.0, -1.0] * 4] * 3)
    w = torch.tensor([[0.6, -0.6, 0.02, -0.02] * 4] * 3).requires_grad_()
    inputs = torch.randn(256, 16)
    start = sparsity_mask(w, sparsity, groups)
    optimizer = torch.optim.SGD([w], lr=0.05)

    def deployed():
        pruned = sparsify(w, sparsity, groups)
        return pruned if spec is None else fake_quantize(pruned, spec, groups, dense=w)

    losses = []
    for _ in range(150):
        loss = (inputs @ (deployed() - target).t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    end = sparsity_mask(w, sparsity, groups)
    assert not bool((start & (target != 0)).any())
    assert torch.equal(end, target != 0)
    assert losses[-1] < 0.05 * losses[0]
    if spec is not None:
        codes = quantize(sparsify(w, sparsity, groups), spec, groups, dense=w).codes
        assert torch.equal(codes != 0, target != 0)


@pytest.mark.parametrize("kind", ["distinct", "many equal", "all equal", "mostly zero", "tiny", "one huge"])
@pytest.mark.parametrize("share", [0.0001, 0.3, 0.5, 0.9, 1.0])
def test_search_for_a_threshold(kind, share):
    """Long vectors on a CPU: exactly as many as asked, the largest, and of equal ones the first."""
    x = torch.randn(20_011, generator=torch.Generator().manual_seed(3)).abs()
    if kind == "many equal":
        x = x.mul(4).round().div(4)
    elif kind == "all equal":
        x = torch.full_like(x, 0.3)
    elif kind == "mostly zero":
        x = torch.where(x > 1.5, x, 0)
    elif kind == "tiny":
        x = x * 1e-42
    elif kind == "one huge":
        x[77] = 3e38
    kept = max(1, round(share * x.numel()))
    order = sorted(range(x.numel()), key=lambda i: (-float(x[i]), i))
    expected = torch.zeros(x.numel(), dtype=torch.bool)
    expected[order[:kept]] = True
    assert torch.equal(selection.largest(x, kept).bool(), expected)
    sparsity = SparsitySpec("unstructured", ratio=max(1e-6, min(1 - kept / x.numel(), 1 - 1e-6)))
    assert torch.equal(sparsity_mask(-x, sparsity, Groups("channel")), expected) or kept in (1, x.numel())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinite_values_of_a_long_vector_are_kept(bad):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(3))
    x[[5, 19_999]] = bad
    mask = sparsity_mask(x, SparsitySpec.parse("90%"), Groups("channel"))
    assert mask[[5, 19_999]].all() and int(mask.sum()) == 2000


def test_sr_ste_pulls_pruned_weights_alone():
    """Zhou et al.: the gradient of a pruned weight has decay times the weight added, that of a kept one nothing."""
    linear = torch.nn.Linear(8, 3, bias=False)
    config = QConfig(QuantSpec(4, "linear", method="ste"), None, SparsitySpec("n:m", n=2, m=4, decay=0.3))
    plain = QConfig(QuantSpec(4, "linear", method="ste"), None, SparsitySpec("n:m", n=2, m=4))
    x = torch.randn(5, 8)
    grads = []
    for wanted in (config, plain):
        prepared = qgraph.prepare(linear, wanted, x)
        prepared(x).square().sum().backward()
        grads.append(prepared.weight.grad)
    weight = linear.weight.detach()
    pruned = ~sparsity_mask(weight, config.sparsity, Groups("channel"))
    torch.testing.assert_close(grads[0] - grads[1], 0.3 * weight * pruned)
    assert SparsitySpec.parse(str(config.sparsity)) == config.sparsity and QConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="SR-STE"):
        QConfig(QuantSpec(1, "linear"), None, config.sparsity)
