"""Fake quantization inside torch.vmap: each member of the batch has groups of its own."""

from dataclasses import replace

import pytest
import torch

import qgraph
from qgraph.config import QuantSpec
from qgraph.ops import Groups, fake_quantize

SPECS = [
    *(QuantSpec(bits, method=method) for bits in (1, 2, 4) for method in ("ddt", "ste")),
    QuantSpec(1.58),
    QuantSpec(2, "linear", method="ste", scale="absmean"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_batch_of_weights_is_quantized_one_by_one(spec, dim):
    def quantized(weight):
        return fake_quantize(weight, spec, Groups("channel", axis=0))

    torch.manual_seed(0)
    batch = torch.randn(3, 4, 6).movedim(0, dim).detach().requires_grad_()
    upstream = torch.randn(3, 4, 6)
    together = torch.vmap(quantized, in_dims=dim)(batch)
    apart = torch.stack([quantized(weight) for weight in batch.unbind(dim)])
    assert torch.equal(together, apart)
    for one, other in zip(
        torch.autograd.grad(together, batch, upstream), torch.autograd.grad(apart, batch, upstream), strict=True
    ):
        assert torch.equal(one, other)


class Ensemble(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.members = torch.nn.ModuleList(torch.nn.Linear(8, 4, bias=False) for _ in range(3))

    def forward(self, x):
        weights = torch.stack([member.weight for member in self.members])
        member = self.members[0]
        return torch.vmap(lambda w: torch.func.functional_call(member, {"weight": w}, (x,)))(weights)


@pytest.mark.parametrize("config", ["W4", "W1-2:4", "70%", "lsq", "seq", "decay"])
def test_stacked_parameters_are_quantized_one_by_one(config):
    weight, sparsity = qgraph.QuantSpec(2), None
    if config == "decay":
        weight = qgraph.QuantSpec(2, "linear", method="ste")
        sparsity = replace(qgraph.SparsitySpec.parse("2:4"), decay=1e-2)
    elif config in ("lsq", "seq"):
        weight = qgraph.QuantSpec(2, method=config)
    chosen = qgraph.QConfig(weight, None, sparsity) if config in ("lsq", "seq", "decay") else config
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    prepared = qgraph.prepare(Ensemble(), chosen, (x,))
    together = prepared(x)
    quantizers = prepared.members[0].qgraph
    apart = []
    for member in prepared.members:
        w = member.weight
        pruned = quantizers["weight__sparsifier"](w) if "weight__sparsifier" in quantizers else w
        if "weight" in quantizers:
            pruned = quantizers["weight"](pruned, w) if pruned is not w else quantizers["weight"](w)
        apart.append(x @ pruned.T)
    torch.testing.assert_close(together, torch.stack(apart))
    weights = [member.weight for member in prepared.members]
    for one, other in zip(
        torch.autograd.grad(together.square().sum(), weights),
        torch.autograd.grad(torch.stack(apart).square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
