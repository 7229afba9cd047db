"""Functions with `functools.lru_cache` while a forward is recorded: sizes pass through those that compute on them.

A cache asks a size for its hash, so the graph would hold for this size alone, and keeps it as a key for other forwards
to meet. So while a forward's own code runs, such functions are called with plain numbers, and where they give numbers
once more as they are written, with the traced ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FrameType
from typing import Any

from qgraph.capture.bytecode import attributes_named, names_outside
from qgraph.capture.contents import is_constant
from qgraph.capture.values import plain

_ASKED = ("cache_info", "cache_clear", "cache_parameters")


class Memos:
    """The cached functions that a forward may call, by the namespaces that hold them."""

    def __init__(self) -> None:
        self._met: dict[tuple[int, str], tuple[Any, str, Any, Callable[..., Any]]] = {}
        self._shown = False
        self._keeping: list[Any] = []  # sizes, as keys

    def add(self, holder: Any, name: str, value: Any) -> None:
        """`value`, of a class or of the globals of some code, is one if it is a cached function."""
        if isinstance(value, functools._lru_cache_wrapper) and (id(holder), name) not in self._met:
            met = self._met[id(holder), name] = (holder, name, value, _through(value))
            if self._shown:
                _exchange(*met)

    def show(self) -> None:
        """The forward's own code goes on: it meets functions that sizes pass through."""
        self._shown = True
        for holder, name, memo, through in self._met.values():
            _exchange(holder, name, memo, through)

    def hide(self) -> None:
        """Other code runs: it meets its own functions."""
        self._shown = False
        for holder, name, memo, through in self._met.values():
            _exchange(holder, name, through, memo)

    def asked(self, frame: FrameType) -> None:
        """A size is asked for its hash, perhaps by a cached function that this code calls, and no name has led to."""
        names, of = frame.f_globals, type(frame.f_locals.get("self"))
        outside = {name.name for name in names_outside(frame.f_code)}
        found: list[tuple[Any, str, Any]] = [(names, name, names.get(name)) for name in outside]
        for base in of.__mro__:
            found += [(base, name, vars(base).get(name)) for name in attributes_named(frame.f_code)]
        for holder, name, value in found:
            if isinstance(value, functools._lru_cache_wrapper):
                self.add(holder, name, value)
                self._keeping.append(value)

    def forget(self) -> None:
        """Leave no size behind that this forward has followed: others would take it for theirs."""
        for memo in self._keeping:
            memo.cache_clear()


def _exchange(holder: Any, name: str, old: Any, new: Any) -> None:
    if _names(holder).get(name) is not old:  # another thread's recorder has its own there
        return
    if isinstance(holder, dict):
        holder[name] = new
    else:
        setattr(holder, name, new)


def _names(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else vars(holder)


def _through(memo: Any) -> Callable[..., Any]:
    @functools.wraps(memo)
    def call(*args: Any, **kwargs: Any) -> Any:
        plain_args, plain_kwargs = plain(args), plain(kwargs)
        result = memo(*plain_args, **plain_kwargs)
        if plain_args is args and plain_kwargs is kwargs:
            return result
        if is_constant(result):
            return memo.__wrapped__(*args, **kwargs)
        hash((args, *kwargs.values()))  # a table for these sizes: the graph is for them alone
        return result

    vars(call).update((name, getattr(memo, name)) for name in _ASKED)
    return call
