"""Variants: the captured graphs of one module, each with the calls that it holds for, and how a call is described.

A graph is right only for calls like the one it was recorded from. So each comes with what has to be the same (the
signature of the arguments, the mode, attributes, guards), and a call of another kind gets another graph.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from qgraph.capture.attributes import Held
from qgraph.capture.calls import EAGER_ONLY, LEFT_TO_PYTHON, name_of
from qgraph.capture.compiling import installed, left_to_python
from qgraph.capture.globals import modules_named
from qgraph.capture.guards import Guard, check_structure
from qgraph.capture.names import python_code
from qgraph.capture.structure import tensors_in
from qgraph.graph import STATE, is_quantizer, without_quantizers
from qgraph.ops.recompute import recomputing

MAX_VARIANTS = 8


class Call(NamedTuple):
    """One call of a forward: its arguments' names and values, keywords sorted, and their signature."""

    names: tuple[str, ...]
    signature: Any
    values: tuple[Any, ...]
    problem: str | None = None


@dataclass(slots=True)
class Variant:
    """One captured graph of a module and the calls that it holds for.

    ``names``: the arguments as the call gave them; ``signature``: their structure; ``training``: the module's mode;
    ``held``: the attributes that the forward has read; ``guards``: conditions on sizes and dtypes.
    """

    names: tuple[str, ...]
    signature: Any  # as in `Call`
    training: bool
    held: tuple[Held, ...]
    guards: tuple[Guard, ...]
    graph: fx.Graph
    late_guards: int
    in_place: bool = False  # whether the forward changed tensors among its arguments
    validated: set[Any] = field(default_factory=set)  # sizes for which the late guards held
    rejected: set[Any] = field(default_factory=set)  # and did not
    torchs: bool = False  # whether its module is one of torch's own
    left_to_python: bool = False  # whether torch.compile leaves it alone, wherever it is called
    _function: Callable[..., Any] | None = None
    _float_function: Callable[..., Any] | None = None
    _condition: Callable[..., bool] | None = None

    def __post_init__(self) -> None:
        self.left_to_python |= _calls_any(self.graph, LEFT_TO_PYTHON)

    @property
    def _alone(self) -> bool:
        """Whether torch.compile may take up the graph where it meets it by itself."""
        return not self.torchs and not self.left_to_python

    def accepts(self, module: nn.Module, call: Call) -> bool:
        if call.names != self.names or call.signature != self.signature:
            return False
        if module.training is not self.training:
            return False
        if self.rejected and not torch.compiler.is_compiling() and shapes(call.values) in self.rejected:
            return False
        for held in self.held:
            if not held.same_in(module):
                return False
        if not self.guards:
            return True
        if self._condition is None:
            self._condition = self._compile_condition()
        try:
            return self._condition(module, *call.values)
        except (AttributeError, IndexError, KeyError, TypeError):  # a part that the guards read is not there
            return False

    def ask_for_structure(self, module: nn.Module, varying: tuple[str, ...]) -> None:
        """Make the graph ask children at these paths of the model whether they returned a tensor, as it assumes."""
        for node in [n for n in self.graph.nodes if n.op == "call_module"]:
            state = getattr(module.get_submodule(node.target), STATE, None)
            if state is None or state.path not in varying or any(user.target is check_structure for user in node.users):
                continue
            with self.graph.inserting_after(node):
                where = node.meta["where"]
                self.graph.call_function(check_structure, (node, "tensor", where)).meta["where"] = where
            self.late_guards += 1
            self.compile()

    def alike(self, other: Variant) -> bool:
        """Whether another one holds for the same calls."""
        return self._alike_but_guards(other) and self.guards == other.guards

    def _alike_but_guards(self, other: Variant) -> bool:
        fields = ("names", "signature", "training", "held")
        return all(getattr(self, name) == getattr(other, name) for name in fields)

    def forget_globals(self, others: list[Variant]) -> None:
        """Hold whatever Python's globals are now, as long as that tells this variant from none of the others."""
        kept = tuple(guard for guard in self.guards if not guard.modules)
        alike = [other for other in others if other is not self and self._alike_but_guards(other)]
        if kept != self.guards and not any(kept == tuple(g for g in o.guards if not g.modules) for o in alike):
            self.guards = kept
            self.compile()

    def function(self) -> Callable[..., Any]:
        """The graph as a Python function of (module, *arguments)."""
        if self._function is None:
            self._function = compile_graph(self.graph, self._alone)
        return self._function

    def run(self, module: nn.Module, values: tuple[Any, ...]) -> Any:
        """Run the graph on a call's values; what is switched off costs nothing, not even its nodes."""
        quantizers = module.__dict__["_modules"].get("qgraph")
        if quantizers is None or torch.compiler.is_compiling() or not quantizers.off():
            return self.function()(module, *values)
        if self._float_function is None:
            self._float_function = compile_graph(without_quantizers(self.graph), self._alone)
        return self._float_function(module, *values)

    def compile(self) -> None:
        """Compile the graph as it is now, before its next call: torch.compile must not meet the work."""
        self._function, self._float_function = compile_graph(self.graph, self._alone), None
        if self.guards:
            self._condition = self._compile_condition()

    def _compile_condition(self) -> Callable[..., bool]:
        arguments = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        source = f"lambda {', '.join(['self', *arguments])}: " + " and ".join(f"({g.source})" for g in self.guards)
        names = {"torch": torch, "device": torch.device, **modules_named(self.guards)}
        return left_to_python(eval(source, names))  # the text is our own, made of the forward's argument names

    def __getstate__(self) -> dict[str, Any]:
        from qgraph.capture.serialize import dump_graph

        state = {
            name: getattr(self, name)
            for name in (
                "names",
                "signature",
                "training",
                "held",
                "guards",
                "late_guards",
                "in_place",
                "torchs",
                "left_to_python",
            )
        }
        return {**state, "graph": dump_graph(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from qgraph.capture.serialize import load_graph

        for name, value in state.items():
            setattr(self, name, load_graph(value) if name == "graph" else value)
        self.validated, self.rejected, self._condition = set(), set(), None
        self.__post_init__()
        self.compile()


_PLUMBING = (os.path.dirname(__file__), nn.modules.module.__file__, contextlib.__file__, functools.__file__)
GENERATED = "<qgraph "  # what the file names of compiled graphs begin with
_numbers = itertools.count()
_compiled: weakref.WeakValueDictionary[Any, Callable[..., Any]] = weakref.WeakValueDictionary()


def called_by_graph() -> bool:
    """Whether the module whose forward is running was called by a captured graph, not by Python."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename.startswith(_PLUMBING) or frame.f_code in installed):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(GENERATED)


def compile_graph(graph: fx.Graph, alone: bool) -> Callable[..., Any]:
    """Compile a graph to a function of (module, *arguments); tracebacks show its source, and the user's line behind.

    Graphs that read alike, as those of the layers of a stack, are one function: torch.compile then takes up one.
    Where not `alone`, it does so within callers only.
    """
    code = python_code(_compilable(graph))
    places = {node.name: node.meta["where"] for node in graph.nodes if "where" in node.meta}
    lines = tuple(_with_place(line, places) for line in code.src.splitlines())
    alike = (alone, lines, *((name, id(value)) for name, value in code.globals.items()))
    found = _compiled.get(alike)
    if found is None:
        found = _compiled[alike] = _compile(graph, alone, code.src, lines, dict(code.globals))
    return found


def _compile(
    graph: fx.Graph, alone: bool, source: str, lines: tuple[str, ...], names: dict[str, Any]
) -> Callable[..., Any]:
    import linecache

    file = f"{GENERATED}{next(_numbers)}>"
    linecache.cache[file] = (len(source), None, list(lines), file)
    exec(compile(source, file, "exec"), names)
    forward = names["forward"] if alone else left_to_python(names["forward"])
    switches = any(node.target is torch._C._set_grad_enabled for node in graph.nodes)
    return _leaving_blocks(forward) if switches else forward


def _compilable(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph to run: with other functions for those that torch.compile cannot take, and products that keep
    no quantized operands for backward.
    """
    copied, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        nodes[node] = copied.node_copy(node, nodes.__getitem__)
        if node.op == "call_function" and name_of(node.target) in EAGER_ONLY:
            from qgraph.ops.grouped import grouped_mm  # which registers an operator

            nodes[node].target = grouped_mm
        elif node.op == "call_function" and any(map(is_quantizer, node.all_input_nodes)):
            nodes[node].target = left_to_python(recomputing(node.target))
    return copied


def _calls_any(graph: fx.Graph, names: frozenset[str]) -> bool:
    return any(node.op == "call_function" and name_of(node.target) in names for node in graph.nodes)


def _leaving_blocks(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A graph has no `with`: where an error ends it inside a no_grad block, gradients are put back all the same."""

    def run(*args: Any) -> Any:
        enabled = torch.is_grad_enabled()
        try:
            return forward(*args)
        except BaseException:
            torch._C._set_grad_enabled(enabled)
            raise

    return run


def _with_place(line: str, places: dict[str, str]) -> str:
    place = places.get(line.partition("=")[0].strip())
    return f"{line}  # {place}\n" if place else f"{line}\n"


def shapes(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The sizes and dtypes of every tensor in a call's arguments."""
    modes = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    return (*modes, *((tuple(tensor.shape), tensor.dtype) for tensor in tensors_in(values)))
