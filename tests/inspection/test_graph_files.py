"""The network with what is known of its weights, and as a file for other tools."""

from __future__ import annotations

import json
import sys

import networkx as nx
import pytest
import torch
from torch import nn

import qgraph
from qgraph.inspection.graph_files import write_dot


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 2))
    config = qgraph.QConfig.parse("A8W4").with_rules(qgraph.Rule("0", None), qgraph.Rule("2", "W1"))
    return qgraph.inspect(qgraph.prepare(net, config, (torch.randn(3, 4),)))


def test_sites_say_what_is_done_to_their_weights(found):
    nodes = found.to_networkx().nodes
    sites = {name: data for name, data in nodes(data=True) if "quantized" in data}
    assert {name: (d["quantized"], d["spec"], d["bits"]) for name, d in sites.items()} == {
        "0:linear": (False, "float", 32),
        "2:linear": (True, "W1", 1),
        "3:linear": (True, "A8W4", 4),
    }
    assert nodes["0:linear"]["reason"] == "a rule leaves it float"
    rows = {row.site: row for row in found.layers}
    assert nodes["2:linear"]["error_db"] == rows["2.weight"].error_db


def test_bytes_of_parameters_add_up_to_the_models(found):
    nodes = found.to_networkx().nodes(data=True)
    for side in ("before", "after"):
        total = sum(data.get(f"bytes_{side}", 0) for _, data in nodes)
        assert total == getattr(found.totals, f"model_bytes_{side}")


def test_bytes_of_a_file_add_up_too(found, tmp_path):
    path = tmp_path / "net.onnx"
    qgraph.export(found.source, path, (torch.randn(3, 4),), verify=False, progress=False)
    file = qgraph.inspect(path)
    graph = file.to_networkx()
    assert sum(data.get("bytes_after", 0) for _, data in graph.nodes(data=True)) == file.totals.model_bytes_after
    assert {d["site"]: d["bits"] for _, d in graph.nodes(data=True) if "quantized" in d}["2.weight"] == 1


def test_graphml_is_read_back(found, tmp_path):
    graph = found.to_networkx()
    read = nx.read_graphml(found.to_graphml(tmp_path / "net.graphml"))
    assert set(read.edges) == set(graph.edges)
    linear = read.nodes["2:linear"]
    assert (linear["shape"], linear["bits"], linear["quantized"], linear["path"]) == ("3x6", 1.0, True, "2")


def test_nodes_and_links_are_read_back(found, tmp_path):
    graph = found.to_networkx()
    data = json.loads(found.to_node_link(tmp_path / "net.json").read_text())
    read = nx.node_link_graph(data, edges="links")
    assert set(read.edges) == set(graph.edges)
    assert read.nodes["2:linear"] == {**graph.nodes["2:linear"], "shape": [3, 6]}


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # of pydot's own parser
def test_dot_is_read_back(tmp_path):
    pydot = pytest.importorskip("pydot", reason="pydot is not installed")
    graph = nx.DiGraph()
    graph.add_node('a "b"\\ :c', op="call_module", target="weight", spec="2-bit", bits=2, shape=(3, 4))
    graph.add_edge('a "b"\\ :c', "d:e")
    graph.nodes["d:e"].update(op="output", target='"out"')
    (dot,) = pydot.graph_from_dot_file(str(write_dot(graph, tmp_path / "net.dot")))
    assert {json.loads(node.get_name()) for node in dot.get_nodes()} == set(graph)
    assert {tuple(map(json.loads, (e.get_source(), e.get_destination()))) for e in dot.get_edges()} == set(graph.edges)
    quantizer, output = dot.get_nodes()
    assert (quantizer.get("label"), quantizer.get("fillcolor")) == ('"weight\\n2-bit"', '"#f2a31b"')
    assert (json.loads(output.get("label")), output.get("shape")) == ('"out"', '"ellipse"')


def test_dot_without_pydot_says_what_to_do(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydot", None)
    with pytest.raises(qgraph.InspectError, match=r"written by pydot, which is not installed.*qgraph\[dot\]"):
        found.to_dot(tmp_path / "net.dot")
    assert list(tmp_path.iterdir()) == []
