"""Train a LLaMA of the transformers library at A8W4 with the library's own Trainer.

Run: python examples/transformers_trainer.py      (needs: pip install transformers accelerate)
"""

from __future__ import annotations

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import qgraph


class Counting(Dataset):
    """Sequences that count upwards from a random start, modulo 32."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(16) + i) % 32
        return {"input_ids": ids, "labels": ids}


def main(steps: int = 60) -> tuple[float, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    model = qgraph.prepare(LlamaForCausalLM(config), "A8W4@32")  # graphs are captured at the first batch
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=5e-3, logging_steps=10,
            report_to=[], save_strategy="steps", save_steps=steps, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Counting(), eval_dataset=Counting())
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    print(f"loss {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
