"""What the HTML page shows, as data: boxes, nodes, weights and how they are spread."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import qgraph
from qgraph.inspection.histograms import BINS
from qgraph.inspection.tree import MOST
from qgraph.inspection.view import HIDDEN, view
from tests.models import CASES


def prepared(name, config="A8W4"):
    torch.manual_seed(0)
    case = CASES[name]
    return qgraph.prepare(case.make(), config, case.inputs(0))


def frozen(name):
    return qgraph.freeze(prepared(name))


def path_of(data, node):
    return data["boxes"][node["box"]]["path"]


@pytest.mark.parametrize("name", ["gpt", "resnet", "recurrent", "branching", "twice"])
def test_every_node_and_weight_stands_in_a_box(name):
    found = qgraph.inspect(prepared(name))
    data = json.loads(json.dumps(view(found), allow_nan=False))
    network = found.to_networkx()
    assert [node["id"] for node in data["nodes"]] == list(network)
    assert {tuple(edge) for edge in data["edges"]} == {
        (list(network).index(a), list(network).index(b)) for a, b in network.edges
    }
    for i, box in enumerate(data["boxes"]):
        assert (box["parent"] is None) == (i == 0) and (i == 0 or box["parent"] < i)
    sizes = sum(row["bytes_after"] for row in data["layers"]) + sum(row["bytes"] for row in data["floats"])
    assert sizes == data["totals"]["model_bytes_after"] and data["flow"] is True
    for row in data["layers"]:
        owner = row["site"].rpartition(".")[0]
        assert data["boxes"][row["box"]]["path"] in (owner, owner.rpartition(".")[0])


def test_histograms_count_every_value_and_levels_are_where_the_values_lie():
    model = prepared("gpt", "A4W1@tensor")
    data = view(qgraph.inspect(model))
    row = next(row for row in data["layers"] if row["name"] == "blocks.0.attn.qkv.weight")
    spread = row["histogram"]
    numel = 48 * 16
    assert sum(spread["before"]) == sum(spread["after"]) == numel and len(spread["before"]) == BINS
    quantizer = model.get_submodule("blocks.0.attn.qkv.qgraph.weight")
    values = quantizer(model.blocks[0]["attn"].qkv.weight).detach().unique().tolist()
    assert [level["middle"] for level in spread["levels"]] == pytest.approx(values, rel=1e-4)
    assert [i for i, count in enumerate(spread["after"]) if count] == [
        min(BINS - 1, int((value - spread["low"]) / (spread["high"] - spread["low"]) * BINS)) for value in values
    ]
    tied = next(row for row in data["layers"] if row["tied_to"])
    assert tied["histogram"] is None


def test_a_frozen_weight_has_values_after_alone():
    before, after = (view(qgraph.inspect(m))["layers"][0]["histogram"] for m in (prepared("twice"), frozen("twice")))
    assert after["before"] is None and after["levels"] == before["levels"]
    assert sum(after["after"]) == sum(before["after"]) == 36


def test_what_is_wide_has_no_levels_and_what_is_float_no_after():
    config = qgraph.QConfig.parse("W8").with_rules(qgraph.Rule("0", None))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    data = view(qgraph.inspect(qgraph.prepare(model, config, (torch.randn(2, 8),))))
    plain, wide = (row["histogram"] for row in data["layers"])
    assert plain["after"] is None and sum(plain["before"]) == 64
    assert wide["levels"] == [] and sum(wide["after"]) == 64


def test_a_weight_that_is_not_finite_is_no_error():
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, float("nan"))
    data = view(qgraph.inspect(model))
    json.dumps(data, allow_nan=False)
    assert data["layers"][0]["histogram"] is None


def test_roles_lines_and_bits():
    data = view(qgraph.inspect(prepared("gpt", "A4W1-2:4@16")))
    nodes = {node["id"]: node for node in data["nodes"]}
    roles = {
        ":ids": "input",
        "wte.weight": "parameter",
        "wte:weight_sparsifier_q": "sparsity",
        "wte:weight_q": "weight",
        "wte:embedding": "site",
        "blocks.0.attn.qkv:input_q": "activation",
        ":size": "number",
        "blocks.0.attn:softmax": "op",
        ":output": "output",
    }
    assert {name: nodes[name]["role"] for name in roles} == roles
    assert nodes["blocks.0.attn.qkv:input_q"]["bits"] == 4 and nodes["wte:weight_q"]["bits"] == 1
    qkv = nodes["blocks.0.attn.qkv:linear"]
    assert (qkv["spec"], qkv["bits"]) == ("A4W1-2:4@16", 1)
    assert data["lines"][qkv["where"]] == "q, k, v = self.qkv(x).split(C, dim=2)"
    box = next(box for box in data["boxes"] if box["path"] == "blocks.0.attn")
    assert box["kind"] == "Attention" and "self.qkv(x)" in data["code"][box["code"]]


def test_what_stands_between_the_children_of_a_container_stands_in_it():
    data = view(qgraph.inspect(prepared("gpt")))
    nodes = {node["id"]: node for node in data["nodes"]}
    assert path_of(data, nodes[":blocks_0_ln1"]) == "blocks.0"  # called, without a graph of its own
    between = [node for node in data["nodes"] if node["label"] == "add" and path_of(data, node) == "blocks.0"]
    assert len(between) == 1  # x + attention, before the second half; the sum after it is between two blocks


def test_calls_of_one_module_have_a_box_each():
    data = view(qgraph.inspect(prepared("twice")))
    assert [box["name"] for box in data["boxes"] if box["path"] == "fc"] == ["fc", "fc#2"]


def test_many_children_are_put_into_boxes():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(150)))
    data = view(qgraph.inspect(qgraph.prepare(model, "W4", (torch.ones(1, 4),))))
    held = [0] * len(data["boxes"])
    for box in data["boxes"][1:]:
        held[box["parent"]] += 1
    for node in data["nodes"]:
        held[node["box"]] += node["role"] not in HIDDEN
    assert max(held) <= MOST
    groups = [box for box in data["boxes"] if box.get("group")]
    assert (groups[0]["name"], groups[0]["kind"]) == ("0 – 28", "29 × Linear")  # and the input


def test_without_a_graph_there_are_modules():
    data = view(qgraph.inspect(CASES["gpt"].make()))
    assert data["flow"] is False and data["edges"] == []
    labels = {node["label"]: path_of(data, node) for node in data["nodes"]}
    assert labels["qkv Linear"] == "blocks.1.attn" and labels["wte Embedding"] == ""
    assert all(sum(row["histogram"]["before"]) for row in data["layers"] if row["tied_to"] is None)


def test_a_file_of_ours_has_the_hierarchy_of_its_model(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 16), nn.Sequential(nn.Linear(16, 24), nn.ReLU()), nn.Linear(24, 4))
    example = (torch.randint(9, (2, 5)),)
    path = tmp_path / "net.onnx"
    prepared = qgraph.prepare(model, "W1-2:4", example)
    qgraph.export(prepared, path, example, verify=False, progress=False)
    data = view(qgraph.inspect(path))
    boxes = {box["path"]: i for i, box in enumerate(data["boxes"])}
    unpacking = boxes["1.0.weight"]
    assert data["boxes"][data["boxes"][unpacking]["parent"]]["path"] == "1.0"
    row = next(row for row in data["layers"] if row["name"] == "1.0.weight")
    assert row["box"] == unpacking
    (site,) = [node for node in data["nodes"] if node["role"] == "site" and node["box"] == boxes["1.0"]]
    assert site["label"] in ("Gemm", "MatMul") and site["bits"] == 1
    assert row["histogram"]["before"] is None and sum(row["histogram"]["after"]) == 24 * 16
    assert len(row["histogram"]["levels"]) == 2


def test_a_file_of_others(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="/block/fc/MatMul"),
        helper.make_node("Relu", ["h"], ["y"], name="/block/Relu"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", 8])],
        [value("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(torch.randn(8, 4).numpy(), "w")],
    )
    onnx.save(helper.make_model(graph), tmp_path / "other.onnx")
    data = view(qgraph.inspect(tmp_path / "other.onnx"))
    assert {node["label"]: path_of(data, node) for node in data["nodes"]} == {
        "x": "",
        "w": "block.fc",
        "MatMul": "block.fc",
        "Relu": "block",
        "y": "",
    }
    (row,) = data["layers"]
    assert sum(row["histogram"]["before"]) == 32 and data["boxes"][row["box"]]["path"] == "block.fc"
