"""Pipelines: a pass of the user's own, errors that name the pass, conditions, the callback, text form."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qgraph
from qgraph.errors import ConfigError, PassError
from qgraph.graph import STATE, states
from qgraph.passes import KNOWN, QuantizeWeights, default_pipeline
from qgraph.pipeline import Note, Pass, PassContext, PassResult, Pipeline
from tests.models import CASES


@dataclass(frozen=True)
class ReluToGelu(Pass):
    """A pass of the user's own: ``relu(x)`` becomes ``gelu(x)``."""

    approximate: str = "none"
    name: ClassVar[str] = "relu-to-gelu"

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        notes = []
        for node in graph.find_nodes(op="call_function", target=F.relu):
            with graph.inserting_after(node):
                new = graph.call_function(F.gelu, (node.args[0],), {"approximate": self.approximate})
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            notes.append(Note(self.name, context.path, f"{node.name} is {new.name}"))
        return PassResult(bool(notes), tuple(notes))


class Net(nn.Module):
    def __init__(self, act=F.relu):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.act = nn.Linear(6, 8), nn.Linear(8, 3), act

    def forward(self, x, twice=False):
        x = self.act(self.a(x))
        if twice:
            x = self.act(x * 2)
        return self.b(F.dropout(x, 0.5, self.training))


X = torch.linspace(-2, 2, 24).reshape(4, 6)


def outputs(model, *args):
    result = []
    for training in (False, True):
        torch.manual_seed(1)
        result.append(model.train(training)(*args))
    return torch.stack(result)


def test_a_pass_of_the_users_own_is_honoured_in_eval_train_and_later_graphs():
    prepared, expected = (qgraph.prepare(Net(act), "A8W4", (X,)) for act in (F.relu, F.gelu))
    before = outputs(prepared, X)
    assert Pipeline((ReluToGelu(),)).run(prepared) is True
    assert not torch.equal(outputs(prepared, X), before)
    assert torch.equal(outputs(prepared, X), outputs(expected, X))
    for _ in range(2):  # the first call of this signature runs Python and is captured, the second runs its graph
        later = outputs(prepared, X, True)
    assert torch.equal(later, outputs(expected, X, True))
    graphs = qgraph.inspect(prepared).graphs[""]
    assert "gelu" in graphs and "relu" not in graphs and graphs.count("def forward") >= 3


def test_it_runs_once_and_says_what_it_did():
    prepared = qgraph.prepare(Net(), "A8W4", (X,))
    pipeline = Pipeline((ReluToGelu("tanh"),))
    assert pipeline.run(prepared) is True
    assert pipeline.run(prepared) is False
    shared = prepared.__dict__[STATE].shared
    assert str(shared.pipeline) == f"{default_pipeline()},relu-to-gelu{{approximate=tanh}}"
    assert any(note.pass_name == "relu-to-gelu" for note in shared.notes)
    assert "note: relu-to-gelu: the model: x_1 is gelu" in str(qgraph.inspect(prepared))


def test_it_survives_a_copy_of_the_model():
    prepared = qgraph.prepare(Net(), "A8W4", (X,))
    Pipeline((ReluToGelu(),)).run(prepared)
    assert torch.equal(outputs(copy.deepcopy(prepared), X), outputs(prepared, X))


