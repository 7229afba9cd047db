"""Models of the transformers library, with their own classes and outputs: packed, verified, dynamic."""

import onnx
import pytest
import torch

import qgraph
from qgraph.exporters.onnx import export

transformers = pytest.importorskip("transformers")

VOCABULARY = 120
SIZES = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def bert():
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=48, **SIZES)
    return transformers.BertForSequenceClassification(config), {}


def gpt2():
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4, n_positions=48)
    return transformers.GPT2LMHeadModel(config), {"use_cache": False}


def llama():
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **SIZES)
    return transformers.LlamaForCausalLM(config), {"use_cache": False}


@pytest.mark.parametrize(("make", "config"), [(bert, "A8W4@32"), (gpt2, "A4W2"), (llama, "W1.58")])
def test_transformers(make, config, tmp_path):
    torch.manual_seed(0)
    model, kwargs = make()
    ids = torch.randint(0, VOCABULARY, (2, 9))
    kwargs["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
    net = qgraph.prepare(model.eval(), config, (ids,), example_kwargs=kwargs)
    report = export(net, tmp_path / "m.onnx", (ids,), example_kwargs=kwargs)
    assert report.inputs == ("input_ids", "attention_mask") and "logits" in report.outputs
    assert "0=batch, 1=sequence" in report.dynamic[0]
    assert report.max_difference is not None and report.max_difference < 1e-5
    linear = sum(isinstance(m, torch.nn.Linear | transformers.pytorch_utils.Conv1D) for m in model.modules())
    assert sum("Mul" in layer.op or "Gemm" in layer.op for layer in report.layers) == linear
    names = {tensor.name for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert not any(name.endswith(("_proj.weight", "dense.weight")) for name in names)
