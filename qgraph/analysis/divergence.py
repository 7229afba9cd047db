"""`divergence`: an `evaluate` for `sensitivity` and `allocate` that needs no labels, and tells small changes apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qgraph.calibrate import call_of
from qgraph.distillation import Loss, compared, loss_between
from qgraph.errors import ConfigError, InspectError
from qgraph.graph import is_prepared, keeping_modes, unwrapped
from qgraph.prepare import disabled

__all__ = ["Divergence", "divergence"]


class Divergence:
    """How far a model's outputs are from those that were kept; call it with the model, which runs in eval mode.

    `lower_is_better` is what `sensitivity` and `allocate` read of it.
    """

    lower_is_better = True

    def __init__(
        self,
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
        targets: list[Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        select: Callable[[Any], Tensor],
    ) -> None:
        self._calls, self._targets, self._loss, self._select = calls, targets, loss, select

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        """The mean over all rows of all batches."""
        total, rows = 0.0, 0
        with keeping_modes(model):
            model.eval()
            for (args, kwargs), target in zip(self._calls, self._targets, strict=True):
                found = self._select(model(*args, **kwargs))
                if found.shape != target.shape:
                    raise InspectError(
                        f"divergence: found an output of {tuple(found.shape)}, expected one of {tuple(target.shape)}."
                    )
                count = target[..., 0].numel() if target.dim() else 1
                total, rows = total + count * float(self._loss(found, target)), rows + count
        return total / rows


def divergence(
    prepared: nn.Module, batches: Iterable[Any], *, loss: Loss = "kl", select: Callable[[Any], Tensor] | None = None
) -> Divergence:
    """An `evaluate` for `sensitivity` and `allocate`: how far outputs are from those of the float model.

    A loss or an accuracy over few samples goes up and down by chance where a layer is quantized, and bits chosen by it
    are right for those samples. The distance from the float model's outputs only grows, adds up over layers, and needs
    no labels.

    Parameters
    ----------
    prepared : nn.Module
        Its outputs with all quantizers off, in eval mode, are the ones to stay near to: computed now, and kept.
    batches : iterable
        Each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. They are kept.
    loss : "kl", "mse" or a function of two tensors, the model's and the float model's
        "kl" takes logits along the last dimension.
    select : function, optional
        The tensor to compare, of an output. By default the output itself, its ``logits``, or the first of a tuple.

    Returns
    -------
    Divergence
        Takes a model and returns a number, lower for better.

    Raises
    ------
    InspectError
        For a model that is not prepared, no batches, or one that is no call.
    ConfigError
        For outputs without such a tensor, or a loss that means nothing.

    Examples
    --------
    >>> config = qgraph.allocate(prepared, "3 bits", qgraph.divergence(prepared, batches))  # doctest: +SKIP
    """
    model = unwrapped(prepared)
    if not isinstance(model, nn.Module) or not is_prepared(model):
        raise InspectError(f"divergence: {type(model).__name__} is not prepared. Expected what qgraph.prepare returns.")
    measure = loss_between(loss, 1.0, "divergence")
    chosen = compared("divergence") if select is None else select
    calls, targets = [], []
    with torch.no_grad(), disabled(model), keeping_modes(model):
        model.eval()
        for batch in batches:
            call = call_of(batch)
            if call is None:
                raise InspectError(
                    f"divergence: found a batch of type {type(batch).__name__}. Expected a tensor, a tuple of "
                    f"positional arguments or a mapping of keyword arguments."
                )
            calls.append(call)
            target = chosen(model(*call[0], **call[1]))
            if not isinstance(target, Tensor):
                raise ConfigError(f"divergence: select returned {type(target).__name__}. Expected a tensor.")
            targets.append(target.clone())
    if not sum(target.numel() for target in targets):
        raise InspectError("divergence: found no batches. Expected at least one; is the generator used up?")
    return Divergence(calls, targets, measure, chosen)
