"""A few architectures, one a family; `make zoo` runs them all, each in a process of its own."""

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
