"""Two processes: DistributedDataParallel and `fully_shard` train as one process does, and sharded models are saved.

A quantizer under `fully_shard` sees the whole weight: FSDP2 gathers the parameters of a module before its forward and
hands out plain tensors, so a group that two shards hold parts of has the statistics that it has in one process. With
`MixedPrecisionPolicy` they are those of the weight in `param_dtype`.
"""

from __future__ import annotations

import pytest
import torch

import qgraph
from tests.loops import processes, ranks
from tests.models import GPT

LEARNED = qgraph.QConfig(qgraph.QuantSpec(4, "linear", "tensor", method="lsq"), qgraph.QuantSpec(8, "linear", "token"))
SPLIT = {  # one scale a weight, so that no shard holds a group whole
    "tensor": qgraph.QConfig(qgraph.QuantSpec(4, "linear", "tensor"), qgraph.QuantSpec(8, "linear", "token")),
    "learned": LEARNED,
}


def worst(ours, theirs):
    """The largest difference of two dicts of tensors, each relative to its largest value."""
    assert ours.keys() == theirs.keys()
    return max(((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()).item() for k in theirs)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_two_processes_train_as_one(tmp_path):
    config = "A8W4@8"
    both = processes.run("tests.loops.ranks:everything", tmp_path, config=config)
    for ways in zip(*(found.items() for found in both), strict=True):
        (way, first), (_, second) = ways
        assert same(first["gradients"], second["gradients"]), way
        assert same(first["parameters"], second["parameters"]) and first["losses"] == second["losses"], way
        dtype = torch.float64 if "float64" in way else torch.float32
        # The same two halves, added in one process: the same sums, so the same bits, over twenty steps.
        halves = ranks.single(config, dtype, parts=2, mixed="mixed" in way)
        assert same(first["gradients"], halves["gradients"]), way
        assert first["losses"] == halves["losses"] and same(first["parameters"], halves["parameters"]), way
        if "mixed" in way:
            continue
        whole = ranks.single(config, dtype, parts=1)
        # The joint batch sums in another order: gradients and losses differ by a few roundings of their largest value.
        eps = torch.finfo(dtype).eps
        assert worst(first["gradients"], whole["gradients"]) < 16 * eps, way
        assert first["losses"] == pytest.approx(whole["losses"], rel=64 * eps), way
        assert first["losses"][-1] < 0.5 * first["losses"][0], way


def test_quantizers_see_whole_weights_in_plain_tensors(tmp_path):
    shapes = {name: tuple(p.shape) for name, p in GPT().named_parameters() if p.dim() > 1}
    for name, found in processes.run("tests.loops.ranks:split_groups", tmp_path, configs=SPLIT)[0].items():
        assert found["seen"] == {site: (False, shapes[site]) for site in shapes}, name
        halves = ranks.single(SPLIT[name], torch.float32, parts=2)
        assert same(found["gradients"], halves["gradients"]) and found["losses"] == halves["losses"], name


def test_a_sharded_run_resumes_and_is_saved_whole(tmp_path):
    found = processes.run("tests.loops.ranks:resumed", tmp_path, config=LEARNED)
    for result in found:
        whole, again = result["losses"]
        assert whole == again
        first, second, third = result["parameters"]
        assert same(second, first) and same(third, first)
    loaded = qgraph.load(tmp_path / "model.safetensors", GPT().eval(), ranks.tokens(0))
    assert same(dict(loaded.named_parameters()), found[0]["parameters"][0])
    assert torch.equal(loaded(ranks.tokens(9)[0]), found[0]["logits"])
