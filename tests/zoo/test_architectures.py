"""A few models, one a family or a way of export; `make zoo` runs them all, each in a process of its own."""

from __future__ import annotations

import pytest

from tests.zoo.run import check_apart

pytest.importorskip("transformers")

FEW = ("electra", "gemma2", "mixtral", "t5", "swin", "detr", "recurrent_gemma", "wav2vec2")


@pytest.mark.parametrize("name", FEW)
def test_architecture(name):
    found = check_apart(name, limit=120)
    assert not found["failures"]
    assert found["sites"] == found["quantized"] > 0


@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        ("bert", 0),  # has a forward that is left Python
        ("SdpaCausal", 0),  # a causal flag that is a size
        ("Translator", 1),  # looks into a mask, where eager breaks
        ("Packed", 0),  # which eager leaves to Python as a whole
        ("EnableGrad", 2),  # a backward inside the forward, where eager breaks
    ],
)
def test_compiles_as_eager_does(name, breaks):
    found = check_apart(name, limit=120, checks=("compile",))
    assert not found["failures"]
    assert found["breaks"] == found["eager_breaks"] == breaks


@pytest.mark.parametrize(
    ("name", "sizes", "shapes"),
    [
        ("SdpaCausal", "x: 0=batch, 1=sequence", 2),
        ("GroupedExperts", "x: 0=batch", 2),
        ("Translator", "source: 0=batch", 2),
        ("Ensembled", "x: 0=batch", 2),
        ("xlnet", "input_ids: 0=batch, 1=sequence; attention_mask: 0=batch, 1=sequence", 2),
        ("Packed", "refused", 0),
    ],
)
def test_exports_or_says_why_not(name, sizes, shapes):
    found = check_apart(name, limit=120, checks=("export",))
    assert not found["failures"]
    assert found["export"].startswith(sizes) and found["export_calls"] == shapes
