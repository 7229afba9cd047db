"""Tensor parallelism: column-wise and row-wise Linear layers, made so before they are prepared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qgraph
from tests.loops import processes

CONFIGS = {"W4": "W4", "A8W4@8": "A8W4@8", "A4W1-2:4": "A4W1-2:4"}


def test_layers_over_two_processes_train_as_those_of_one(tmp_path):
    for found in processes.run("tests.loops.ranks:tensor_parallel", tmp_path, configs=CONFIGS):
        for name, (parallel, alone) in found.items():
            # float64: products are summed in two halves, a few roundings, and no code falls on another side.
            assert parallel["losses"] == pytest.approx(alone["losses"], rel=1e-12), name
            for parameter, value in alone["parameters"].items():
                assert torch.allclose(parallel["parameters"][parameter], value, rtol=0, atol=1e-13), (name, parameter)
            assert alone["losses"][-1] < alone["losses"][0]


def test_a_prepared_layer_says_that_it_is_too_late():
    prepared = qgraph.prepare(nn.Sequential(nn.Linear(4, 4)), "W4")
    with pytest.raises(qgraph.CaptureError, match=r"site '0.weight': .* parallelize_module on the float model"):
        # What torch's distribute_tensor reads first.
        eval("weight.is_leaf", {"__name__": "torch.distributed.tensor._api", "weight": prepared[0].qgraph.weight})
    assert not hasattr(prepared[0].qgraph.weight, "is_leaf")
