"""What a forward changes in objects that outlive it, written down so that its graph changes them too.

Python sets attributes and items without telling anyone. So the state that each object has in the graph is kept beside
the object, and before anyone could notice (a child is called, the forward ends) the differences become nodes:
``setattr``, ``setitem``. What a child has changed, its own graph does; here only the new state is taken over.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from qgraph.capture.source import locate
from qgraph.capture.structure import Step, Unsupported, has_counters, parts, same, walk
from qgraph.capture.values import is_traced, plain

if TYPE_CHECKING:
    from qgraph.capture.recorder import Recorder

State = dict[Step, Any]
_MISSING = object()
_TORCH_OWN = frozenset({"_parameters", "_modules", "_buffers", "_qgraph", "training"})


@dataclass(slots=True)
class _Watched:
    """An object, its parts as they are in the graph so far, and whether it was there before the forward."""

    value: Any
    name: str
    state: State
    given: bool
    initial: State


class Effects:
    """The objects that a forward may change: its arguments, its module, results of children, objects it has made."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._module: Any = None
        self._children_called = False
        self.child_paths: dict[int, str] = {}
        self._watched: dict[int, _Watched] = {}
        self._hidden: list[tuple[Any, Step, Any, Any]] = []

    def watch(self, value: Any, name: str, given: bool) -> None:
        """Follow every mutable part of a value whose node is known."""
        for path, item in walk(value):
            if _mutable(item) and id(item) not in self._watched:
                text = name + "".join(map(str, path))
                state = dict(parts(item) or ())
                self._watched[id(item)] = _Watched(item, text, state, given, state)

    def watch_module(self, module: nn.Module) -> None:
        """Follow a module's own attributes and buffers, and the plain objects that it holds."""
        state = module_parts(module)
        self._watched[id(module)] = self._module = _Watched(module, "self", state, True, state)
        for step, value in state.items():
            if _mutable(value) and not isinstance(value, (list, dict)):
                self._recorder.values.learn_part(module, step, value, initial=True)
                self.watch(value, f"self.{step.key}", given=True)

    def watch_child(self, module: nn.Module, path: str) -> None:
        """Follow the attributes of a child that the forward's own code is about to change."""
        if id(module) not in self._watched:
            state = module_parts(module)
            self._watched[id(module)] = _Watched(module, f"self.{path}", state, True, state)
            self.child_paths[id(module)] = path

    def flush(self) -> None:
        """Write down what the forward's own code has changed since the last time."""
        changes = list(self._changes())
        for watched, after in changes:
            self._settle(watched, after)
        for watched, after in changes:
            node = self._recorder.values.reach_object(watched.value)
            for step, value in after.items():
                if not _same(watched.state.get(step, _MISSING), value):
                    self._refuse(watched, step, value)
            if isinstance(watched.value, nn.Module):
                self._guard_module(watched, after)
            _EMITTERS[_kind(watched.value)](self, node, watched, after)
            self._adopt(watched, after)

    def refresh(self) -> None:
        """Take over what a child that just ran has changed; called before the child's node is written."""
        self._children_called = True
        changes = list(self._changes())
        for watched, after in changes:
            self._settle(watched, after)
        for watched, after in changes:
            for step, value in after.items():
                if not _same(watched.state.get(step, _MISSING), value):
                    self._recorder.values.learn_part(watched.value, step, value)
            self._adopt(watched, after)

    def own_name(self, tensor: Tensor) -> str | None:
        """The name by which the module holds a tensor in the graph's state; no parameter."""
        return next((str(step.key) for step, value in self._module.state.items() if value is tensor), None)

    def may_have_changed(self, path: str) -> bool:
        """Whether what a path below the module means now may not be what it meant when the forward began."""
        return self._children_called and "." in path

    def show(self, holder: Any, step: Step, number: Any) -> None:
        """An attribute of an object that is followed holds its own number, traced, from now on."""
        if (watched := self._watched.get(id(holder))) is not None:
            watched.state = {**watched.state, step: number}

    def hide(self) -> None:
        """Let whoever else looks (a child) meet plain numbers in objects."""
        for watched in self._watched.values():
            for step, value in _state(watched.value).items():
                if holds_traced(value):
                    number = plain(value)
                    _put(watched.value, step, number)
                    self._hidden.append((watched.value, step, value, number))

    def unhide(self) -> None:
        """Put the traced numbers back, but where another has been put meanwhile."""
        for holder, step, value, number in self._hidden:
            if _state(holder).get(step, _MISSING) is number:
                _put(holder, step, value)
        self._hidden = []

    def release(self) -> None:
        """Leave no traced number behind in an object."""
        self.hide()
        for watched in self._watched.values():
            for value in _state(watched.value).values():
                if type(value) in (list, dict):
                    forget_traced(value)

    def release_result(self, result: Any) -> None:
        """The same for what the forward returns, also for objects and functions that no graph can make."""
        stack, seen = [result], set()
        while stack:
            holder = stack.pop()
            if id(holder) in seen or isinstance(holder, (Tensor, nn.Module, type)):
                continue
            seen.add(id(holder))
            for step, value in _held(holder):
                if holds_traced(value):
                    with contextlib.suppress(Exception):  # a container that takes no change
                        _put_past(holder, step, plain(value))
                else:
                    stack.append(value)

    # -- one object's change -----------------------------------------------------------------------------------------

    def _changes(self) -> Iterator[tuple[_Watched, State]]:
        for watched in list(self._watched.values()):
            after = _state(watched.value)
            before = watched.state
            if len(after) != len(before) or any(not _same(before.get(s, _MISSING), v) for s, v in after.items()):
                yield watched, after

    def _settle(self, watched: _Watched, after: State) -> None:
        """Give the object and what is taken out of it nodes, while the graph still has the state of before."""
        values = self._recorder.values
        values.reach_object(watched.value)
        for step, old in watched.state.items():
            if not _same(old, after.get(step, _MISSING)):
                for _, item in walk(old):
                    values.settle(item)

    def _adopt(self, watched: _Watched, after: State) -> None:
        before, watched.state = watched.state, after
        for step, value in after.items():
            if not _same(before.get(step, _MISSING), value):
                self.watch(value, f"{watched.name}{step}", watched.given)

    def _guard_module(self, watched: _Watched, after: State) -> None:
        """What a graph assigns to its module, it found there as it was: the next call may come after the assignment."""
        child = self.child_paths.get(id(watched.value))
        source = "self" if child is None else f"self.get_submodule({child!r})"
        for step in {**watched.state, **after}:
            before = watched.initial.get(step, _MISSING)
            if _same(before, after.get(step, _MISSING)):
                continue
            if before is _MISSING:
                self._recorder.guard_text(f"not hasattr({source}, {step.key!r})")
            else:
                self._recorder.guard_text(f"{source}{step} is {'' if before is None else 'not '}None")

    def _refuse(self, watched: _Watched, step: Step, value: Any) -> None:
        """Raise for a change that a graph had better not replay.

        A number that changes from call to call would be another constant, and so another graph, each time. A size is
        none, where the forward has not read the number that was there.
        """
        holder, old = watched.value, watched.state.get(step)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        size = is_traced(value) and not self._recorder.attributes.relies_on(holder, step.key)
        counts = watched.given and number and not size and isinstance(old, (int, float))
        if counts and not has_counters(holder):
            raise Unsupported(f"counts in {watched.name}{step}")
        if isinstance(holder, nn.Module) and isinstance(value, (nn.Module, list, dict, set)):
            raise Unsupported(f"assigns {watched.name}{step}, a {type(value).__name__}")

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        node = self._recorder.graph.call_function(function, args)
        node.meta["where"] = locate()[0]

    def _value(self, value: Any) -> Any:
        return self._recorder.values.stored(value)

    def _emit_object(self, node: fx.Node, watched: _Watched, after: State) -> None:
        for step in watched.state:
            if step not in after:
                self._call(delattr, node, step.key)
        for step, value in after.items():
            if not _same(watched.state.get(step, _MISSING), value):
                self._call(setattr, node, step.key, self._value(value))

    def _emit_dict(self, node: fx.Node, watched: _Watched, after: State) -> None:
        kept = [step for step in watched.state if step in after]
        if kept != list(after)[: len(kept)]:
            raise Unsupported(f"reorders {watched.name}")
        for step in watched.state:
            if step not in after:
                self._call(operator.delitem, node, step.key)
        for step, value in after.items():
            if not _same(watched.state.get(step, _MISSING), value):
                self._call(operator.setitem, node, step.key, self._value(value))

    def _emit_list(self, node: fx.Node, watched: _Watched, after: State) -> None:
        content = [self._value(value) for value in after.values()]
        self._call(operator.setitem, node, slice(None, None, None), content)


