"""Check 4: torch.compile breaks a prepared model into no more graphs than eager, once, and computes the same."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

import qgraph
from tests.zoo.checks import CONFIG, WEIGHTS, Call, Found, copied, leaves, same, seed


def check(found: Found, model: nn.Module, calls: list[Call]) -> None:
    """Compile eager, and the prepared model with its quantizers off and on; add to `found`.

    Outputs are compared where no activation is quantized: else a code on a rounding tie may go the other way.
    """
    call = calls[0]
    try:
        _, eager, eager_again = _compiled(copied(model), calls[:2])
    except Exception:
        return  # nor can eager
    found.eager_breaks = max(0, eager - 1)
    for config, state in ((WEIGHTS, "off"), (WEIGHTS, "on"), (CONFIG, "on")):
        prepared = qgraph.prepare(model, config, call.args, example_kwargs=call.kwargs)
        with qgraph.disabled(prepared) if state == "off" else contextlib.nullcontext():
            expected = _run(prepared, call)
            try:
                got, graphs, again = _compiled(prepared, calls[:2] if config == CONFIG else calls[:1])
            except Exception as error:
                found.failures.append(f"compile, {config} {state}: {type(error).__name__}: {error}"[:500])
                continue
        found.breaks = max(0, graphs - 1)
        if found.breaks > found.eager_breaks:
            found.failures.append(
                f"compile, {config} {state}: {found.breaks} graph breaks, eager has {found.eager_breaks}"
            )
        if again > eager_again:
            found.failures.append(
                f"compile, {config} {state}: {again} graphs anew for calls met before, eager {eager_again}"
            )
        same_length = len(got) == len(expected)
        if config == WEIGHTS and not (same_length and all(map(_close, got, expected))):
            found.failures.append(f"compile, {config} {state}: outputs differ")


def _compiled(model: nn.Module, calls: list[Call]) -> tuple[list[Any], int, int]:
    """The outputs of the compiled model for the first call, in eval, how many graphs it has, and how many are made for
    it anew when all calls have been met: no batch is to be compiled for itself.
    """
    made: list[fx.GraphModule] = []

    def as_it_is(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=as_it_is)
    out = _run(compiled, calls[0])
    first = len(made)
    for call in calls[1:] + calls[:1] * 2:  # the last of them has been met, and so has every graph of ours
        met = len(made)
        _run(compiled, call)
    return out, first, len(made) - met


def _run(model: nn.Module, call: Call) -> list[Any]:
    model.eval()
    seed()
    args, kwargs = copy.deepcopy((call.args, call.kwargs))
    return leaves(model(*args, **kwargs))


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and a.is_floating_point() and isinstance(b, Tensor) and a.shape == b.shape:
        return torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    return same(a, b)
