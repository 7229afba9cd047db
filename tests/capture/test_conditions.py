"""torch.cond in a forward: the branch that its predicate says, in eager mode."""

import pytest
import torch
from torch import nn

import qgraph


class Either(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        return torch.cond(x.sum() > 0, lambda y: self.second(y) * 2, lambda y: self.third(y), (x,))


@pytest.mark.parametrize("examples", [False, True])
def test_the_branch_of_the_predicate_runs_quantized(examples):
    torch.manual_seed(0)
    model, x = Either(), torch.randn(3, 4)
    prepared = qgraph.prepare(model, "A4W2", *[(x,)] * examples)
    taken = set()
    for inputs in (x, -x, x):
        with qgraph.disabled(prepared):
            out = prepared(inputs)
            assert torch.equal(out, model(inputs))
        quantized = prepared(inputs)
        assert not torch.equal(quantized, out)
        quantized.sum().backward()
        branch = "second" if prepared.second.weight.grad is not None else "third"
        assert bool(getattr(prepared, branch).weight.grad.isfinite().all())
        taken.add(branch)
        prepared.zero_grad()
    assert taken == {"second", "third"}
    coverage = qgraph.inspect(prepared).coverage
    assert coverage.sites_quantized == coverage.sites == 3
