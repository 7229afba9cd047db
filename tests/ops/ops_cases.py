"""Random specs, groups and tensors for the tests of the operations."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.ops import Groups

settings.register_profile("ops", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ops")

BITS = (1, 1.58, 2, 3, 4, 5, 6, 7, 8)
SHAPES = ((7,), (1, 1), (3, 10), (4, 33), (2, 3, 5), (3, 4, 3, 3), (2, 2, 3, 2, 2))
SCALES = ("minmax", "absmean", "windowed")
seeds = st.integers(0, 2**32 - 1)
lams = st.sampled_from((0.0, 0.01, 0.3))


@st.composite
def specs(draw, methods=("ddt", "ste", "lsq", "seq"), schemes=("affine", "linear"), scales=SCALES):
    """A QuantSpec of any width; granularity is left to `groupings`."""
    method = draw(st.sampled_from(methods))
    wanted = BITS if "linear" in schemes else BITS[:1] + BITS[2:]
    if method == "seq":
        wanted = wanted[: -6 if "affine" in schemes else -7]
    bits = draw(st.sampled_from(wanted))
    scheme = "linear" if bits == 1.58 else draw(st.sampled_from(schemes))
    if (method, bits) == ("seq", 2):
        scheme = "affine"
    scale = draw(st.sampled_from(scales)) if method in ("ddt", "ste") else "minmax"
    return QuantSpec(bits, scheme, method=method, scale=scale, lam=draw(lams))


@st.composite
def groupings(draw, shape):
    """Groups of any kind for a tensor of `shape`, ragged blocks and blocks longer than the row among them."""
    kind = draw(st.sampled_from(("tensor", "channel", "token")))
    block = None if kind == "tensor" else draw(st.sampled_from((None, 1, 2, 4, 7, 64)))
    return Groups(kind, draw(st.integers(-len(shape), len(shape) - 1)), block)


@st.composite
def sparsities(draw):
    kind = draw(st.sampled_from(("n:m", "unstructured", "block")))
    if kind == "n:m":
        m = draw(st.integers(1, 32))
        return SparsitySpec("n:m", n=draw(st.integers(1, m)), m=m)
    ratio = draw(st.sampled_from((0.1, 0.5, 0.7, 0.95)))
    if kind == "unstructured":
        return SparsitySpec("unstructured", ratio=ratio)
    return SparsitySpec("block", ratio=ratio, block_shape=draw(st.tuples(st.integers(1, 4), st.integers(1, 5))))


def values(seed: int, shape, dtype=torch.float64) -> torch.Tensor:
    """Random values with an offset, a scale and an outlier of their own; some repeat, some are 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    spread, offset = (torch.rand(2, generator=generator, dtype=torch.float64) * 4 - 2).tolist()
    x = x * 10**spread + offset * (seed % 3)
    if seed % 5 == 0:
        x.view(-1)[0] *= 50
    if seed % 7 == 0:
        x = x.mul(4).round().div(4)
    return x.to(dtype)
