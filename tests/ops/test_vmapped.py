"""Fake quantization inside torch.vmap: each member of the batch has groups of its own."""

import pytest
import torch

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