_EMITTERS: dict[str, Callable[..., None]] = {
    "object": Effects._emit_object,
    "dict": Effects._emit_dict,
    "list": Effects._emit_list,
}


def module_parts(module: nn.Module) -> State:
    """A module's own attributes and buffers, without what torch and we keep there."""
    own = {**module.__dict__, **module._buffers}
    return {Step(True, name): value for name, value in own.items() if name not in _TORCH_OWN}


def _state(value: Any) -> State:
    return module_parts(value) if isinstance(value, nn.Module) else dict(parts(value) or ())


def _mutable(value: Any) -> bool:
    return not isinstance(value, tuple) and parts(value) is not None


def _kind(value: Any) -> str:
    first = next(iter(parts(value) or ()), None)
    if isinstance(value, list):
        return "list"
    return "dict" if isinstance(value, dict) and (first is None or not first[0].attribute) else "object"


def _same(old: Any, new: Any) -> bool:
    """Whether a part is as it was; a traced number is the same as no other, since it may differ at the next call."""
    return old is new if holds_traced(new) else same(plain(old) if holds_traced(old) else old, new)


def holds_traced(value: Any) -> bool:
    """Whether a value is a traced number, or a tuple of such."""
    return is_traced(value) or (isinstance(value, tuple) and plain(value) is not value)


