"""A low-bit recipe: float first, then fewer and fewer bits and weights, held to the float model, masks fixed last.

Run: python examples/recipe.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import qgraph


def main(path: str = "recipe.onnx", steps: int = 300) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = slice(0, 1400), slice(1400, None)

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    model = qgraph.prepare(model, qgraph.QConfig.parse("A4W8-2:4"), x[:2])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        qgraph.QuantizationStart(model, at=steps // 10),
        qgraph.SparsityRamp(model, start=steps // 10, end=steps // 2),
        qgraph.ProgressiveBits(model, {steps // 3: 4, steps // 2: 1}),
        qgraph.FreezeMasks(model, at=3 * steps // 4),
    ]
    for _ in range(steps):
        batch = torch.randint(0, 1400, (64,))
        output, to_float = qgraph.distill(model, x[train][batch], temperature=2.0)
        loss = F.cross_entropy(output, y[train][batch]) + 0.5 * to_float
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()

    model.eval()
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean().item()
    print(qgraph.inspect(model))
    print(qgraph.export(model, path, (x[:2],)))
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
