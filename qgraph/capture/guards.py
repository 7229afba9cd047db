"""Guards: what a captured graph took for granted when it was recorded.

An early guard is a condition on the forward's arguments, checked before anything runs. A late one is about a value
made inside the forward; it stands in the graph as a `check` node and raises `GuardMiss` at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qgraph.capture.structure import signature


class GuardMiss(Exception):
    """A late guard does not hold; the caller runs the module's own Python instead.

    `by_size`: it never will for a call of these sizes, since no child has a say in it.
    """

    def __init__(self, text: str, by_size: bool) -> None:
        super().__init__(text)
        self.by_size = by_size


@dataclass(frozen=True, slots=True)
class Guard:
    """``source`` is Python text over the forward's arguments, `self` and the globals of `modules`, Python's own;
    `where` is the user's file and line.
    """

    source: str
    where: str
    modules: tuple[str, ...] = ()


def check(value: Any, expected: Any, where: str, by_size: bool = True) -> None:
    """Raise `GuardMiss` unless `value` is what it was when the graph was recorded."""
    # No bool() of a flag: torch.compile gives a condition on sizes back as an object that is neither True nor False.
    holds = (value if expected else not value) if isinstance(expected, bool) else value == expected
    if not holds:
        raise GuardMiss(f"{where}: expected {expected!r}, found {value!r}", by_size)


def check_structure(value: Any, expected: Any, where: str) -> None:
    """Raise `GuardMiss` unless a child returned the structure (types, None-ness, constants) that it did before."""
    check(signature(value), expected, where, by_size=False)
