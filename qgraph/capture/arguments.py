"""Which graph node stands for which Python object while a forward is recorded, and how a call's arguments are written.

Tensors and containers are known by identity. A part of a known value gets its node (``getitem``, ``getattr``) when
it is first used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qgraph.capture.calls import Constant, Rebuild, Setter
from qgraph.capture.names import format_target
from qgraph.capture.objects import check_class, check_own, rebuildable
from qgraph.capture.source import locate
from qgraph.capture.state import find_attribute, is_weight
from qgraph.capture.structure import Step, Unsupported, is_namedtuple, memory_of, parts, walk
from qgraph.capture.values import Leaf, emit, is_traced, traced

if TYPE_CHECKING:
    from qgraph.capture.recorder import Recorder

SELF = "qgraph_self"  # the attribute of a captured module that is the module itself
_CONSTANTS = (
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip


@dataclasses.dataclass(slots=True)
class _Known:
    """An object (held, so that its identity stays its own) and its node, or the way to it from another's node.

    `node` None: the way starts at the module itself.
    """

    value: Any
    node: fx.Node | None
    path: tuple[Step, ...] = ()
    initial: bool = False  # held by the module when the forward began


class Values:
    """The objects a forward has met and their nodes."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._graph = recorder.graph
        self._known: dict[int, _Known] = {}
        self._state_nodes: dict[str, fx.Node] = {}
        self.data_dependent: set[fx.Node] = set()
        self._memories: dict[int, tuple[Tensor, int]] = {}  # by `memory_of`: a tensor over it, held, and its number

    # -- meeting values ----------------------------------------------------------------------------------------------

    def input(self, node: fx.Node, value: Any) -> Any:
        """Make an argument of the forward known; returns it with its ints traced."""
        self._learn(node, value)
        self._describe(node, value)
        return self._trace_ints(node, value)

    def result(
        self,
        node: fx.Node,
        result: Any,
        args: Any,
        kwargs: Any,
        versions: dict[int, int],
        data_dependent: bool,
    ) -> Any:
        """Make the result of a call known; returns what the forward's code shall see of it."""
        if isinstance(result, Tensor):
            result = self._unalias(result, versions)
        target: Any = node.args[0] if isinstance(node.target, Setter) else None
        if target is not None and "memory" in target.meta:  # `tensor.data = other`: still the same to the graph
            self._memories[memory_of(args[0])] = (args[0], target.meta["memory"])
        self._describe(node, result)
        self._learn(node, result)
        tainted = data_dependent or any(n in self.data_dependent for n in node.all_input_nodes)
        if tainted:
            self.data_dependent.add(node)
        return self._trace_ints(node, result)

    def versions(self, args: Any, kwargs: Any) -> dict[int, int]:
        """The version counter of every tensor argument: tells an in-place call from one that returns its input."""
        found: dict[int, int] = {}
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(item, Tensor):
                    found[id(item)] = -1 if item.is_inference() else item._version
        return found

    def _unalias(self, result: Tensor, versions: dict[int, int]) -> Tensor:
        """A function that returned its own input unchanged: a view, so that input and result have different nodes."""
        before = versions.get(id(result))
        if before is None or result.is_inference() or before != result._version:
            return result
        return result.view_as(result)

    def _describe(self, node: fx.Node, value: Any) -> None:
        """Keep the example's size and dtype with a tensor's node, and which of the graph's memories it is over."""
        if isinstance(value, Tensor):
            node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype
            node.meta["memory"] = self._memories.setdefault(memory_of(value), (value, len(self._memories)))[1]

    def _learn(self, node: fx.Node, value: Any) -> None:
        for path, item in walk(value):
            if _has_identity(item, path):
                self._known[id(item)] = _Known(item, node, path)

    def learn_part(self, holder: Any, step: Step, value: Any, initial: bool = False) -> None:
        """A known object holds this now: what is new in it is reached through the object."""
        known = self._known.get(id(holder))
        if known is not None:
            node, way = known.node, known.path
        else:
            child = self._recorder.effects.child_paths.get(id(holder), "")
            node, way = None, tuple(Step(True, name) for name in child.split(".") if name)
        for path, item in walk(value):
            met = self._known.get(id(item))
            if _has_identity(item, path) and (met is None or met.value is not item):
                self._known[id(item)] = _Known(item, node, (*way, step, *path), initial)

    def settle(self, value: Any) -> None:
        """Reach a value now that was only known by the way to it."""
        known = self._known.get(id(value))
        if known is not None and known.value is value and known.path:
            self.reach(known)

    def reach_object(self, value: Any) -> fx.Node:
        """The node of an object that is known, or of the module itself."""
        if value is self._recorder.module:
            return self._self_node()
        if isinstance(value, nn.Module):
            return self._graph.get_attr(self._recorder.effects.child_paths[id(value)])
        return self.reach(self._known[id(value)])

    def _self_node(self) -> fx.Node:
        found = self._state_nodes.get("")
        if found is None:
            with self.at_top():
                found = self._state_nodes[""] = self._graph.get_attr(SELF)
            found.meta["where"], found.meta["source"] = locate()[0], "self"
        return found

    def _trace_ints(self, node: fx.Node, value: Any, path: tuple[Step, ...] = ()) -> Any:
        """Ints that stand alone or in tuples come back traced; anything mutable is left as it is."""
        if type(value) is int:
            return traced(value, _Part(node, path, self), self._recorder)
        named = is_namedtuple(value)
        if named or type(value) is tuple or type(value) is torch.Size:
            items = [self._trace_ints(node, item, (*path, Step(False, i))) for i, item in enumerate(value)]
            if any(new is not old for new, old in zip(items, value, strict=True)):
                return type(value)(*items) if named else type(value)(items)
        return value

    # -- writing arguments -------------------------------------------------------------------------------------------

    def node(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; raises Unsupported for one that no recorded operation made."""
        known = self._known.get(id(tensor))
        if known is not None and known.value is tensor:
            return self.reach(known)
        return self._from_module(tensor)

    def forbid_data_dependent(self, tensor: Tensor) -> None:
        if self.node(tensor) in self.data_dependent:
            raise Unsupported("uses a size that depends on tensor data")

    def reach(self, known: _Known) -> fx.Node:
        start = known.node
        if start is None:
            start = self._self_node()
            if known.initial:
                self._recorder.guard_text(f"self{''.join(map(str, known.path))} is not None")
        node = self.step_into(start, known.path)
        known.node, known.path = node, ()
        self._describe(node, known.value)
        return node

    def step_into(self, node: fx.Node, path: tuple[Step, ...]) -> fx.Node:
        for step in path:
            source = node.meta.get("source")
            function: Callable[..., Any] = getattr if step.attribute else operator.getitem
            tainted = node in self.data_dependent
            node = self._graph.call_function(function, (node, step.key))
            node.meta["where"] = locate()[0]
            if source is not None:
                node.meta["source"] = f"{source}{step}"
            if tainted:
                self.data_dependent.add(node)
        return node

    def argument(self, value: Any) -> Any:
        """The value as an argument of a node: tensors and sizes as nodes, containers rebuilt, constants as they are."""
        if is_traced(value):
            if value.recorder is not self._recorder:
                return value.value
            if any(leaf in self.data_dependent for leaf in _leaf_nodes(value.expression)):
                raise Unsupported("uses a size that depends on tensor data")
            return emit(value.expression, self._graph)
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, _CONSTANTS):
            return value
        if type(value) is slice:
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if type(value) in (tuple, torch.Size):
            return tuple(self.argument(item) for item in value)
        known = self._known.get(id(value))
        if known is not None and known.value is value:
            return self.reach(known)
        return self._container(value)

    def _container(self, value: Any) -> Any:
        kind = type(value)
        if kind is list:
            return [self.argument(item) for item in value]
        if kind is dict:
            if not all(isinstance(key, str) for key in value):
                raise Unsupported("a dict whose keys are not strings")
            return {key: self.argument(item) for key, item in value.items()}
        if is_namedtuple(value):
            return self._graph.call_function(kind, tuple(self.argument(item) for item in value))
        if kind is OrderedDict:
            return self._graph.call_function(kind, ([(key, self.argument(item)) for key, item in value.items()],))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._dataclass(value)
        if isinstance(value, type):
            check_class(value)
            return self._graph.call_function(Constant(value))
        if _importable(value):
            return self._graph.call_function(Constant(value))
        if rebuildable(value):
            check_own(value)
        return self.make(value)

    def introduce(self, args: Any, kwargs: Any) -> None:
        """Make the plain objects among a child's arguments that the forward has made, as they are before the child."""
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if id(item) not in self._known and type(item).__module__ != "builtins" and rebuildable(item):
                    self.argument(item)

    def stored(self, value: Any) -> Any:
        """A value as another object holds it: a list or an object made by the forward keeps its identity."""
        value_or_node = self._known.get(id(value))
        if value_or_node is None and type(value) in (list, dict):
            return self.make(value)
        return self.argument(value)

    def make(self, value: Any) -> fx.Node:
        """An object that the forward has made, made anew in the graph as it is now, and followed from there on."""
        kind = type(value)
        if kind is list:
            node = self._graph.call_function(list, ([self.stored(item) for item in value],))
        elif kind is dict:
            node = self._graph.call_function(dict, ([(key, self.stored(item)) for key, item in value.items()],))
        elif rebuildable(value):
            check_class(kind)
            node = self._graph.call_function(
                Rebuild(kind), (), {name: self.stored(item) for name, item in vars(value).items()}
            )
        else:
            raise Unsupported(f"a {kind.__name__} made inside the forward")
        node.meta["where"] = locate()[0]
        self._known[id(value)] = _Known(value, node)
        self._recorder.effects.watch(value, f"a {kind.__name__}", given=False)
        return node

    def _dataclass(self, value: Any) -> fx.Node:
        if any(not f.init for f in dataclasses.fields(value)):
            raise Unsupported(f"a {type(value).__name__} with fields that its constructor does not take")
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, dict):  # a transformers ModelOutput: None means "not there"
            fields = {name: item for name, item in fields.items() if item is not None}
        arguments = {name: self.argument(item) for name, item in fields.items()}
        return self._graph.call_function(type(value), (), arguments)

    # -- tensors that belong to modules ------------------------------------------------------------------------------

    def _from_module(self, tensor: Tensor) -> fx.Node:
        path = self._recorder.effects.own_name(tensor) or find_attribute(self._recorder.module, tensor)
        if path is None:
            return self._from_outside(tensor)
        node = self._get_attr(path, tensor)
        if path in self._recorder.module.__dict__:
            self._recorder.guard_text(f"self.{path} is not None")
        self._known[id(tensor)] = _Known(tensor, node)
        return node

    def _from_outside(self, tensor: Tensor) -> fx.Node:
        target = None if tensor.requires_grad else self._recorder.globals.source_of(tensor)
        if target is None:
            raise Unsupported("uses a tensor that neither this forward nor this module made")
        with self.at_top():
            node = self._graph.call_function(target)
        node.meta["where"] = locate()[0]
        self._describe(node, tensor)
        self._known[id(tensor)] = _Known(tensor, node)
        return node

    def at_top(self) -> Any:
        """Write the next nodes before all calls, after the arguments."""
        first = next((n for n in self._graph.nodes if n.op not in ("placeholder", "get_attr")), None)
        return self._graph.inserting_before(first) if first is not None else self._graph.inserting_after()

    def _get_attr(self, path: str, tensor: Tensor) -> fx.Node:
        # Read at the top of the graph, after the arguments: a parameter does not change inside a forward. A buffer
        # may, by a child that was called before.
        stays = isinstance(tensor, nn.Parameter) or not self._recorder.effects.may_have_changed(path)
        with self.at_top() if stays else contextlib.nullcontext():
            name = path.replace(".", "_")
            if "[" in path:
                holder, index = path[:-1].split("[")
                node = self._graph.get_attr(holder)
                node = self._graph.call_function(operator.getitem, (node, int(index)))
            else:
                node = self._graph.create_node("get_attr", path, name=name)
        node.meta["where"] = locate()[0]
        holder, bracket, index = path.partition("[")
        node.meta["source"] = format_target("self", holder) + bracket + index
        node.meta["parameter"] = is_weight(self._recorder.module, path, tensor)
        self._describe(node, tensor)
        return node


