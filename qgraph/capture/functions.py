"""Which arguments of a torch.autograd.Function its forward multiplies with each other.

A Function stays one call of a graph, for its backward is its own. Where a product inside takes an argument as it is, or
transposed, that argument is an operand of the whole call: quantized before it, so that forward and backward meet the
same values. What is computed inside before it is multiplied is not found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qgraph.capture import calls
from qgraph.sites import Operand, SiteCall, keeps_values, site_call, swaps_last_two


def watched(function: Any, apply: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, SiteCall | None]:
    """The result of `apply(*args)`, and the call as one of the site table where there is a product inside."""
    mode = _Products(args)
    with mode:
        result = apply(*args)
    return result, mode.site(function.__name__)


class _Products(TorchFunctionMode):
    """Notes which arguments are operands of products, and which are used in another way as well."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        # By tensor, which is held here: its place among the arguments, and whether it is transposed.
        self._known = [(value, i, False) for i, value in enumerate(args) if isinstance(value, Tensor)]
        self._operands: dict[int, Operand] = {}
        self._elsewhere: set[int] = set()
        self._conv = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._note(calls.name_of(func), args, kwargs, result)
        return result

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        met = [found for value in (*args, *kwargs.values()) if (found := self._find(value)) is not None]
        if not met or not isinstance(result, (Tensor, tuple, list)):
            return
        call = site_call(name, args, kwargs, lambda t: t.dim() if isinstance(t, Tensor) else 0)
        if call is not None:
            for operand in call.operands:
                if (found := self._find(operand.get(args, kwargs))) is not None:
                    position, transposed = found
                    placed = replace(operand, position=position, keyword="", index=None)
                    self._operands.setdefault(position, placed.transposed() if transposed else placed)
                    met.remove(found)
            self._conv |= call.conv
        elif isinstance(result, Tensor) and (keeps_values(name) or _transposes(name, args)):
            position, transposed = met[0]
            self._known.append((result, position, transposed ^ (not keeps_values(name))))
            return
        self._elsewhere.update(position for position, _ in met)

    def _find(self, value: Any) -> tuple[int, bool] | None:
        return next(((i, transposed) for known, i, transposed in self._known if known is value), None)

    def site(self, name: str) -> SiteCall | None:
        """The call with the operands found; what is also used otherwise can be a weight, and is no activation."""
        operands = [self._role(operand) for _, operand in sorted(self._operands.items())]
        kept = tuple(o for o in operands if o.role != "input" or o.position not in self._elsewhere)
        return SiteCall(name, kept, self._conv) if kept else None

    def _role(self, operand: Operand) -> Operand:
        """One of a product of equals, where nothing tells which is which, is a weight if it is a parameter."""
        unsure = operand.position in self._elsewhere or len(self._operands) == 1
        return replace(operand, role="weight") if operand.role == "either" and unsure else operand


def _transposes(name: str, args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and swaps_last_two(name, args, args[0].dim())
