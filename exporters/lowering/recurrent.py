"""LSTM, GRU and RNN layers as ONNX LSTM, GRU and RNN nodes, for any sequence length.

torch.export unrolls a recurrent layer over the example's length. So while tracing, calls of torch's
recurrent functions become one operator, `qgraph::recurrent`, which is translated to the ONNX operators here.
Source: https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html and onnx__RNN.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnxscript import opset18 as op
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qgraph.errors import ExportError
from qgraph.exporters.where import calling_line

# torch's gate blocks in the order in which ONNX wants them: LSTM i f g o -> i o f c, GRU r z n -> z r h
GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_FUNCTIONS: dict[Any, str] = {
    torch._VF.lstm: "LSTM",
    torch._VF.gru: "GRU",
    torch._VF.rnn_tanh: "RNN_TANH",
    torch._VF.rnn_relu: "RNN_RELU",
}


@torch.library.custom_op("qgraph::recurrent", mutates_args=())
def recurrent(
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    kind: str,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """A whole recurrent layer stack in eval: (output, final states...), as torch._VF computes it."""
    function = next(f for f, name in _FUNCTIONS.items() if name == kind)
    state: Any = states if kind == "LSTM" else states[0]
    return list(function(x, state, weights, has_biases, num_layers, 0.0, False, bidirectional, batch_first))


@recurrent.register_fake
def _recurrent_shapes(
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    kind: str,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    return [x.new_empty((x.shape[0], x.shape[1], width)), *(torch.empty_like(state) for state in states)]


class RecurrentAsOperator(TorchFunctionMode):
    """While active, torch's recurrent functions call `qgraph::recurrent`.

    Packed sequences and projections (`proj_size`) have no form in ONNX and are refused.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "_pack_padded_sequence":
            raise _no_form("a packed sequence", "pass the padded tensor to the recurrent layer")
        kind = _FUNCTIONS.get(func) if name in NAMES else None
        if kind is None or kwargs or len(args) != 9 or not isinstance(args[2], list | tuple):
            return func(*args, **(kwargs or {}))
        x, state, weights, has_biases, num_layers, _, _, bidirectional, batch_first = args
        states = list(state) if kind == "LSTM" else [state]
        per_cell = 4 if has_biases else 2
        if len(weights) != per_cell * num_layers * (1 + bool(bidirectional)):
            raise _no_form("an LSTM with proj_size", "take an LSTM without it and a Linear after it")
        results = torch.ops.qgraph.recurrent(
            x, states, list(weights), kind, has_biases, num_layers, bidirectional, batch_first
        )
        return tuple(results)


def _no_form(what: str, advice: str) -> ExportError:
    return ExportError(
        f"export: {calling_line('_trace') or 'the model'} uses {what}, which has no form in ONNX; expected a recurrent "
        f"layer on a padded tensor; {advice}"
    )


def translate(
    x: Any,
    states: Sequence[Any],
    weights: Sequence[Any],
    kind: str,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Any]:
    """`qgraph::recurrent` as one ONNX recurrent node per layer."""
    directions = 2 if bidirectional else 1
    per_cell = 4 if has_biases else 2
    hidden = int(states[0].shape[-1])
    y = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    finals: list[list[Any]] = [[] for _ in states]
    for layer in range(num_layers):
        rows = slice(layer * directions, (layer + 1) * directions)
        cells = [list(weights[i * per_cell : (i + 1) * per_cell]) for i in range(rows.start, rows.stop)]
        initial = [_rows(state, rows.start, rows.stop) for state in states]
        y, last = _layer(y, cells, initial, kind, hidden)
        for collected, value in zip(finals, last, strict=True):
            collected.append(value)
    results = [op.Transpose(y, perm=[1, 0, 2]) if batch_first else y]
    return results + [op.Concat(*values, axis=0) if len(values) > 1 else values[0] for values in finals]


def _layer(x: Any, cells: list[list[Any]], initial: list[Any], kind: str, hidden: int) -> tuple[Any, list[Any]]:
    order = GATE_ORDER[kind]
    w = _stack([_gates(cell[0], order, hidden) for cell in cells])
    r = _stack([_gates(cell[1], order, hidden) for cell in cells])
    b = _stack([_bias(cell[2:], order, hidden) for cell in cells]) if len(cells[0]) == 4 else None
    direction = "bidirectional" if len(cells) == 2 else "forward"
    common: dict[str, Any] = {"direction": direction, "hidden_size": hidden}
    if kind == "LSTM":
        y, h, c = op.LSTM(x, w, r, b, None, initial[0], initial[1], **common)
        last = [h, c]
    elif kind == "GRU":  # linear_before_reset: torch applies the reset gate after the recurrent product
        y, h = op.GRU(x, w, r, b, None, initial[0], linear_before_reset=1, **common)
        last = [h]
    else:
        activations = ["Tanh" if kind == "RNN_TANH" else "Relu"] * len(cells)
        y, h = op.RNN(x, w, r, b, None, initial[0], activations=activations, **common)
        last = [h]
    # (length, directions, batch, hidden) -> (length, batch, directions * hidden)
    y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, len(cells) * hidden]))
    return y, last


def _gates(value: Any, order: Sequence[int], hidden: int) -> Any:
    """The gate blocks of a weight (gates * hidden, n) in ONNX's order, shape (1, gates * hidden, n)."""
    blocks = op.Reshape(value, op.Constant(value_ints=[len(order), hidden, -1]))
    if len(order) > 1:
        blocks = op.Gather(blocks, op.Constant(value_ints=list(order)), axis=0)
    return op.Reshape(blocks, op.Constant(value_ints=[1, len(order) * hidden, -1]))


def _bias(pair: Sequence[Any], order: Sequence[int], hidden: int) -> Any:
    """Both biases in ONNX's order, one after the other, shape (1, 2 * gates * hidden)."""
    parts = [op.Reshape(_gates(bias, order, hidden), op.Constant(value_ints=[1, -1])) for bias in pair]
    return op.Concat(*parts, axis=1)


def _stack(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else op.Concat(*values, axis=0)


def _rows(value: Any, start: int, stop: int) -> Any:
    return op.Slice(value, *(op.Constant(value_ints=[bound]) for bound in (start, stop, 0)))


def reorder_reference(weight: np.ndarray, kind: str, hidden: int) -> np.ndarray:
    """What `_gates` computes, in numpy."""
    return np.concatenate([weight[g * hidden : (g + 1) * hidden] for g in GATE_ORDER[kind]], axis=0)
