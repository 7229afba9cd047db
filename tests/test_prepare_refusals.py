"""What `prepare` refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qgraph
from tests.models import Branching, Functional, Twice
from tests.test_prepare import X, mlp


def test_strict_names_an_uncovered_site_with_file_and_line():
    with pytest.raises(qgraph.CaptureError, match=r"site 'w' \(linear at .*models\.py:\d+\) is in no graph"):
        qgraph.prepare(Branching(), "W4", torch.rand(2, 8), strict=True)
    qgraph.prepare(Functional(), "W4", torch.randn(2, 1, 9, 9), strict=True)


def test_nothing_stays_patched_even_after_a_failure():
    call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
    enter = torch.autocast.__enter__
    with pytest.raises(qgraph.CaptureError):
        qgraph.prepare(mlp(), "W4", torch.randn(2, 7))
    assert nn.Module.__call__ is call and torch.autograd.Function.__dict__["apply"] is apply
    assert torch.autocast.__enter__ is enter
    assert torch._C._len_torch_function_stack() == 0


def test_not_a_module():
    with pytest.raises(qgraph.CaptureError, match=r"expected a torch.nn.Module, found function"):
        qgraph.prepare(mlp)


def test_twice():
    prepared = qgraph.prepare(mlp(), "W4", X)
    with pytest.raises(qgraph.CaptureError, match="prepared already"):
        qgraph.prepare(prepared, "W4")


def test_inputs_that_the_model_rejects_keep_the_users_traceback():
    with pytest.raises(
        qgraph.CaptureError, match=r"does not run on the example inputs \(torch.float32 \(2, 7\)\)"
    ) as e:
        qgraph.prepare(mlp(), "W4", torch.randn(2, 7))
    assert isinstance(e.value.__cause__, RuntimeError) and "mat1" in str(e.value.__cause__)


def test_a_rule_that_matches_nothing_names_near_misses():
    config = qgraph.QConfig.parse("W4").with_rules(qgraph.Rule("fcc", None))
    with pytest.raises(qgraph.ConfigError, match="did you mean 'fc'"):
        qgraph.prepare(Twice(), config)


def test_disabled_on_a_model_that_is_not_prepared():
    with pytest.raises(qgraph.CaptureError, match="not prepared"), qgraph.disabled(mlp()):
        pass
    with pytest.raises(qgraph.ConfigError, match="no quantizer's site matches 'nope'"):
        qgraph.set_enabled(qgraph.prepare(mlp(), "W4", X), True, "nope")
