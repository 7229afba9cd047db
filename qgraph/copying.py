"""Deep copies of models that compute with their own parts, also where torch or Python would copy less.

`copy.deepcopy` takes functions as they are. So a closure that a model keeps (``self.f = lambda x: self.fc(x)``, a hook,
a `forward` set on an object) would go on using the parts of the model that was copied. Results of the last forward,
which torch does not copy, are copied as values.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_one_at_a_time = threading.RLock()


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy of a model; `memo` is that of `copy.deepcopy`: what stands for which object in the copy."""
    memo = {} if memo is None else memo
    held = list(_held(model))
    own = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    memo.update({id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf})
    closures = _closures([f for f in held if isinstance(f, FunctionType)], own)
    cells: dict[int, CellType] = {}
    for function in closures:
        memo[id(function)] = _empty_like(function, cells)
    with _methods_by_parts() if closures else contextlib.nullcontext():
        result = copy.deepcopy(model, memo)
    for function in closures:
        _fill(function, memo[id(function)], cells, memo)
    return result


@contextlib.contextmanager
def _methods_by_parts() -> Iterator[None]:
    """Let `copy.deepcopy` look up the function of a bound method too, which it takes as it is: so it does others."""

    def by_parts(method: MethodType, memo: dict[int, Any]) -> MethodType:
        return MethodType(copy.deepcopy(method.__func__, memo), copy.deepcopy(method.__self__, memo))

    table = copy._deepcopy_dispatch  # type: ignore[attr-defined]  # no other way to reach the methods inside
    with _one_at_a_time:
        before = table[MethodType]
        table[MethodType] = by_parts
        try:
            yield
        finally:
            table[MethodType] = before


def _held(model: nn.Module) -> Iterator[Any]:
    """All that the attributes of a model's modules hold, closures and containers looked into, each thing once."""
    stack: list[Any] = [vars(module) for module in model.modules()]
    seen: set[int] = set()
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        stack.extend(_parts(value))


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, tuple):
        return list(tuple.__iter__(value))  # one of a class of its own may refuse to tell its length
    if isinstance(value, (list, set, frozenset)):
        return list(value)
    if isinstance(value, FunctionType):
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return [*defaults, *(cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, (nn.Module, Tensor, type)) or not hasattr(value, "__dict__"):
        return []
    ours = type(value).__module__.partition(".")[0] in ("builtins", "qgraph")  # captured graphs are no part of a model
    return [] if ours else list(vars(value).values())


def _closures(functions: list[FunctionType], own: set[int]) -> list[FunctionType]:
    """Those that use the model's own parts, and those that share a variable with one of them."""
    found = [f for f in functions if _uses(f, own, set())]
    shared = {id(cell) for f in found for cell in f.__closure__ or ()}
    return [f for f in functions if f in found or any(id(cell) in shared for cell in f.__closure__ or ())]


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _uses(value: Any, own: set[int], seen: set[int]) -> bool:
    """Whether a function, or what it closes over, reaches one of the model's own parts."""
    if id(value) in own:
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    return any(_uses(part, own, seen) for part in _parts(value))


def _empty_like(function: FunctionType, cells: dict[int, CellType]) -> FunctionType:
    """The same code over cells of its own, which are still empty; functions that share a cell go on sharing one."""
    closure = tuple(cells.setdefault(id(cell), CellType()) for cell in function.__closure__ or ())
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    made.__annotations__ = function.__annotations__
    return made


def _fill(function: FunctionType, made: FunctionType, cells: dict[int, CellType], memo: dict[int, Any]) -> None:
    for cell in function.__closure__ or ():
        if _is_filled(cell):
            cells[id(cell)].cell_contents = _in_copy(cell.cell_contents, memo)
    if function.__defaults__ is not None:
        made.__defaults__ = tuple(_in_copy(value, memo) for value in function.__defaults__)
    if function.__kwdefaults__ is not None:
        made.__kwdefaults__ = {name: _in_copy(value, memo) for name, value in function.__kwdefaults__.items()}


def _in_copy(value: Any, memo: dict[int, Any]) -> Any:
    """What stands in the copy for a thing that a function holds: itself, where the model does not hold it too."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        return MethodType(_in_copy(value.__func__, memo), _in_copy(value.__self__, memo))
    if isinstance(value, functools.partial):
        keywords = {name: _in_copy(item, memo) for name, item in value.keywords.items()}
        return functools.partial(_in_copy(value.func, memo), *(_in_copy(item, memo) for item in value.args), **keywords)
    if type(value) in (list, tuple):
        items = [_in_copy(item, memo) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    if type(value) is dict:
        found = {key: _in_copy(item, memo) for key, item in value.items()}
        return value if all(found[key] is item for key, item in value.items()) else found
    return value