class _Part(Leaf):
    """An int found inside a value of the graph."""

    __slots__ = ("path", "values")
    path: tuple[Step, ...]
    values: Values

    def __init__(self, node: fx.Node, path: tuple[Step, ...], values: Values) -> None:
        Leaf.__init__(self, node, "")
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "values", values)

    def emit(self, graph: fx.Graph) -> fx.Node:
        return self.values.step_into(self.node, self.path)

    def source(self) -> str | None:
        root = self.node.meta.get("source")
        return None if root is None else root + "".join(map(str, self.path))


def _has_identity(value: Any, path: tuple[Step, ...]) -> bool:
    """Whether a part of a value is known by its identity: tensors and containers, but no tuple inside another value."""
    return isinstance(value, Tensor) or (parts(value) is not None and (not isinstance(value, tuple) or not path))


def _leaf_nodes(expression: Any) -> list[fx.Node]:
    if isinstance(expression, Leaf):
        return [expression.node]
    return [node for operand in getattr(expression, "operands", ()) for node in _leaf_nodes(operand)]


def _importable(value: Any) -> bool:
    """A plain function or class that a pickled graph finds again by its name."""
    name, home = getattr(value, "__qualname__", "<"), getattr(value, "__module__", None)
    return callable(value) and home is not None and "<" not in name and not hasattr(value, "__self__")
