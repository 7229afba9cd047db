"""The transformers library's own loops over a prepared model: its Trainer, its generate, its gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

import qgraph
from qgraph.graph import coverage

IDS = torch.randint(3, 48, (3, 10), generator=torch.Generator().manual_seed(1))


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_dropout=0.1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def t5(seed=0):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=48, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.1, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(48, 32))  # tied, an untrained one repeats its input
    return model


MODELS = {"llama": llama, "t5": t5}


# -- gradient checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "when", "reentrant"),
    [("llama", "before", True), ("llama", "after", False), ("t5", "before", False), ("t5", "after", True)],
)
def test_gradient_checkpointing_changes_no_gradient(name, when, reentrant):
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    found = []
    for enabled in (False, True):
        model = MODELS[name]()
        settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        if enabled and when == "before":
            model.gradient_checkpointing_enable(**settings)
        model = qgraph.prepare(model, "A8W4@8", example_kwargs=inputs).train()
        if enabled and when == "after":
            model.gradient_checkpointing_enable(**settings)
        if reentrant:
            model.enable_input_require_grads()
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(5)
            loss = model(**inputs).loss
            loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
        assert coverage(model).sites == coverage(model).sites_quantized > 0
    (loss, gradients), (again, recomputed) = found
    assert torch.equal(loss, again)
    eps = torch.finfo(torch.float32).eps
    for parameter, gradient in gradients.items():
        # Bit for bit, but where several uses of one weight are summed: a nested backward changes their order.
        assert (gradient - recomputed[parameter]).abs().max() <= 8 * eps * gradient.abs().max(), parameter


# -- generate ----------------------------------------------------------------------------------------------------------


def greedy(model, **options):
    return model.generate(IDS, max_new_tokens=12, do_sample=False, **options)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_with_quantizers_off_are_eagers(name, capture):
    model = MODELS[name]().eval()
    examples = {"input_ids": IDS, "labels": IDS} if name == "t5" else {"input_ids": IDS}
    prepared = qgraph.prepare(model, "A4W2", example_kwargs=examples if capture else None)
    expected = greedy(model)
    with qgraph.disabled(prepared):
        for _ in range(2):  # the first call captures
            assert torch.equal(greedy(prepared), expected)
    assert not torch.equal(greedy(prepared), expected)  # two bits write something else


@pytest.mark.parametrize("config", ["W4", "A8W4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_changes_no_token_where_activations_are_float_or_by_token(name, config):
    # In float64 the products of one token and of all are equal but for 1e-15, so no code falls on another side.
    prepared = qgraph.prepare(MODELS[name]().double().eval(), config)
    cached = greedy(prepared, use_cache=True)
    assert torch.equal(cached, greedy(prepared, use_cache=False))
    assert torch.equal(cached, greedy(prepared, use_cache=True))
    assert len(cached.unique()) > 3


# -- Trainer -----------------------------------------------------------------------------------------------------------


def arguments(folder, **options):
    return TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=5e-3, report_to=[], use_cpu=True,
        disable_tqdm=True, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, logging_steps=3,
        gradient_accumulation_steps=2, max_grad_norm=0.5, warmup_steps=2, seed=3, **options,
    )  # fmt: skip


def rows(count, seed):
    ids = torch.randint(3, 48, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, folder, **options):
    return Trainer(model, arguments(folder, **options), train_dataset=rows(64, 2), eval_dataset=rows(8, 3))


def test_trainer_saves_evaluates_and_resumes(tmp_path):
    # With examples: a first call that captures sums some gradients in another order, so it is no bit for bit repeat.
    examples = {"input_ids": IDS, "labels": IDS}
    whole = trainer(
        qgraph.prepare(llama(), "A8W4@8", example_kwargs=examples), tmp_path / "whole", load_best_model_at_end=True
    )
    whole.train()
    evaluated = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2 and evaluated[1] < evaluated[0]
    assert whole.evaluate()["eval_loss"] == pytest.approx(evaluated[1], rel=1e-6)  # the best was loaded

    fresh = qgraph.prepare(llama(seed=9), "A8W4@8").eval()
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    fresh.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=True)
    trained = whole.model.eval()
    assert torch.equal(fresh(IDS).logits, trained(IDS).logits)
    with qgraph.disabled(trained):  # and any program that reads transformers checkpoints reads the float weights
        assert torch.equal(LlamaForCausalLM.from_pretrained(checkpoint).eval()(IDS).logits, trained(IDS).logits)

    resumed = trainer(qgraph.prepare(llama(seed=9), "A8W4@8", example_kwargs=examples), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name
