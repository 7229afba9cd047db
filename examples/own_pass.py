"""Write a pass of one's own: replace every relu of a prepared model by a squared relu.

Run: python examples/own_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

import qgraph


def squared_relu(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    return torch.relu(x).square()


# [pass]
@dataclass(frozen=True)
class SquareRelu(qgraph.Pass):
    """``F.relu(x)`` becomes ``squared_relu(x)``."""

    name = "square-relu"

    def run(self, graph: fx.Graph, context: qgraph.PassContext) -> qgraph.PassResult:
        found = [n for n in graph.nodes if n.op == "call_function" and n.target in (torch.relu, nn.functional.relu)]
        for node in found:
            node.target = squared_relu
        return qgraph.PassResult(modified=bool(found))


# [/pass]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.relu(self.a(x))
        return self.b(hidden)


def main() -> nn.Module:
    torch.manual_seed(0)
    prepared = qgraph.prepare(Net(), "W4", torch.randn(2, 8))
    qgraph.Pipeline((SquareRelu(),)).run(prepared)
    print(qgraph.inspect(prepared).graphs[""])
    return prepared


if __name__ == "__main__":
    main()
