"""Place the quantizers of torch's own layers before any graph is captured.

Their operands are known without an example, so that all state (learned steps above all) exists right after `prepare`:
an optimizer sees it and a strict load_state_dict finds it.
"""

from __future__ import annotations

from torch import nn

from qgraph.graph import states
from qgraph.placement import Owner, Placed
from qgraph.sites import Operand, SiteCall, Source

_LAYERS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str, int, bool, bool], ...] = (
    (nn.Linear, "linear", 0, False, True),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv", 0, True, True),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "conv_transpose", 1, True, True),
    ((nn.Embedding, nn.EmbeddingBag), "embedding", 0, False, False),
)


def place_in_standard_layers(prepared: nn.Module) -> None:
    """Make the quantizers of Linear, Conv, ConvTranspose and Embedding layers whose weight is a plain parameter."""
    for _, module, state in states(prepared):
        for kinds, op, axis, conv, has_input in _LAYERS:
            if isinstance(module, kinds) and isinstance(module._parameters.get("weight"), nn.Parameter):
                _place(state.owner(module), module, op, axis, conv, has_input)


def _place(owner: Owner, module: nn.Module, op: str, axis: int, conv: bool, has_input: bool) -> None:
    weight = module._parameters["weight"]
    if weight is None or nn.parameter.is_lazy(weight):
        return
    site = owner.shared.canonical_name(owner.path, "weight")
    source = Source("parameter", (site,), exact=True).of(weight.dtype)
    owner.weight(Placed(Operand(1, "weight", "weight", axis), source, "weight", site), lambda: weight)
    if has_input:
        placed = Placed(
            Operand(0, "input", "input"), Source("data").of(weight.dtype), "input", f"{owner.path}.input".lstrip(".")
        )
        owner.activation(placed, SiteCall(op, (), conv))
