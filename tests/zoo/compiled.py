"""Check 4: torch.compile breaks a prepared model into no more graphs than eager, and computes the same."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import qgraph
from tests.zoo.checks import CONFIG, WEIGHTS, Call, Found, copied, leaves, same, seed


def check(found: Found, model: nn.Module, calls: list[Call]) -> None:
    """Compile eager, and the prepared model with its quantizers off and on; add to `found`.

    Outputs are compared where no activation is quantized: else a code on a rounding tie may go the other way.
    """
    call = calls[0]
    try:
        _, found.eager_breaks = _compiled(copied(model), call)
    except Exception:
        return  # nor can eager
    for config, state in ((WEIGHTS, "off"), (WEIGHTS, "on"), (CONFIG, "on")):
        prepared = qgraph.prepare(model, config, call.args, example_kwargs=call.kwargs)
        with qgraph.disabled(prepared) if state == "off" else contextlib.nullcontext():
            expected = _run(prepared, call)
            try:
                got, found.breaks = _compiled(prepared, call)
            except Exception as error:
                found.failures.append(f"compile, {config} {state}: {type(error).__name__}: {error}"[:500])
                continue
        if found.breaks > found.eager_breaks:
            found.failures.append(
                f"compile, {config} {state}: {found.breaks} graph breaks, eager has {found.eager_breaks}"
            )
        same_length = len(got) == len(expected)
        if config == WEIGHTS and not (same_length and all(map(_close, got, expected))):
            found.failures.append(f"compile, {config} {state}: outputs differ")


def _compiled(model: nn.Module, call: Call) -> tuple[list[Any], int]:
    """The outputs of the compiled model, in eval, and the number of graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    out = _run(torch.compile(model, backend=_as_it_is), call)
    return out, sum(counters["graph_break"].values())


def _as_it_is(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
    return graph.forward


def _run(model: nn.Module, call: Call) -> list[Any]:
    model.eval()
    seed()
    args, kwargs = copy.deepcopy((call.args, call.kwargs))
    return leaves(model(*args, **kwargs))


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and a.is_floating_point() and isinstance(b, Tensor) and a.shape == b.shape:
        return torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    return same(a, b)
