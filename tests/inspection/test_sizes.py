"""Bits, bytes and dB against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import qgraph
from qgraph.config import QConfig
from qgraph.inspection.sizes import (
    bits_per_weight,
    code_bits,
    describe_groups,
    error_db,
    log2_choose,
    ratio_db,
    stored_bytes,
)
from qgraph.ops import Groups
from qgraph.sites import Operand, groups_for_weight

# notation, shape, bits of codes and pattern, bytes with scales and zero points
CASES = [
    ("W4", (8, 16), 512, 64 + 8 * 8),
    ("W8", (3, 5), 120, 15 + 3 * 8),
    ("W3@tensor", (3, 5), 45, 6 + 8),
    ("W4@12", (8, 16), 512, 64 + 16 * 8),  # 12 and a ragged 4: two groups a row
    ("W4@128", (8, 16), 512, 64 + 8 * 8),  # a block longer than the row is the row
    ("W2", (4, 3, 3, 3), 216, 27 + 4 * 8),
    ("W1.58", (8, 16), 128 * math.log2(3), 26 + 8 * 4),  # 202.9 bits; linear, so no zero points
    ("W1-2:4@8", (4, 16), 16 * (math.log2(6) + 2), 10 + 8 * 4),  # C(4, 2) = 6 patterns a run
    ("W2-1:4", (2, 6), 2 * (2 + 2 + 1 + 2), 2 + 2 * 4),  # a run of 4, and one of 2 of which 1 is kept
    ("W1-50%", (4, 4), math.log2(12870) + 8, 3 + 4 * 4),  # C(16, 8) = 12870
    ("W1-50%[2x2]", (4, 4), math.log2(6) + 8, 2 + 4 * 4),  # 4 tiles, 2 of them kept
    ("50%", (4, 4), math.log2(12870) + 8 * 32, 34),
    ("2:4", (2, 8), 4 * (math.log2(6) + 64), 34),
]


@pytest.mark.parametrize(("notation", "shape", "bits", "size"), CASES)
def test_bits_and_bytes(notation, shape, bits, size):
    config = QConfig.parse(notation)
    groups = groups_for_weight(config.weight, Operand(1, "weight", "weight", 0))
    given = (shape, config.weight, config.sparsity, groups)
    assert code_bits(*given) == pytest.approx(bits)
    assert stored_bytes(*given) == size
    scales = 8 * (size - math.ceil(bits / 8))
    assert bits_per_weight(*given) == pytest.approx((bits + scales) / math.prod(shape))


def test_groups_as_text():
    assert describe_groups(Groups("channel", 0, 128), (64, 300)) == "192 x 128"
    assert describe_groups(Groups("channel", 0, 128), (64, 100)) == "64 x 100"
    assert describe_groups(Groups("tensor"), (4, 5)) == "1 x 20"
    assert describe_groups(Groups("channel", 1), (6, 4, 3, 3)) == "4 x 54"
    assert describe_groups(Groups("channel", 0), (0, 4)) == "0 x 0"


@pytest.mark.parametrize(("n", "k", "count"), [(4, 2, 6), (32, 16, 601080390), (100, 3, 161700)])
def test_log2_choose(n, k, count):
    assert log2_choose(n, k) == pytest.approx(math.log2(count), rel=1e-12)


def test_decibels_by_hand():
    assert ratio_db(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])) == pytest.approx(20.0)  # 25 / 0.25
    assert ratio_db(torch.tensor([1.0]), torch.tensor([0.0])) == math.inf
    assert ratio_db(torch.zeros(3), torch.zeros(3)) == math.inf


def test_the_error_of_pruning_by_hand():
    weight = torch.tensor([[3.0, 1.0], [-1.0, 3.0]])
    found = error_db(weight, None, QConfig.parse("1:2").sparsity, Groups("channel"))
    assert found == pytest.approx(10.0)  # |w|^2 = 20, pruned 2


def test_the_error_of_rounding_by_hand():
    # Levels -3, -1, 1, 3; the 2 lies half way between the upper two and goes to the even code 2, which is 1.
    spec = qgraph.QuantSpec(2, method="ste")
    weight = torch.tensor([[-3.0, -1.0, 2.0, 3.0]])
    expected = 10 * math.log10((9 + 1 + 4 + 9) / 1)
    assert error_db(weight, spec, None, Groups("channel")) == pytest.approx(expected, abs=1e-4)


def test_more_bits_lose_less():
    torch.manual_seed(0)
    weight, groups = torch.randn(16, 64), Groups("channel")
    errors = [error_db(weight, qgraph.QuantSpec(bits), None, groups) for bits in range(1, 9)]
    assert errors == sorted(errors)
    assert all(4 < b - a < 8 for a, b in itertools.pairwise(errors[2:]))  # about 6 dB a bit


@pytest.mark.parametrize("config", ["A8W4@8", "W1.58", "A4W1-2:4@8", "W3-50%", "2:4"])
def test_a_row_holds_what_the_sites_own_quantizer_gives(config):
    torch.manual_seed(0)
    prepared = qgraph.prepare(nn.Sequential(nn.Linear(24, 8)), config, (torch.randn(2, 24),))
    (row,) = qgraph.inspect(prepared).layers
    weight, container = prepared[0].weight.detach(), prepared[0].qgraph
    result = container["weight__sparsifier"](weight) if "weight__sparsifier" in container else weight
    if "weight" in container:
        result = container["weight"](result, weight) if result is not weight else container["weight"](weight)
    noise = (weight - result.detach()).double().square().sum()
    assert row.error_db == pytest.approx(10 * math.log10(weight.double().square().sum() / noise), rel=1e-6)
    parsed = QConfig.parse(config)
    assert (row.spec, row.bytes_before) == (config, 24 * 8 * 4)
    assert row.bytes_after == stored_bytes((8, 24), parsed.weight, parsed.sparsity, row_groups(container))


def row_groups(container):
    return next(iter(container._modules.values())).groups


def test_bfloat16_weights_take_two_bytes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4, bias=False)).bfloat16()
    (row,) = qgraph.inspect(qgraph.prepare(model, "W4")).layers
    assert (row.dtype, row.bytes_before, row.bytes_after) == ("bfloat16", 128, 32 + 32)
    assert 15 < row.error_db < 35
