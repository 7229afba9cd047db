"""Ints that an object keeps (how many tokens a cache holds), an argument or what a child returns: no constants.

While the forward's own code runs, each such attribute holds the number traced; whoever else may look (a child, the
caller) meets the plain one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from qgraph.capture.structure import Step, has_counters, walk
from qgraph.capture.values import Leaf, is_traced, plain, traced

if TYPE_CHECKING:
    from qgraph.capture.recorder import Recorder


@dataclass(slots=True)
class _Counter:
    """One int attribute, and the number that the forward's own code shall see there."""

    holder: Any
    name: str
    shown: Any


class Counters:
    """The ints of the objects that a forward is given, shown traced to its own code and plain to all others."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._counters: list[_Counter] = []

    def watch(self, node: fx.Node, value: Any) -> None:
        """Trace the ints of the objects in an argument, or in a child's result."""
        if isinstance(value, nn.Module):
            return
        seen: set[int] = set()
        for path, item in walk(value):
            if has_counters(item) and id(item) not in seen:
                seen.add(id(item))
                for name, number in vars(item).items():
                    if type(number) is int:
                        leaf = CounterLeaf(node, (*path, Step(True, name)), self._recorder)
                        self._counters.append(_Counter(item, name, traced(number, leaf, self._recorder)))

    def show(self) -> None:
        """Let the forward's own code see the traced numbers, except where a child has put another one."""
        for counter in self._counters:
            attributes = vars(counter.holder)
            now = attributes.get(counter.name)
            if not self._recorder.recording or is_traced(now):
                continue
            if type(now) is int and now == plain(counter.shown):
                attributes[counter.name] = counter.shown
                self._recorder.effects.show(counter.holder, Step(True, counter.name), counter.shown)
            elif type(now) is int:  # read at this place of the graph, since it may change again
                node = self._recorder.values.reach_object(counter.holder)
                leaf = Leaf(self._recorder.values.step_into(node, (Step(True, counter.name),)), "")
                attributes[counter.name] = counter.shown = traced(now, leaf, self._recorder)
                self._recorder.effects.show(counter.holder, Step(True, counter.name), counter.shown)

    def hide(self) -> None:
        """Put the plain numbers back."""
        for counter in self._counters:
            attributes = vars(counter.holder)
            now = attributes.get(counter.name)
            if is_traced(now):
                counter.shown = now
                attributes[counter.name] = plain(now)


class CounterLeaf(Leaf):
    """The number that an attribute held when the forward met its object: read right there in the graph, once."""

    __slots__ = ("made", "path", "recorder")
    made: list[fx.Node]
    path: tuple[Step, ...]
    recorder: Recorder

    def __init__(self, node: fx.Node, path: tuple[Step, ...], recorder: Recorder) -> None:
        Leaf.__init__(self, node, "")
        for name, value in (("path", path), ("recorder", recorder), ("made", [])):
            object.__setattr__(self, name, value)

    def emit(self, graph: fx.Graph) -> fx.Node:
        if not self.made:
            given = self.node.op == "placeholder"
            with self.recorder.values.at_top() if given else graph.inserting_before(self.node.next):
                self.made.append(self.recorder.values.step_into(self.node, self.path))
        return self.made[0]

    def source(self) -> str | None:
        root = self.node.meta.get("source")
        return None if root is None else root + "".join(map(str, self.path))
