"""A loss that holds a quantized model to a float one: itself with its quantizers off, or another module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qgraph.errors import CaptureError, ConfigError
from qgraph.graph import is_prepared, keeping_modes, unwrapped
from qgraph.prepare import disabled

__all__ = ["Distilled", "distill"]

Loss = Literal["kl", "mse"] | Callable[[Tensor, Tensor], Tensor]


class Distilled(NamedTuple):
    """The student's output, as its forward returned it, and its distance from the teacher's."""

    output: Any
    loss: Tensor


def distill(
    prepared: nn.Module,
    *args: Any,
    teacher: nn.Module | None = None,
    loss: Loss = "kl",
    temperature: float = 1.0,
    select: Callable[[Any], Tensor] | None = None,
    **kwargs: Any,
) -> Distilled:
    """Run a prepared model and its teacher on a batch: the output, and a loss between the two.

    Add the loss to that of the task: ``output, extra = qgraph.distill(model, x)``, then
    ``(F.cross_entropy(output, y) + 0.5 * extra).backward()``.

    Parameters
    ----------
    prepared : nn.Module
        The student, also inside torch.compile's or DistributedDataParallel's wrapper.
    *args, **kwargs
        What both are called with; a keyword that is also one of `distill` is the latter's.
    teacher : nn.Module, optional
        Run as it is, without gradients. None is the float model of the student's present weights: its quantizers are
        off and it is in eval mode for that call, so that no dropout is drawn and no batch statistics are updated.
    loss : "kl", "mse" or a function of the student's and the teacher's tensor
        "kl" takes logits along the last dimension, and is multiplied by ``temperature**2``.
    temperature : float
        Of "kl".
    select : function, optional
        The tensor to compare, of an output. By default the output itself, its ``logits``, or the first of a tuple.

    Returns
    -------
    Distilled
        ``output`` and ``loss``, a scalar tensor.

    Raises
    ------
    CaptureError
        For a student that is not prepared.
    ConfigError
        For outputs without such a tensor, or a loss or temperature that means nothing.

    Notes
    -----
    Source: Hinton et al., "Distilling the knowledge in a neural network", arXiv 1503.02531.
    """
    student = unwrapped(prepared)
    if not is_prepared(student):
        raise CaptureError(f"{type(student).__name__} is not prepared: call qgraph.prepare on it first.")
    measure = loss_between(loss, temperature, "distill")
    with torch.no_grad():
        if teacher is None:
            with disabled(student), keeping_modes(student):
                student.eval()
                target = student(*args, **kwargs)
        else:
            target = teacher(*args, **kwargs)
    output = prepared(*args, **kwargs)
    select = compared("distill") if select is None else select
    ours, theirs = select(output), select(target)
    if ours.shape != theirs.shape:
        raise ConfigError(
            f"distill: the student's tensor has the shape {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)}; "
            f"pass select=, a function of an output, or a teacher of the same outputs."
        )
    return Distilled(output, measure(ours, theirs))


def loss_between(loss: Loss, temperature: float, asked: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of the student's and the teacher's tensor that a name stands for."""
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise ConfigError(f"{asked}: temperature is a number above 0, found {temperature!r}.")
    if callable(loss):
        return loss
    if loss == "mse":
        return F.mse_loss
    if loss == "kl":
        return lambda student, teacher: _divergence(student, teacher, temperature)
    raise ConfigError(f"{asked}: loss is 'kl', 'mse' or a function of two tensors, found {loss!r}.")


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student from the teacher, the mean over all but the last dimension; in float32 at least."""
    ours, theirs = (F.log_softmax(x.flatten(0, -2).float() / temperature, dim=-1) for x in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def compared(asked: str) -> Callable[[Any], Tensor]:
    """What takes the tensor to compare of an output: itself, its logits, or the first of a tuple."""

    def select(output: Any) -> Tensor:
        found = output
        if isinstance(output, Mapping):
            found = output.get("logits")
        elif isinstance(output, tuple | list) and output:
            found = output[0]
        elif not isinstance(output, Tensor):
            found = getattr(output, "logits", None)
        if isinstance(found, Tensor):
            return found
        raise ConfigError(
            f"{asked}: no tensor to compare in an output of type {type(output).__name__}; pass select=, a function of "
            f"it."
        )

    return select
