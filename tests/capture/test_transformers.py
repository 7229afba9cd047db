"""BERT, GPT-2 and LLaMA of the transformers library, with their own classes."""

from __future__ import annotations

import copy

import pytest
import torch

import qgraph
from qgraph.graph import coverage, sites

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS, IDS2 = (torch.randint(3, 50, s, generator=torch.Generator().manual_seed(0)) for s in ((2, 7), (3, 11)))
MASK = torch.ones_like(IDS)
MASK[0, 5:] = 0


def bert():
    config = transformers.BertConfig(**SMALL, hidden_size=32, intermediate_size=64, max_position_embeddings=40)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        **SMALL, hidden_size=32, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=40
    )
    return transformers.LlamaForCausalLM(config)


MODELS = {"bert": (bert, 17), "gpt2": (gpt2, 11), "llama": (llama, 16)}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    make, count = MODELS[request.param]
    model = make()
    labels = torch.zeros(3, dtype=torch.long) if request.param == "bert" else IDS2
    return model, count, labels


def run(model, training, **kwargs):
    model.train(training)
    model.zero_grad()
    torch.manual_seed(5)
    out = model(**kwargs)
    loss = out.loss if out.loss is not None else out.logits.square().mean()
    loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_quantizers_off_is_bit_for_bit_eager(case):
    model, _, labels = case
    prepared = qgraph.prepare(model, "A8W4", example_kwargs={"input_ids": IDS, "attention_mask": MASK})
    assert isinstance(prepared, type(model)) and list(prepared.state_dict()) == list(model.state_dict())
    calls = ({"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS2}, {"input_ids": IDS2, "labels": labels})
    for training in (False, True):
        for kwargs in calls:
            expected, grads = run(model, training, **kwargs)
            with qgraph.disabled(prepared):
                out, ours = run(prepared, training, **kwargs)
            assert type(out) is type(expected) and list(out) == list(expected)
            assert torch.equal(out.logits, expected.logits)
            assert set(grads) == set(ours) and all(torch.equal(grads[n], ours[n]) for n in grads)


def test_every_site_is_quantized_and_trains(case):
    model, count, labels = case
    prepared = qgraph.prepare(model, "A4W1", example_kwargs={"input_ids": IDS, "attention_mask": MASK})
    found = coverage(prepared)
    assert found.sites == found.sites_quantized == count
    assert all(s.captured for s in sites(prepared))
    expected, expected_grads = run(copy.deepcopy(model), True, input_ids=IDS2, labels=labels)
    out, grads = run(prepared, True, input_ids=IDS2, labels=labels)
    assert not torch.equal(out.logits, expected.logits)
    assert set(expected_grads) <= set(grads) and all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generate_with_a_cache_is_greedy_eager_with_quantizers_off(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    prepared = qgraph.prepare(model, "W4", example_kwargs={"input_ids": IDS})
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": MASK.fill_(1), "pad_token_id": 0}
    with qgraph.disabled(prepared):
        assert torch.equal(prepared.generate(IDS, **options), model.generate(IDS, **options))
    assert prepared.generate(IDS, **options).shape[0] == 2