def _held(value: Any) -> list[tuple[Step, Any]]:
    """The parts of a value, also of one that is called; for a function, what it closes over."""
    if isinstance(value, FunctionType):
        return [(Step(False, i), cell) for i, cell in enumerate(value.__closure__ or ())]
    if isinstance(value, CellType):
        empty = value == CellType()  # which raises
        return [] if empty else [(Step(True, "cell_contents"), value.cell_contents)]
    return parts(value) or [(Step(True, name), item) for name, item in getattr(value, "__dict__", {}).items()]


def _put_past(holder: Any, step: Step, value: Any) -> None:
    """Set a part whatever the class has to say about it: a frozen dataclass, a `__setattr__` of its own."""
    if step.attribute:
        object.__setattr__(holder, step.key, value)
    else:
        step.put(holder, value)


def forget_traced(value: Any) -> None:
    """Leave plain numbers in the objects of a value that outlives the forward."""
    for _, item in walk(value):
        if type(item) is dict and any(map(holds_traced, item)):
            items = [(plain(key), part) for key, part in item.items()]
            item.clear()
            item.update(items)
        for step, part in () if isinstance(item, tuple) else parts(item) or ():
            if holds_traced(part):
                step.put(item, plain(part))


def _put(holder: Any, step: Step, value: Any) -> None:
    """Set a part without the ado of a module that is assigned to."""
    if isinstance(holder, nn.Module):
        holder.__dict__[step.key] = value
    else:
        step.put(holder, value)
