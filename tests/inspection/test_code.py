"""Captured graphs as text: the user's names, lines, modes, guards, and none of the interpreter's noise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraph
from qgraph.inspection.code import short_where, tidy
from tests.models import CASES


class Readable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.w = nn.Parameter(torch.ones(3, 4))

    def forward(self, input, scale=2):
        hidden = self.layers[0](input) * scale
        gate = torch.sigmoid(hidden[:, 1:])
        hidden[:, 1:] = gate
        if hidden.shape[0] > 1:
            hidden = self.layers[1](hidden)
        logits = F.linear(hidden, self.w)
        return F.dropout(logits, 0.1, self.training)


def readable():
    return qgraph.prepare(Readable(), "A8W4", (torch.ones(2, 4),))


def test_the_text_reads_like_the_users_code():
    text = qgraph.inspect(readable()).graphs[""]
    evaluated, trained = text.split("\n\n")
    assert re.sub(r" *# .*\n", "", evaluated + "\n").strip() == (
        "def forward(self, input):\n"
        "    w = self.w\n"
        "    w_q = self.qgraph.w(w)\n"
        "    layers_0 = self.layers[0](input)\n"
        "    hidden = layers_0 * 2\n"
        "    __getitem__ = hidden[:, 1:]\n"
        "    gate = torch.sigmoid(__getitem__)\n"
        "    hidden[:, 1:] = gate\n"
        "    size = hidden.size(0)\n"
        "    gt = size > 1\n"
        "    check(gt, True)\n"
        "    hidden_1 = self.layers[1](hidden)\n"
        "    w_input_q = self.qgraph.w__input(hidden_1)\n"
        "    logits = F.linear(w_input_q, w_q)\n"
        "    dropout = F.dropout(logits, p=0.1, training=False, inplace=False)\n"
        "    return dropout"
    )
    assert evaluated.startswith("# the model (Readable), eval\n")
    assert trained.startswith("# the model (Readable), train\n") and "training=True" in trained
    assert "# and while its checks hold: 1" in evaluated


def test_lines_of_the_users_file_stand_before_the_operations():
    text = qgraph.inspect(readable()).graphs[""]
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "logits = F.linear" in line)
    place = next(line for line in reversed(lines[:at]) if line.strip().startswith("# "))
    file, _, number = place.strip("# ").rpartition(":")
    assert file.endswith("test_code.py")
    source = Path(__file__).read_text().splitlines()
    assert source[int(number) - 1].strip() == "logits = F.linear(hidden, self.w)"


@pytest.mark.parametrize("name", CASES)
def test_every_graph_is_python_without_noise(name):
    torch.manual_seed(0)
    prepared = qgraph.prepare(CASES[name].make(), "A4W2-2:4", CASES[name].inputs(0))
    graphs = qgraph.inspect(prepared).graphs
    assert graphs
    for text in graphs.values():
        ast.parse(text)
        assert "= None\n" not in text.replace("=None", "") and ";" not in text and "qgraph_capture" not in text
        assert text.count("def forward(self") >= 1


def test_modes_that_differ_in_nothing_are_one_text():
    graphs = qgraph.inspect(readable()).graphs
    assert list(graphs) == ["", "layers.0", "layers.1"]
    assert graphs["layers.0"].startswith("# layers.0 (Linear), eval and train\n")
    assert graphs["layers.0"].count("def forward") == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("    a = torch._C._nn.linear(x, w);  x = w = None", "    a = F.linear(x, w)"),
        ('    a = getattr(getattr(self.b, "0").c, "1")(x)', "    a = self.b[0].c[1](x)"),
        ("    a = x.mean(dim = -1, keepdim = True)", "    a = x.mean(dim=-1, keepdim=True)"),
        ("    a = x[(slice(None, None, None), slice(1, n, 2), 0)]", "    a = x[:, 1:n:2, 0]"),
        ("    a = x[slice(None, 3, None)]", "    a = x[:3]"),
        ("    x[(slice(None, None, None), 0)] = y;  setitem = x", "    x[:, 0] = y"),
        ("    a = x.__eq__(0)", "    a = x == 0"),
        ("    c = qgraph_capture_guards_check(n, 3, '/a/b.py:4');  n = c = None", "    check(n, 3)"),
    ],
)
def test_tidy(line, expected):
    assert tidy(line) == expected


def test_places_are_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_where(f"{tmp_path}/pkg/model.py:12") == "pkg/model.py:12"
    assert short_where("/far/away/pkg/model.py:12") == "pkg/model.py:12"
    assert short_where("<unknown>:0") == short_where("") == ""
