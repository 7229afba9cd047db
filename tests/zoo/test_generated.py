"""Random models through the checks of the zoo; ``python -m tests.zoo.generator --seed N`` runs any other seed."""

from __future__ import annotations

import pytest

from qgraph import sites
from tests.zoo.generator import search

PARTS, MODELS = 10, 50  # 500 models; in parts, so that the workers share them


@pytest.mark.parametrize("seed", range(PARTS))
def test_random_models(seed):
    search(seed, MODELS)


def test_a_failing_model_is_shrunk_to_what_fails(monkeypatch):
    monkeypatch.delitem(sites._TABLE, "linear")  # no Linear is quantized any more
    with pytest.raises(AssertionError, match="float in a product") as caught:
        search(0, 30)
    code = str(caught.value)
    compile(code[code.index("import dataclasses") :], "printed", "exec")
    assert code.count("class ") == 1 and code.count("nn.Linear") <= 2
