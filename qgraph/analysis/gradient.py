"""A ranking of layers without an evaluation each: a loss to second order in what quantizing a layer does to its output.

With d the change of a layer's output when it alone is quantized, and g the gradient of the loss there in the float
model, the loss of one sample changes by ``g.d + (g.d)**2 / 2``: the Hessian by its Fisher estimate (Martens, 2020, JMLR
21(146), "New insights and perspectives on the natural gradient method", section 9).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qgraph.analysis.replay import Call, intercepted, is_plain, is_pure


class LossChanges:
    """Runs each layer of a float forward twice, as it is and with its quantizers on, on the same inputs.

    Parameters
    ----------
    model : nn.Module
        A prepared model that has run before, all its quantizers off.
    layers : mapping of str to sequence of quantizers
        By the path of the module that holds them. What keeps state or runs as Python cannot be run twice.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Sequence[Any]]) -> None:
        self.layers = layers
        modules = {path: model.get_submodule(path) for path in layers}
        self._modules = {path: module for path, module in modules.items() if is_pure(module)}
        self.changes: dict[str, float] = {}  # of those whose output had a gradient: summed over all batches
        self._inside = False

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Add up the changes of the mean loss in forwards, and their backwards, that run inside."""
        with intercepted(self._modules, self._call):
            yield

    def _call(self, path: str, forward: Call, args: Any, kwargs: Any) -> Any:
        if self._inside or not is_plain((args, kwargs)):
            return forward(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            copies = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        noisy = self._quantized(path, forward, *copies)
        result = forward(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            for plain, other in zip(pytree.tree_leaves(result), pytree.tree_leaves(noisy), strict=False):
                if isinstance(plain, Tensor) and plain.requires_grad and plain.shape == other.shape:
                    plain.register_hook(_Adds(self.changes, path, other - plain.detach()))
        return result

    @torch.no_grad()
    def _quantized(self, path: str, forward: Call, args: Any, kwargs: Any) -> Any:
        self._inside = True
        try:
            for module in self.layers[path]:
                module.enabled = True
            with torch.random.fork_rng(devices=[]):
                return forward(*args, **kwargs)
        finally:
            self._inside = False
            for module in self.layers[path]:
                module.enabled = False


class _Adds:
    """Gradient hook of one output: samples are its first dimension."""

    def __init__(self, changes: dict[str, float], path: str, change: Tensor) -> None:
        self.changes, self.path, self.change = changes, path, change

    def __call__(self, grad: Tensor) -> None:
        count = grad.shape[0] if grad.dim() else 1
        each = (grad.double() * self.change.double()).reshape(count, -1).sum(1)
        found = float(each.sum() + count / 2 * each.square().sum())
        self.changes[self.path] = self.changes.get(self.path, 0.0) + found
