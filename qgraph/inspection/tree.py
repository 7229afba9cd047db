"""The module hierarchy that a view of a network shows: which box each node stands in, and boxes of bearable size."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import networkx

MOST = 48  # children of one box; more are put into boxes of about
PART = 32
_CALL = re.compile(r"#\d+")


@dataclass(slots=True, eq=False)
class Box:
    """A module, or one call of it, or a run of siblings: its children are boxes and names of nodes, in order."""

    name: str
    scope: str
    parent: Box | None = None
    group: bool = False
    children: list[Box | str] = field(default_factory=list)

    @property
    def path(self) -> str:
        """The module's path; all its calls have the same."""
        return _CALL.sub("", self.scope)


class Tree:
    """Boxes by scope, the root's being ""."""

    def __init__(self, name: str) -> None:
        self.root = Box(name, "")
        self.boxes = {"": self.root}

    def box(self, scope: str) -> Box:
        """The box of a scope, made with those around it where it is new."""
        found = self.boxes.get(scope)
        if found is None:
            around, _, name = scope.rpartition(".")
            parent = self.box(around)
            found = self.boxes[scope] = Box(name, scope, parent)
            parent.children.append(found)
        return found

    def in_order(self) -> list[Box]:
        """All boxes, each after the one that holds it."""
        found: list[Box] = []
        waiting = [self.root]
        while waiting:
            box = waiting.pop()
            found.append(box)
            waiting += [child for child in reversed(box.children) if isinstance(child, Box)]
        return found

    def split(self, hidden: set[str]) -> None:
        """Put runs of siblings into boxes of their own where there are more than a page can draw at once."""
        for box in self.in_order():
            while sum(isinstance(child, Box) or child not in hidden for child in box.children) > MOST:
                box.children = [self._group(box, i, run) for i, run in enumerate(runs(box.children, PART))]

    def _group(self, parent: Box, number: int, children: list[Box | str]) -> Box:
        names = [child.name for child in children if isinstance(child, Box)]
        name = f"{names[0]} – {names[-1]}" if 2 * len(names) > len(children) else f"part {number + 1}"
        made = Box(name, parent.scope, parent, group=True, children=children)
        for child in children:
            if isinstance(child, Box):
                child.parent = made
        return made


def scopes(network: networkx.DiGraph) -> dict[str, str]:
    """The box of every node: its call, and inside that the containers (ModuleList, ...) that hold what is around it.

    A container has no call of its own. A module that is called without a graph stands where it is in the
    hierarchy, and an operation between two children of one container (``x = x + layer(x)``) beside them.
    """
    called = {data["scope"] for _, data in network.nodes(data=True)}
    found = {}
    for name, data in network.nodes(data=True):
        scope = data["scope"]
        if data["op"] == "call_module" and "quantizer" not in data and not data.get("python"):
            scope = ".".join(part for part in (scope, str(data["target"]).rpartition(".")[0]) if part)
        found[name] = scope
    names = list(network)
    after: list[str] = []
    for name in reversed(names):
        own = network.nodes[name]["scope"] == found[name]
        after.append(after[-1] if own and after and _inside(after[-1], found[name]) else found[name])
    before = ""
    for name, following in zip(names, reversed(after), strict=True):
        if network.nodes[name]["scope"] == found[name]:
            found[name] = _between(found[name], before, following, called)
        before = found[name]
    return found


def _inside(scope: str, around: str) -> bool:
    return not around or scope == around or scope.startswith(f"{around}.")


def _between(scope: str, before: str, after: str, called: set[str]) -> str:
    """The innermost container in `scope` that holds both, as far as there are containers alone on the way."""
    if not (_inside(before, scope) and _inside(after, scope)):
        return scope
    depth = len(scope.split(".")) if scope else 0
    pairs = list(zip(before.split("."), after.split("."), strict=False))[depth:]
    for part, other in pairs:
        deeper = f"{scope}.{part}".lstrip(".")
        if part != other or not part or deeper in called:
            return scope
        scope = deeper
    return scope


def runs(children: Iterable[Any], size: int) -> list[list[Any]]:
    """Cut a list into runs of about equal length, none longer than `size`."""
    items = list(children)
    count = -(-len(items) // size)
    return [items[len(items) * i // count : len(items) * (i + 1) // count] for i in range(count)]
