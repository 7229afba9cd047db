"""What each pass does to a graph, as text: one file in tests/golden/ a pass and situation."""

from __future__ import annotations

import pytest

from qgraph.config import QConfig, QuantSpec, Rule
from qgraph.passes import (
    QuantizeActivations,
    QuantizeWeights,
    ShareQuantizers,
    SparsifyWeights,
    default_pipeline,
)
from tests.passes import pass_cases as cases
from tests.passes.pass_cases import FLOATS, IDS, IMAGES, check_golden, rewritten_text, unprocessed

W, A, S, SHARE = QuantizeWeights(), QuantizeActivations(), SparsifyWeights(), ShareQuantizers()
LSQ = QConfig(weight=QuantSpec(4), activation=QuantSpec(4, granularity="tensor", method="lsq"))
FLOAT = QConfig.parse("A4W2").with_rules(Rule("*", None))

SITUATIONS = {
    "quantize-weights-linear": (cases.Linear, "W2", FLOATS, (W,)),
    "quantize-weights-keywords": (cases.Keywords, "W2", FLOATS, (W,)),
    "quantize-weights-transposed": (cases.Transposed, "W2", FLOATS, (W,)),
    "quantize-weights-derived": (cases.Derived, "W2", FLOATS, (W,)),
    "quantize-weights-twice": (cases.Twice, "W2", FLOATS, (W,)),
    "quantize-weights-embedding": (cases.Lookup, "W2", IDS, (W,)),
    "quantize-weights-conv": (cases.Conv, "W2", IMAGES, (W,)),
    "quantize-weights-after-sparsify": (cases.Linear, "W2-2:4", FLOATS, (S, W)),
    "quantize-weights-no-site": (cases.Plain, "W2", FLOATS, (W,)),
    "quantize-weights-rule-float": (cases.Linear, FLOAT, FLOATS, (W,)),
    "sparsify-weights-linear": (cases.Linear, "2:4", FLOATS, (S,)),
    "sparsify-weights-twice": (cases.Twice, "70%", FLOATS, (S,)),
    "sparsify-weights-dense-config": (cases.Linear, "W2", FLOATS, (S,)),
    "sparsify-weights-no-site": (cases.Plain, "2:4", FLOATS, (S,)),
    "quantize-activations-linear": (cases.Linear, "A4", FLOATS, (A,)),
    "quantize-activations-conv": (cases.Conv, "A4", IMAGES, (A,)),
    "quantize-activations-embedding": (cases.Lookup, "A4", IDS, (A,)),
    "quantize-activations-no-site": (cases.Plain, "A4", FLOATS, (A,)),
    "quantize-activations-rule-float": (cases.Linear, FLOAT, FLOATS, (A,)),
    "share-quantizers-attention": (cases.Attention, "A4", FLOATS, (A, SHARE)),
    "share-quantizers-in-place": (cases.InPlace, "A4", FLOATS, (A, SHARE)),
    "share-quantizers-indexed-write": (cases.Written, "A4", FLOATS, (A, SHARE)),
    "share-quantizers-view-write": (cases.WrittenView, "A4", FLOATS, (A, SHARE)),
    "share-quantizers-learned-steps": (cases.Attention, LSQ, FLOATS, (A, SHARE)),
    "share-quantizers-nothing-quantized": (cases.Attention, "W2", FLOATS, (SHARE,)),
    "default-pipeline-attention": (cases.Attention, "A4W2-2:4", FLOATS, default_pipeline().passes),
}


NAMES = list(SITUATIONS)


@pytest.mark.parametrize("name", NAMES)
def test_graph_before_and_after(name):
    make, config, inputs, passes = SITUATIONS[name]
    model = unprocessed(make(), config, inputs())
    check_golden(name, rewritten_text(model, passes))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_changes_nothing(name):
    make, config, inputs, passes = SITUATIONS[name]
    model = unprocessed(make(), config, inputs())
    rewritten_text(model, passes)
    assert "# after\n(unchanged)" in rewritten_text(model, passes)


def test_no_golden_file_is_left_over():
    assert {path.stem for path in cases.GOLDEN.glob("*.txt")} == set(SITUATIONS)
