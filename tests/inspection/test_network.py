"""The whole model as one DiGraph."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch import nn

import qgraph
from tests.models import CASES


def network(name, config="A8W4"):
    torch.manual_seed(0)
    case = CASES[name]
    return qgraph.inspect(qgraph.prepare(case.make(), config, case.inputs(0))).to_networkx()


def of(graph, **wanted):
    return [n for n, data in graph.nodes(data=True) if all(data.get(k) == v for k, v in wanted.items())]


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].opaque])
def test_data_flows_from_inputs_through_every_operation_to_the_output(name):
    graph = network(name)
    assert nx.is_directed_acyclic_graph(graph)
    (output,) = of(graph, op="output")
    reaching = nx.ancestors(graph, output)
    inputs = of(graph, op="placeholder")
    assert inputs and all(node.startswith(":") for node in inputs)
    assert any(node in reaching for node in inputs)
    sites = [n for n, data in graph.nodes(data=True) if data.get("site") and data["op"] != "call_module"]
    assert sites and all(node in reaching for node in sites)
    for _, data in graph.nodes(data=True):
        assert {"path", "op", "target", "where"} <= data.keys()


def test_an_mlp_by_hand():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU())
    graph = qgraph.inspect(qgraph.prepare(model, "A8W4", (torch.ones(2, 4),))).to_networkx()
    assert set(graph.edges) == {
        (":input_1", "0:input_q"),
        ("0.weight", "0:weight_q"),
        ("0:input_q", "0:linear"),
        ("0:weight_q", "0:linear"),
        ("0:linear", ":input_3"),
        (":input_3", ":output"),
    }
    linear = graph.nodes["0:linear"]
    assert (linear["path"], linear["target"], linear["shape"], linear["site"]) == (
        "0",
        "linear",
        (2, 3),
        "0.weight",
    )
    quantizer = graph.nodes["0:weight_q"]
    assert (quantizer["site"], quantizer["spec"]) == ("0.weight", "4-bit affine ddt per channel")
    assert (graph.nodes["0.weight"]["op"], graph.nodes["0.weight"]["shape"]) == ("parameter", (3, 4))
    assert (graph.nodes[":input_3"]["kind"], graph.nodes[":input_3"]["path"]) == ("ReLU", "1")


def test_a_tied_parameter_is_one_node():
    graph = network("gpt")
    assert "head.weight" not in graph and graph.nodes["wte.weight"]["op"] == "parameter"
    users = {graph.nodes[node]["path"] for node in graph.successors("wte.weight")}
    assert users == {"wte", "head"}
    assert sum(1 for _ in of(graph, op="parameter", target="wte.weight")) == 1


def test_a_child_called_twice_has_its_operations_twice_and_its_weight_once():
    graph = network("twice")
    assert len(of(graph, path="fc", target="linear")) == 2
    assert {"fc:linear", "fc#2:linear"} <= set(graph)
    assert nx.has_path(graph, "fc:linear", "fc#2:linear")
    assert len(of(graph, op="parameter", target="fc.weight")) == 1


def test_results_of_a_child_that_returns_a_tuple_lead_to_the_right_operations():
    graph = network("recurrent")
    (lstm,) = [n for n in of(graph, path="lstm") if graph.nodes[n]["target"] == "lstm"]
    (gru,) = [n for n in of(graph, path="gru") if graph.nodes[n]["target"] == "gru"]
    means = of(graph, path="", target="mean")
    assert nx.has_path(graph, lstm, gru) and len(means) == 2
    assert all(nx.has_path(graph, lstm, mean) and not nx.has_path(graph, gru, mean) for mean in means)


def test_a_module_that_stays_python_is_one_node_with_its_children_behind_it():
    graph = network("branching")
    (opaque,) = [n for n, data in graph.nodes(data=True) if data.get("python")]
    assert graph.nodes[opaque]["kind"] == "Branching"
    (linear,) = of(graph, path="a", target="linear")
    assert nx.has_path(graph, opaque, linear)


def test_without_graphs_it_says_what_to_do():
    model = nn.Linear(2, 2)
    for found in (qgraph.inspect(model), qgraph.inspect(qgraph.prepare(model, "W4"))):
        with pytest.raises(qgraph.InspectError, match=r"Linear: found no captured graph.*example_inputs"):
            found.to_networkx()
