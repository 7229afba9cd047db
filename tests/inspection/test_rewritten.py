"""`inspect(m).code` and `.passes`, and what `prepare(dump_dir=...)` writes."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraph
from qgraph.errors import InspectError
from tests.models import CASES


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.w = nn.Parameter(torch.ones(3, 4))

    def forward(self, x):
        hidden = torch.relu(self.layers[0](x))
        return F.linear(self.layers[1](hidden), self.w)


def net(**options):
    torch.manual_seed(0)
    return qgraph.prepare(Net(), "A8W4-2:4", (torch.ones(2, 4),), **options)


def test_the_diff_shows_what_was_inserted_below_the_users_line():
    code = qgraph.inspect(net()).code("")
    lines = code.diff.splitlines()
    assert lines[:2] == ["--- the model (Net), eval and train, before", "+++ the model (Net), eval and train, after"]
    added = [line[1:].strip() for line in lines[3:] if line.startswith("+")]
    assert added == [
        "w_sparsifier_q = self.qgraph.w__sparsifier(w)",
        "w_q = self.qgraph.w(w_sparsifier_q, w)",
        "w_input_q = self.qgraph.w__input(layers_1)",
        "linear = F.linear(w_input_q, w_q)",
    ]
    assert [line[1:].strip() for line in lines[3:] if line.startswith("-")] == ["linear = F.linear(layers_1, w)"]
    number = Net.forward.__code__.co_firstlineno
    assert any(line.strip().endswith(f"test_rewritten.py:{number + 2}") for line in lines)
    assert "qgraph" not in code.before[0] and code.after[0] in qgraph.inspect(net()).graphs[""]


@pytest.mark.parametrize("name", CASES)
def test_both_sides_of_every_module_are_the_diff_taken_apart(name):
    torch.manual_seed(0)
    prepared = qgraph.prepare(CASES[name].make(), "A4W2-2:4", CASES[name].inputs(0))
    found = qgraph.inspect(prepared)
    for path in found.graphs:
        code = found.code(path)
        for before, after, diff in zip(code.before, code.after, code.diff.split("\n\n"), strict=True):
            assert "self.qgraph" not in before
            if before != after:
                body = diff.splitlines()[3:]
                assert [line[1:] for line in body if line[0] in " -"] == before.splitlines()
                assert [line[1:] for line in body if line[0] in " +"] == after.splitlines()


def test_colours_are_only_colours(capsys, monkeypatch):
    code = qgraph.inspect(net()).code("layers.0")
    coloured = code.text(color=True)
    assert "\x1b[32m+" in coloured and "\x1b[31m-" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == code.diff == code.text(color=False) == repr(code)
    print(code)
    assert capsys.readouterr().out == code.diff + "\n"  # no terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert str(code) == coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(code) == code.diff


def test_a_module_without_quantizers_says_so_and_where_they_are():
    def code(*rules):
        model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), nn.Tanh())
        config = qgraph.QConfig.parse("W4").with_rules(*rules)
        return qgraph.inspect(qgraph.prepare(model, config, torch.ones(2, 4))).code("0").diff

    assert code().startswith("# 0 (Sequential), eval and train: nothing inserted but in 0.1\n")
    assert code(qgraph.Rule("0.1", None)).startswith("# 0 (Sequential), eval and train: nothing inserted\n")


def test_of_many_modules_a_title_names_the_first():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    code = qgraph.inspect(qgraph.prepare(model, "W4", torch.ones(2, 4))).code("")
    assert "nothing inserted but in 0, 1, 2, 3, 4, 5 and 3 more\n" in code.diff


def test_wrong_paths_and_other_models_are_said():
    found = qgraph.inspect(net())
    with pytest.raises(InspectError, match=r"no module 'layers\.O'.*'layers\.0'"):
        found.code("layers.O")
    with pytest.raises(InspectError, match="has no code"):
        qgraph.inspect(Net()).code("")
    with pytest.raises(InspectError, match="has no passes"):
        _ = qgraph.inspect(Net()).passes
    with pytest.raises(InspectError, match="it has not run yet"):
        qgraph.inspect(qgraph.prepare(Net(), "W4")).code("")
    case = CASES["branching"]
    with pytest.raises(InspectError, match="it stays Python: "):
        qgraph.inspect(qgraph.prepare(case.make(), "W4", case.inputs(0))).code("")


def test_passes_say_what_they_did_site_by_site():
    records = {record.name: record for record in qgraph.inspect(net()).passes}
    assert list(records) == ["sparsify-weights", "quantize-weights", "quantize-activations", "share-quantizers"]
    weights = records["quantize-weights"]
    assert {note.site for note in weights.notes} == {"w", "layers.0.weight", "layers.1.weight"}
    assert all(record.seconds > 0 for record in records.values())
    text = str(weights)
    assert text.startswith("quantize-weights (") and " ms)\n" in text and "  layers.0.weight: 4-bit" in text


def test_a_dump_has_each_graph_before_and_after_each_pass(tmp_path):
    folder = tmp_path / "a" / "dump"
    prepared = net(dump_dir=folder)
    names = sorted(path.name for path in folder.iterdir())
    steps = ["0-captured", "1-sparsify-weights", "2-quantize-weights", "3-quantize-activations", "4-share-quantizers"]
    graphs = sorted({name.split("-0-captured")[0] for name in names if "-0-captured" in name})
    assert names == sorted(f"{graph}-{step}.{kind}" for graph in graphs for step in steps for kind in ("txt", "json"))
    assert [graph[:4] for graph in graphs] == [f"{i:04d}" for i in range(1, len(graphs) + 1)]
    own = next(graph for graph in graphs if graph.endswith("-model-eval"))
    texts = [(folder / f"{own}-{step}.txt").read_text() for step in steps]
    assert "qgraph" not in texts[0] and "w__sparsifier" in texts[1] and "qgraph.w(" not in texts[1]
    assert "qgraph.w(" in texts[2] and "w__input" in texts[3]
    code = qgraph.inspect(prepared).code("")
    assert texts[0] == code.before[0] + "\n" and texts[-1] == code.after[0] + "\n"
    data = json.loads((folder / f"{own}-2-quantize-weights.json").read_text())
    assert (data["module"], data["pass"]) == ("", "quantize-weights") and data["seconds"] > 0
    node = next(node for node in data["nodes"] if node["target"] == "qgraph.w")
    assert node["op"] == "call_module" and node["inputs"] == ["w_sparsifier_q", "w"] and node["shape"] == [3, 4]


def test_graphs_captured_later_and_by_copies_are_dumped_too(tmp_path):
    torch.manual_seed(0)
    prepared, x = qgraph.prepare(Net(), "W4", dump_dir=tmp_path), torch.ones(2, 4)
    assert not list(tmp_path.iterdir())
    copy.deepcopy(prepared)(x)
    count = len(list(tmp_path.iterdir()))
    expected = prepared(x)
    later = len(list(tmp_path.iterdir()))
    assert later == 2 * count > 0
    again = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(again(x), expected)
    assert len(list(tmp_path.iterdir())) == later
