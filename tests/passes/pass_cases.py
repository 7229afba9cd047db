"""Small models for the passes, one situation each, and golden text: graph before, graph after, notes.

Regenerate the files in tests/golden/ with ``QGRAPH_UPDATE_GOLDEN=1 pytest tests/passes`` and read the diff.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.capture.driver import capture, install_all
from qgraph.config import QConfig
from qgraph.graph import STATE, Shared, states
from qgraph.inspection.code import graph_text
from qgraph.pipeline import Pass, PassContext, Pipeline

GOLDEN = Path(__file__).parent.parent / "golden"
UPDATE = "QGRAPH_UPDATE_GOLDEN"


class Weights(nn.Module):
    """A model with parameters of its own, by name and shape."""

    def __init__(self, **shapes):
        super().__init__()
        torch.manual_seed(0)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * 0.3))


class Linear(Weights):
    def __init__(self):
        super().__init__(w=(4, 6), b=(4,))

    def forward(self, x):
        return F.linear(x, self.w, self.b)


class Transposed(Weights):
    """One parameter as it is and transposed: one quantizer, before the transpose."""

    def __init__(self):
        super().__init__(w=(4, 6))

    def forward(self, x):
        hidden = F.linear(x, self.w)
        return hidden @ self.w.t().t()


class Derived(Weights):
    """A weight made of two parameters: quantized where it is used."""

    def __init__(self):
        super().__init__(w=(4, 6), g=(4, 1))

    def forward(self, x):
        scaled = self.w * self.g
        return F.linear(x, scaled)


class Twice(Weights):
    def __init__(self):
        super().__init__(w=(6, 6))

    def forward(self, x):
        first = F.linear(x, self.w)
        return F.linear(first, self.w)


class Lookup(Weights):
    def __init__(self):
        super().__init__(table=(9, 6))

    def forward(self, ids):
        return F.embedding(ids, self.table)


class Conv(Weights):
    def __init__(self):
        super().__init__(kernel=(4, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, weight=self.kernel, padding=1)


class Keywords(Weights):
    def __init__(self):
        super().__init__(w=(4, 6))

    def forward(self, x):
        return F.linear(weight=self.w, input=x)


class Attention(Weights):
    """Three sites on one tensor: quantized once."""

    def __init__(self):
        super().__init__(wq=(6, 6), wk=(6, 6), wv=(6, 6))

    def forward(self, x):
        q, k, v = F.linear(x, self.wq), F.linear(x, self.wk), F.linear(x, self.wv)
        return F.scaled_dot_product_attention(q, k, v)


class InPlace(Weights):
    """Two sites on one tensor, which changes in between: two quantizers."""

    def __init__(self):
        super().__init__(a=(6, 6), b=(6, 6))

    def forward(self, x):
        y = x * 1
        first = F.linear(y, self.a)
        y.add_(1)
        return first + F.linear(y, self.b)


class Written(Weights):
    """The same with an indexed write, through a view."""

    def __init__(self):
        super().__init__(a=(6, 6), b=(6, 6))

    def forward(self, x):
        y = x * 1
        first = F.linear(y, self.a)
        y[:, 0] = 0
        return first + F.linear(y, self.b)


class WrittenView(Weights):
    """The same with a write to a view that has a name of its own."""

    def __init__(self):
        super().__init__(a=(6, 6), b=(6, 6))

    def forward(self, x):
        y = x * 1
        head = y[:, 0]
        first = F.linear(y, self.a)
        head *= 0
        return first + F.linear(y, self.b)


class Plain(Weights):
    """No site at all: parameters are added, activations multiply each other."""

    def __init__(self):
        super().__init__(w=(6,))

    def forward(self, x):
        return torch.softmax(x @ x.transpose(-1, -2), -1).sum(-1, keepdim=True) * self.w


FLOATS, IDS, IMAGES = (
    lambda: (torch.linspace(-1, 1, 3 * 5 * 6).reshape(3, 5, 6),),
    lambda: (torch.tensor([[0, 3, 8]]),),
    lambda: (torch.linspace(-1, 1, 2 * 3 * 5 * 5).reshape(2, 3, 5, 5),),
)


def unprocessed(model: nn.Module, config: str | QConfig, inputs: tuple) -> nn.Module:
    """A captured copy of a model on which no pass has run."""
    model = copy.deepcopy(model)
    install_all(model, Shared(QConfig.parse(config), Pipeline(()), model_name=type(model).__name__))
    capture(model, inputs, {}, lambda mode: None)
    return model


def eval_graph(model: nn.Module, path: str = ""):
    """The eval graph of one module, and the context that a pass gets for it."""
    for found, module, state in states(model):
        if found == path:
            variant = next(v for v in state.variants if not v.training)
            return variant, PassContext(state.owner(module), False)
    raise LookupError(path)


def rewritten_text(model: nn.Module, passes: tuple[Pass, ...]) -> str:
    """Graph before, graph after and the notes of some passes on the eval graph of a model's root, as text."""
    variant, context = eval_graph(model)
    before = graph_text(variant.graph, where=False)
    notes = model.__dict__[STATE].shared.notes
    notes.clear()
    modified = Pipeline(passes).rewrite(context.owner, variant)
    after = graph_text(variant.graph, where=False) if modified else "(unchanged)"
    said = "\n".join(f"{note.pass_name}: {note.site}: {note.text}" for note in notes) or "(none)"
    return f"# before\n{before}\n\n# after\n{after}\n\n# notes\n{said}\n"


def check_golden(name: str, text: str) -> None:
    """Compare with tests/golden/<name>.txt, or write it where the environment asks for it."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get(UPDATE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path} is missing; write it with {UPDATE}=1 and read it"
    assert text == path.read_text(), f"differs from {path.name}; if that is meant, regenerate with {UPDATE}=1"
