"""The JSON for Model Explorer, and that package's own classes where it is installed."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from torch import nn

import qgraph
from qgraph.inspection.explorer import explorer_graphs
from tests.models import CASES


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    case = CASES["gpt"]
    return qgraph.prepare(case.make(), "A4W1-2:4@16", case.inputs(0))


def attributes(node):
    return {item["key"]: item["value"] for item in node["attrs"]}


def test_nodes_have_namespaces_edges_and_what_is_known_of_them(model):
    found = qgraph.inspect(model)
    collection = explorer_graphs(found)
    (graph,) = collection["graphs"]
    nodes = {node["id"]: node for node in graph["nodes"]}
    network = found.to_networkx()
    assert {(e["sourceNodeId"], n) for n in nodes for e in nodes[n]["incomingEdges"]} == set(network.edges)
    linear = nodes["blocks.0.attn.qkv:linear"]
    assert (linear["label"], linear["namespace"]) == ("linear", "blocks/0/attn/qkv")
    known = attributes(linear)
    assert (known["spec"], known["bits"], known["site"]) == ("A4W1-2:4@16", "1", "blocks.0.attn.qkv.weight")
    assert known["error"].endswith(" dB") and known["source"] == "q, k, v = self.qkv(x).split(C, dim=2)"
    weight = attributes(nodes["blocks.0.attn.qkv.weight"])
    row = next(row for row in found.layers if row.name == "blocks.0.attn.qkv.weight")
    assert (weight["bytes_before"], weight["bytes_after"]) == (str(row.bytes_before), str(row.bytes_after))
    labels = [nodes[f"blocks.0.attn.qkv:{name}"]["label"] for name in ("weight_q", "weight_sparsifier_q", "input_q")]
    assert labels == ["quantize weight", "prune weight.sparsifier", "quantize input"]
    colors = [nodes[f"blocks.0.attn.qkv:{name}"].get("style") for name in ("weight_q", "input_q", "linear")]
    assert colors[0] == colors[2] != colors[1] and "style" not in nodes["blocks.0.attn:softmax"]
    assert graph["groupNodeAttributes"][""]["bytes after"] == f"{found.totals.model_bytes_after:,}"
    assert "bytes after" in graph["groupNodeAttributes"]["blocks/0/attn"]


def test_the_file_is_written_without_the_package(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_explorer", None)
    path = qgraph.explore(model, tmp_path / "gpt.json", open=False)
    assert json.loads(path.read_text())["graphs"][0]["id"] == "GPT"
    with pytest.raises(qgraph.InspectError, match=r"not installed.*qgraph\[explorer\].*open=False"):
        qgraph.explore(model)


def test_it_is_opened_with_the_file(monkeypatch):
    opened = []
    fake = types.SimpleNamespace(visualize=lambda path, **options: opened.append((path, options)))
    monkeypatch.setitem(sys.modules, "model_explorer", fake)
    path = qgraph.explore(nn.Linear(2, 2), port=8099)
    assert opened == [(str(path), {"port": 8099})] and path.name == "Linear.json"
    (node,) = json.loads(path.read_text())["graphs"][0]["nodes"]
    assert node["label"] == "Linear"


def test_model_explorers_own_classes_take_it(model):
    builder = pytest.importorskip("model_explorer.graph_builder", reason="Model Explorer is not installed")
    dacite = pytest.importorskip("dacite", reason="Model Explorer is not installed")
    made = dacite.from_dict(builder.GraphCollection, explorer_graphs(qgraph.inspect(model)), dacite.Config(strict=True))
    assert isinstance(made.graphs[0].nodes[0], builder.GraphNode)
