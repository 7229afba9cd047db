"""Train a small network at A4W4 with Lightning: its Trainer, its checkpoints, schedules stepped by a callback.

Run: python examples/lightning_loop.py      (needs: pip install "qgraph[lightning]")
"""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qgraph


class Schedules(L.Callback):
    """Steps qgraph's schedules after each batch, and keeps their state in Lightning's checkpoints."""

    def __init__(self, *schedules: qgraph.Schedule) -> None:
        self.schedules = schedules

    def on_train_batch_end(self, *_: object) -> None:
        for schedule in self.schedules:
            schedule.step()

    def state_dict(self) -> dict[str, object]:
        return {"schedules": [schedule.state_dict() for schedule in self.schedules]}

    def load_state_dict(self, state_dict: dict) -> None:
        for schedule, state in zip(self.schedules, state_dict["schedules"], strict=True):
            schedule.load_state_dict(state)


class Digits(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-3)


def main(folder: str = "lightning", epochs: int = 8) -> float:
    L.seed_everything(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    net = qgraph.prepare(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)), "A4W4", x[:2])
    schedules = Schedules(qgraph.QuantizationStart(net, at=44))  # two epochs in float
    trainer = L.Trainer(max_epochs=epochs, default_root_dir=folder, accelerator="cpu", callbacks=[schedules])
    trainer.fit(Digits(net), DataLoader(TensorDataset(x[:1400], y[:1400]), 64, shuffle=True))
    return (net.eval()(x[1400:]).argmax(1) == y[1400:]).float().mean().item()


if __name__ == "__main__":
    print(f"accuracy {main():.3f}")
