"""The numeric effect of the passes against the operations they stand for, and a second run of them all."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import qgraph
from qgraph.config import QConfig
from qgraph.graph import STATE, states
from qgraph.inspection.code import graph_text
from qgraph.ops import Groups, fake_quantize, sparsify
from qgraph.passes import (
    QuantizeActivations,
    QuantizeWeights,
    ShareQuantizers,
    SparsifyWeights,
    default_pipeline,
)
from qgraph.passes.weights import value_of
from qgraph.pipeline import Pipeline
from tests.models import CASES
from tests.passes.pass_cases import FLOATS, Attention, Derived, Linear, Transposed, eval_graph, unprocessed

CHANNELS, TOKENS = Groups("channel", 0), Groups("token")


def run(model, passes, inputs):
    """The output of a model's root graph after some passes, and its float output."""
    variant, context = eval_graph(model)
    with torch.no_grad():
        before = variant.function()(model, *inputs)
        Pipeline(passes).rewrite(context.owner, variant)
        return variant.function()(model, *inputs), before


def test_a_quantized_weight_is_the_operation_itself():
    inputs, config = FLOATS(), QConfig.parse("W3")
    model = unprocessed(Linear(), config, inputs)
    found, before = run(model, (QuantizeWeights(),), inputs)
    expected = F.linear(inputs[0], fake_quantize(model.w, config.weight, CHANNELS), model.b)
    assert torch.equal(found, expected) and not torch.equal(found, before)


def test_a_sparse_quantized_weight_regresses_on_the_dense_one():
    inputs, config = FLOATS(), QConfig.parse("W2-2:4")
    model = unprocessed(Linear(), config, inputs)
    found, _ = run(model, (SparsifyWeights(), QuantizeWeights()), inputs)
    pruned = sparsify(model.w, config.sparsity, CHANNELS)
    weight = fake_quantize(pruned, config.weight, CHANNELS, dense=model.w)
    assert torch.equal(found, F.linear(inputs[0], weight, model.b))
    assert (weight == 0).sum() >= model.w.numel() // 3  # 6 columns: 2 of 4 pruned, of the last 2 none


def test_pruning_alone():
    inputs, config = FLOATS(), QConfig.parse("50%")
    model = unprocessed(Linear(), config, inputs)
    found, _ = run(model, (SparsifyWeights(), QuantizeWeights()), inputs)
    kept = model.w * (model.w.abs() > model.w.abs().flatten().kthvalue(12).values)
    assert torch.equal(found, F.linear(inputs[0], kept, model.b))


def test_a_quantized_activation_is_the_operation_itself():
    inputs, config = FLOATS(), QConfig.parse("A2")
    model = unprocessed(Linear(), config, inputs)
    found, _ = run(model, (QuantizeActivations(),), inputs)
    assert torch.equal(found, F.linear(fake_quantize(inputs[0], config.activation, TOKENS), model.w, model.b))


def test_a_transposed_weight_keeps_the_groups_of_its_parameter():
    inputs, config = FLOATS(), QConfig.parse("W2")
    model = unprocessed(Transposed(), config, inputs)
    found, _ = run(model, (QuantizeWeights(),), inputs)
    weight = fake_quantize(model.w, config.weight, CHANNELS)
    assert torch.equal(found, F.linear(inputs[0], weight) @ weight)


def test_a_derived_weight_is_quantized_where_it_is_used():
    inputs, config = FLOATS(), QConfig.parse("W2")
    model = unprocessed(Derived(), config, inputs)
    found, _ = run(model, (QuantizeWeights(),), inputs)
    assert torch.equal(found, F.linear(inputs[0], fake_quantize(model.w * model.g, config.weight, CHANNELS)))


def test_sharing_quantizers_changes_no_value():
    inputs, config = FLOATS(), QConfig.parse("A3W3")
    each, shared = (unprocessed(Attention(), config, inputs) for _ in range(2))
    passes = (QuantizeWeights(), QuantizeActivations())
    assert torch.equal(run(each, passes, inputs)[0], run(shared, (*passes, ShareQuantizers()), inputs)[0])


def test_an_open_site_breaks_the_promise_of_the_pass():
    model = unprocessed(Transposed(), "W2", FLOATS())
    variant, context = eval_graph(model)
    assert QuantizeWeights().ensures(variant.graph, context) == "not quantized: w, w"
    QuantizeWeights().run(variant.graph, context)
    assert QuantizeWeights().ensures(variant.graph, context) is None


def test_gradients_go_through_the_inserted_modules():
    inputs = FLOATS()
    model = unprocessed(Linear(), "A4W2-2:4", inputs)
    variant, context = eval_graph(model)
    default_pipeline().rewrite(context.owner, variant)
    variant.function()(model, *inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (model.w, model.b))


def test_the_value_of_a_derived_weight_takes_recorded_sizes():
    inputs = (torch.randn(2, 3, 16), torch.randn(2, 4, 16))
    model = unprocessed(CASES["cross_attention"].make(), "W2", inputs)
    variant, context = eval_graph(model, "mha")
    (split,) = [n for n in variant.graph.nodes if n.target == "split" and "weight" in str(n.args[0])]
    first = next(iter(split.users))
    pieces = value_of(split, context.module)()
    assert [tuple(p.shape) for p in pieces] in ([(16, 16), (32, 16)], [(16, 16)] * 3)
    assert first.graph is variant.graph


@pytest.mark.parametrize("config", ["A4W2", "A4W1-2:4@8"])
@pytest.mark.parametrize("name", CASES)
def test_the_default_pipeline_changes_nothing_in_a_prepared_model(name, config):
    torch.manual_seed(0)
    case = CASES[name]
    inputs = case.inputs(0)
    prepared = qgraph.prepare(case.make(), config, inputs)
    before = snapshot(prepared)
    passes = prepared.__dict__[STATE].shared.pipeline.passes
    for _ in range(2):
        assert default_pipeline().run(prepared) is False
    assert snapshot(prepared) == before
    assert prepared.__dict__[STATE].shared.pipeline.passes == passes


def snapshot(prepared):
    graphs = {
        (path, i): graph_text(variant.graph)
        for path, _, state in states(prepared)
        for i, variant in enumerate(state.variants)
    }
    modules = [(name, str(module)) for name, module in prepared.named_modules()]
    return copy.deepcopy((graphs, modules))
