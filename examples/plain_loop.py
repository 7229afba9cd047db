"""Train a small network at A4W1 with 2:4 sparsity in a plain loop, and export it packed.

Run: python examples/plain_loop.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import qgraph


def main(path: str = "digits.onnx", epochs: int = 12) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    train, test = slice(0, 1400), slice(1400, None)

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    model = qgraph.prepare(model, "A4W1-2:4", x[:2])  # the one line that is new

    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(1400).split(64):
            loss = F.cross_entropy(model(x[train][batch]), y[train][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    model.eval()
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean().item()
    print(qgraph.inspect(model))
    print(qgraph.export(model, path, (x[:2],)))
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
