"""What `print` shows, as golden text in tests/golden/inspect/; dB and line numbers, which may move, are masked."""

from __future__ import annotations

import re

import pytest
import torch

import qgraph
from qgraph.config import QConfig, Rule
from tests.models import CASES
from tests.passes.pass_cases import check_golden

RULES = QConfig.parse("A4W1-2:4@8").with_rules(Rule("head", None), Rule("lstm", "W1.58"))

SITUATIONS = {
    "cnn": ("cnn", "A4W1", True, 120),
    "gpt-tied": ("gpt", "A8W4@8", True, 120),
    "gpt-narrow": ("gpt", "A8W4@8", True, 80),
    "recurrent-rules": ("recurrent", RULES, True, 120),
    "branching-opaque": ("branching", "W2", True, 120),
    "unet-before-the-first-call": ("unet", "W4", False, 120),
    "resnet-eager": ("resnet", None, False, 120),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_text(name):
    case, config, example, width = SITUATIONS[name]
    torch.manual_seed(0)
    model, inputs = CASES[case].make(), CASES[case].inputs(0)
    if config is not None:
        model = qgraph.prepare(model, config, inputs if example else None)
    text = qgraph.inspect(model).text(width)
    text = re.sub(r"\S*models\.py:\d+", "models.py:N", text)
    text = re.sub(r" +\d+\.\d$", "  N.N", text, flags=re.MULTILINE)
    check_golden(f"inspect/{name}", f"{text}\n")