@dataclass(frozen=True)
class Failing(Pass):
    """Fails in the way that `how` says."""

    how: str
    name: ClassVar[str] = "failing"

    def requires(self, graph, context):
        return "needs another graph" if self.how == "requires" else None

    def ensures(self, graph, context):
        return "kept no promise" if self.how == "ensures" else None

    def run(self, graph, context):
        if self.how == "raises":
            raise ValueError("cannot go on")
        if self.how == "own error":
            raise PassError("this weight is odd")
        if self.how == "config error":
            raise ConfigError("bits are wrong")
        if self.how == "lint":
            first, second = [n for n in graph.nodes if n.op != "placeholder"][:2]
            first.append(second)
            second.append(first)
            graph.output(second)
        if self.how == "arguments":
            graph.placeholder("extra")
        if self.how == "half":
            ReluToGelu().run(graph, context)
            raise ValueError("half way")
        return PassResult(False)


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("raises", PassError, "cannot go on"),
        ("own error", PassError, "this weight is odd"),
        ("config error", ConfigError, "bits are wrong"),
        ("requires", PassError, "needs another graph"),
        ("ensures", PassError, "kept no promise"),
        ("lint", PassError, ""),
        ("arguments", PassError, "changed the arguments"),
    ],
)
def test_an_error_names_the_pass_those_before_it_and_the_module(how, kind, words):
    prepared = qgraph.prepare(Net(), "A8W4", (X,))
    with pytest.raises(kind) as caught:
        Pipeline((ReluToGelu(), Failing(how))).run(prepared)
    text = str(caught.value)
    for part in (words, f"failing{{how={how}}}", "module ''", "passes before: relu-to-gelu"):
        assert part in text, text


def test_an_error_in_a_child_names_its_path():
    prepared = qgraph.prepare(CASES["gpt"].make(), "A8W4", CASES["gpt"].inputs(0))

    @dataclass(frozen=True)
    class Picky(Pass):
        name: ClassVar[str] = "picky"

        def requires(self, graph, context):
            return "not here" if context.path == "blocks.1.attn" else None

        def run(self, graph, context):
            return PassResult(False)

    with pytest.raises(PassError, match=r"pass picky on module 'blocks\.1\.attn' \(passes before: none\)"):
        Pipeline((Picky(),)).run(prepared)


def test_a_failed_pass_leaves_the_graphs_as_they_were():
    prepared = qgraph.prepare(Net(), "A8W4", (X,))
    graphs, before = qgraph.inspect(prepared).graphs, outputs(prepared, X)
    with pytest.raises(PassError, match="half way"):
        Pipeline((Failing("half"),)).run(prepared)
    assert qgraph.inspect(prepared).graphs == graphs
    assert torch.equal(outputs(prepared, X), before)
    assert prepared.__dict__[STATE].shared.pipeline == default_pipeline()


def test_a_model_that_is_not_prepared_is_refused():
    with pytest.raises(PassError, match=r"Net is not prepared: call qgraph\.prepare"):
        Pipeline((ReluToGelu(),)).run(Net())


def test_the_callback_sees_every_pass_on_every_graph():
    prepared = qgraph.prepare(Net(), "A8W4", (X,))
    seen = []
    passes = (QuantizeWeights(), ReluToGelu())
    Pipeline(passes, lambda name, path, graph, seconds: seen.append((name, path, seconds))).run(prepared)
    graphs = sum(len(state.variants) for _, _, state in states(prepared))
    assert len(seen) == 2 * graphs
    assert {entry[:2] for entry in seen} == {(p.name, path) for p in passes for path in ("", "a", "b")}
    assert all(seconds >= 0 for *_, seconds in seen)


def test_text_form():
    pipeline = Pipeline((QuantizeWeights(), ReluToGelu("tanh"), ReluToGelu()))
    text = "quantize-weights,relu-to-gelu{approximate=tanh},relu-to-gelu{approximate=none}"
    assert str(pipeline) == text
    assert Pipeline.parse(text, (*KNOWN, ReluToGelu)) == pipeline
    assert Pipeline.parse(str(default_pipeline()), KNOWN) == default_pipeline()


@pytest.mark.parametrize("text", ["quantise-weights", "quantize-weights{bits=1", "quantize-weights;share-quantizers"])
def test_text_with_a_typo_is_an_error(text):
    with pytest.raises(PassError):
        Pipeline.parse(text, KNOWN)


def test_text_with_an_unknown_option_is_an_error():
    with pytest.raises(PassError, match=r"quantize-weights.*bits"):
        Pipeline.parse("quantize-weights{bits=1}", KNOWN)
