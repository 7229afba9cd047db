"""Groups: which values share a scale, and the way to rows and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import SHAPES, groupings, seeds, values

from qgraph.config import QuantSpec
from qgraph.ops import Groups, reference

cases = st.sampled_from((*SHAPES, (), (0,), (3, 0), (0, 4))).flatmap(
    lambda shape: st.tuples(groupings(shape) if shape else st.just(Groups("tensor")), st.just(shape))
)


@given(cases, seeds)
def test_rows_and_back(case, seed):
    groups, shape = case
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    rows = groups.to_rows(x)
    assert torch.equal(groups.from_rows(rows, x.shape), x)
    if x.numel():
        assert torch.equal(rows, reference.rows_of(x, groups))


@given(cases, seeds)
def test_pieces_hold_every_group_once(case, seed):
    """The values of one group, and no others, form one vector of a piece; scales go along."""
    groups, shape = case
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    pieces = groups.pieces(x)
    assert torch.equal(groups.join(pieces, x.shape), x)
    count, per_row = groups.shape(shape)
    assert sum(piece.shape[1] for piece in pieces) == per_row
    numbers = torch.arange(count * per_row).reshape(count, per_row)
    length = groups.to_rows(x).shape[1]
    block = groups.block or max(length, 1)
    expected = numbers[:, (torch.arange(length) // block)] if length else torch.zeros(count, 0, dtype=torch.long)
    cut = groups.cut_scales(numbers, x.shape)
    spread = [n.expand_as(piece) for n, piece in zip(cut, pieces, strict=True)]
    assert torch.equal(groups.to_rows(groups.join(spread, x.shape)), expected)


def test_values_of_a_group_by_hand():
    x = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    full, tail = Groups("channel", 1, 5).pieces(x)
    assert full.tolist() == [[[0, 1, 2, 3, 12]], [[4, 5, 6, 7, 16]], [[8, 9, 10, 11, 20]]]
    assert tail.tolist() == [[[13, 14, 15]], [[17, 18, 19]], [[21, 22, 23]]]
    assert Groups("channel", 1, 5).shape(x.shape) == (3, 2)
    assert Groups("token", 0, 3).shape(x.shape) == (6, 2)
    assert Groups("tensor").shape(x.shape) == (1, 1)
    assert Groups("channel", 0, 99).shape(x.shape) == (2, 1)


def test_a_contiguous_tensor_is_not_copied():
    x = torch.randn(4, 6, 8)
    for groups in (Groups("tensor"), Groups("channel", 0, 5), Groups("token", 0, 3)):
        assert all(p.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for p in groups.pieces(x))


@pytest.mark.parametrize(
    ("granularity", "weight", "linear", "conv"),
    [
        ("tensor", Groups("tensor", 1), Groups("tensor"), Groups("tensor")),
        ("channel", Groups("channel", 1), Groups("token"), Groups("channel", 0)),
        ("token", Groups("token"), Groups("token"), Groups("channel", 0)),
        ("block", Groups("channel", 1, 8), Groups("token", 0, 8), Groups("channel", 0)),
    ],
)
def test_groups_of_specs(granularity, weight, linear, conv):
    spec = QuantSpec(4, granularity=granularity, group_size=8 if granularity == "block" else None)
    assert Groups.for_weight(spec, 1) == weight
    assert Groups.for_activation(spec, conv=False) == linear
    assert Groups.for_activation(spec, conv=True) == conv


def test_groups_without_a_spec():
    assert Groups.for_weight(None, 1) == Groups("channel", 1)
    assert Groups.for_activation(None, conv=False) == Groups("token")


@given(st.sampled_from(SHAPES), seeds)
def test_values_helper_is_deterministic(shape, seed):
    assert torch.equal(values(seed, shape), values(seed, shape))
