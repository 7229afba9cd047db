"""Record one forward as a torch.fx graph while it runs in eager mode.

The recorder is a TorchFunctionMode: real tensors flow, every torch function that the forward calls is written down as
a node, and tensors are known by identity. So a forward is never led astray by tracing, and where it does something
that a graph cannot hold, recording stops with a reason while the run itself goes on. The same mode applies the
quantizers at each site, recording or not; that is how a forward that stays Python is quantized (`quantize=True`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from qgraph.capture import calls
from qgraph.capture.arguments import Values
from qgraph.capture.attributes import AttributeReads
from qgraph.capture.counters import Counters
from qgraph.capture.effects import Effects, forget_traced
from qgraph.capture.globals import GlobalReads
from qgraph.capture.guards import Guard, check, check_structure
from qgraph.capture.modes import Modes
from qgraph.capture.operands import OperandTracker
from qgraph.capture.randomness import random_states, same_random
from qgraph.capture.reads import Reads
from qgraph.capture.serialize import RESERVED, new_graph
from qgraph.capture.source import definition, locate
from qgraph.capture.structure import Unsupported, signature, walk
from qgraph.capture.values import Expression, Leaf, plain
from qgraph.graph import STATE

if TYPE_CHECKING:
    from qgraph.capture.state import ModuleState


class Recorder(TorchFunctionMode):
    """Records the forward of one module, and quantizes it when asked to.

    Parameters
    ----------
    module : nn.Module
        Whose forward runs.
    state : ModuleState
        Where the module's quantizers and captured graphs are kept.
    quantize : bool
        Apply the quantizers at the sites met on the way.
    reason : str, optional
        Why no graph shall be recorded, and `where`; the recorder then only quantizes.
    """

    def __init__(
        self, module: nn.Module, state: ModuleState, quantize: bool, reason: str | None = None, where: str = ""
    ) -> None:
        super().__init__()
        self.module = module
        self.state = state
        self.quantize = quantize
        self.reason = reason
        self.reason_where = where
        self.through = False  # the run is over: sizes that outlive it, as keys of a dict, are plain numbers
        self.graph = new_graph()
        self.values = Values(self)
        self.effects = Effects(self)
        self.counters = Counters(self)
        self.reads = Reads(self)
        self.attributes = AttributeReads(self)
        self.globals = GlobalReads(self)
        self.modes = Modes(self)
        self.guards: dict[str, Guard] = {}
        self.late_guards = 0
        self.inside = 0  # > 0 while the mode is on and the forward's own code runs
        self._lists: list[tuple[str, Any, list[Any]]] = []
        self.in_place = False
        self._data_shapes: Counter[str] = Counter()  # by line: calls whose result's size depends on data
        self._versions: list[tuple[Tensor, int]] = []
        self._ended: str | None = None  # where the forward is written, once it is through
        self._rng: Any = None
        self._hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self.operands = OperandTracker(module, state)

    # -- running -----------------------------------------------------------------------------------------------------

    @property
    def recording(self) -> bool:
        return self.reason is None

    @property
    def tracing(self) -> bool:
        """Whether what Python does with a size is written down."""
        return self.recording and not self.through

    @property
    def left_to_python(self) -> bool:
        """Whether torch.compile leaves such a forward to Python as a whole: it would have to break it inside a loop."""
        return any(times > 1 for times in self._data_shapes.values())

    def fail(self, reason: str) -> None:
        """Give the graph up, for the first reason met; the run goes on."""
        if self.recording:
            where = self._ended if self._ended is not None else locate()[0]
            self.reason, self.reason_where = reason, where

    def run(
        self,
        forward: Callable[..., Any],
        names: tuple[str, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run `forward` on the module's bound arguments and record it; returns its own plain result."""
        with torch._C.DisableTorchFunction():
            bound = self._placeholders(names, args, kwargs)
        self._watch_module()
        self.globals.begin(forward)
        self._rng = random_states()
        self.counters.show()
        self.globals.memos.show()
        try:
            with self._active(), self:
                result = forward(self.module, *bound[0], **bound[1])
        except BaseException:
            self.counters.hide()
            self.effects.release()
            self.through = True
            raise
        finally:
            self.globals.memos.hide()
            self.globals.memos.forget()
        self._ended = definition(self.module, forward)
        self._finish(result)
        self.effects.release_result(result)
        self.through = True
        with torch._C.DisableTorchFunction():
            forget_traced(result)
        return plain(result)

    def release(self) -> None:
        """Let go of all that was met, at once: its parts know each other, and would hold every tensor of the forward
        until Python looks for cycles. Traced numbers may live on; they ask whether it is recording, and it is not.
        """
        vars(self).clear()
        self.reason, self.through = "its forward is over", True

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @contextlib.contextmanager
    def suspended(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Step aside while a child module or an opaque function runs on these arguments."""
        with self.outside():
            self._check_random()
            self._flush()
            self._note(self.values.introduce, args, kwargs)
            self.counters.hide()
            self.effects.hide()
            self.globals.memos.hide()
            try:
                with _pop_mode_temporarily():
                    yield
            finally:
                self.globals.memos.show()
                self.effects.unhide()
                self._rng = random_states()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """While code runs that is not the forward's own."""
        inside, self.inside = self.inside, 0
        try:
            yield
        finally:
            self.inside = inside

    def path_to(self, module: nn.Module) -> str | None:
        """The path from the forward's module to one below it, or None."""
        if module is self.module:
            return ""
        for name, child in self.module._modules.items():
            if child is module:
                return name
        return next((name for name, below in self.module.named_modules() if below is module), None)

    def _placeholders(
        self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A node for every argument (by name, in order); ints become traced ints."""
        given: dict[str, Any] = {}
        for name, value in zip(names, (*args, *kwargs.values()), strict=True):
            node = self.graph.placeholder(f"{name}_" if name in RESERVED else name)
            node.meta["source"] = node.name
            if isinstance(value, nn.Parameter):
                node.meta["parameter"] = True
            self.operands.enter(name, value)
            given[name] = self.values.input(node, value)
            tensors = [item for _, item in walk(value) if isinstance(item, Tensor) and not item.is_inference()]
            self._versions.extend((tensor, tensor._version) for tensor in tensors)
            if not isinstance(value, Tensor):
                self.effects.watch(value, f"its argument {name}", given=True)
                self.counters.watch(node, value)
        values = list(given.values())
        return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))

    def _finish(self, result: Any) -> None:
        self.in_place = any(tensor._version != version for tensor, version in self._versions)
        self._check_random()
        self._check_lists()
        self.globals.finish()
        if self.modes.left_switched:
            self.fail("switches gradients outside of a with block")
        self._flush()
        with torch._C.DisableTorchFunction():
            self.effects.release()
        if not self.recording:
            return
        try:
            self.graph.output(self.values.argument(result))
            self.graph.lint()
        except Unsupported as error:
            self.fail(f"returns {error}")
        except Exception as error:
            self.fail(f"the graph is not sound: {type(error).__name__}: {error}")

    # -- every torch function ----------------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in calls.TRANSPARENT:
            with self:
                return calls.see_through(func)(*args, **kwargs)
        inside, self.inside = self.inside, 0
        try:
            return self._call(func, args, kwargs)
        finally:
            self.inside = inside

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plain_args, plain_kwargs = plain(args), plain(kwargs)
        if calls.transformed():
            self.fail("runs under a functorch transform (vmap, grad)")
        if func is torch._C._set_grad_enabled:
            self.modes.set_grad_enabled(bool(plain_args[0]))
            return func(*plain_args)
        run_args, run_kwargs = self.operands.at(calls.name_of(func), plain_args, plain_kwargs, self.quantize)
        versions = self.values.versions(plain_args, plain_kwargs) if self.recording else {}
        result = func(*run_args, **run_kwargs)
        self.operands.follow(plain_args, plain_kwargs, result, calls.name_of(func))
        if not self.recording:
            return result
        try:
            return self._record(func, args, kwargs, result, versions)
        except Unsupported as error:
            self.fail(str(error))
        except Exception as error:  # whatever goes wrong in the bookkeeping costs the graph, never the run
            self.fail(f"recording {calls.name_of(func)} failed: {type(error).__name__}: {error}")
        return result

    def _record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        versions: Any,
    ) -> Any:
        if torch.is_inference_mode_enabled():
            raise Unsupported("enters inference mode")
        if torch._C._autograd._top_saved_tensors_default_hooks(True) != self._hooks:
            raise Unsupported("runs under saved-tensor hooks (activation checkpointing)")
        name = calls.name_of(func)
        if name in calls.HARMLESS:
            return result
        if name in calls.DATA_READS:
            raise Unsupported(f"reads tensor data in Python: {name}")
        if calls.is_getter(func):
            return self.reads.attribute(args[0], name, result)
        if name in calls.SIZE_READS:
            return self.reads.size(name, args, kwargs, result)
        if name in calls.PROPERTY_READS:
            extra = args[1] if len(args) > 1 else None
            self.reads.read(args[0], name, extra, result)
            return result
        if not _holds_tensor(result) and result is not None:
            raise Unsupported(f"turns tensors into a Python value: {name} gives {type(result).__name__}")
        return self.add(func, args, kwargs, result, versions)

    def add(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        versions: Any,
    ) -> Any:
        """Write down one call and make its result known."""
        node_args, node_kwargs = self.values.argument(args), self.values.argument(kwargs)
        where, variable = locate()
        op, target = calls.node_target(func, args)
        node = self.graph.create_node(op, target, tuple(node_args), node_kwargs, name=variable or calls.name_of(func))
        node.meta["where"] = where
        self._guard_length(node, calls.name_of(func), result)
        data_dependent = calls.name_of(func) in calls.DATA_SHAPES or calls.boolean_index(func, args, kwargs)
        self._data_shapes.update([where] if data_dependent else ())
        return self.values.result(node, result, args, kwargs, versions, data_dependent)

    # -- guards --------------------------------------------------------------------------------------------------------

    def guard(self, expression: Expression, value: Any) -> None:
        """Note that Python relied on `expression` being `value`."""
        if not self.tracing:
            return
        for leaf in _leaves(expression):
            if leaf.node in self.values.data_dependent:
                self.fail("branches on a size that depends on tensor data")
                return
        where = locate()[0]
        text = expression.source()
        if text is not None and _printable(value):
            source = f"{text} == {value!r}"
            if isinstance(value, bool):  # in torch.export the condition is a SymBool, which `is True` never holds for
                source = text if value else f"not {text}"
            self.guards.setdefault(source, Guard(source, where))
            return
        self._check(check, (expression.emit(self.graph), value, where))

    def guard_text(self, source: str) -> None:
        """Note a condition on what the call finds, as Python text over the arguments and `self`."""
        self.guards.setdefault(source, Guard(source, locate()[0]))

    def _check(self, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        """A guard inside the graph; the last argument is its place in the user's code."""
        node = self.graph.call_function(function, args)
        node.meta["where"] = args[-1]
        self.late_guards += 1

    def _guard_length(self, node: fx.Node, name: str, result: Any) -> None:
        """Python unpacks a list of tensors, so its length is taken for granted."""
        if name in calls.SIZED_LISTS:
            length = self.graph.call_function(len, (node,))
            self._check(check, (length, len(result), node.meta["where"]))

    # -- children, changes -------------------------------------------------------------------------------------------

    def child_called(
        self,
        path: str | None,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        versions: Any,
        swapped: tuple[dict[str, Any], dict[str, Any]] | None = None,
    ) -> Any:
        """Write down a call of a child module; returns the result with its ints traced.

        `swapped`: the tensors that a `functional_call` puts in place of the child's own meanwhile, and its options.
        """
        given = args if swapped is None else (swapped[0], *args)
        self.operands.follow_child(module, f"{self.state.path}.{path}".lstrip("."), given, kwargs, result)
        if not self.recording:
            return result
        try:
            if path is None:
                raise Unsupported(f"calls a {type(module).__name__} that is not its child")
            self.effects.refresh()
            node_args, node_kwargs = self.values.argument(args), self.values.argument(kwargs)
            where, variable = locate()
            if swapped is None:
                node = self.graph.create_node("call_module", path, tuple(node_args), node_kwargs, name=variable)
            else:
                call = (self.graph.get_attr(path), self.values.argument(swapped[0]), tuple(node_args), node_kwargs)
                node = self.graph.create_node("call_function", torch.func.functional_call, call, swapped[1], variable)
            node.meta["where"] = where
            node.meta["holds_parameters"] = next(module.parameters(), None) is not None
            self.counters.show()
            if swapped is not None or not isinstance(result, Tensor) or _holds_python(module):
                self._check(check_structure, (node, signature(result), where))
            seen = self.values.result(node, result, args, kwargs, versions, False)
            if not isinstance(result, Tensor):
                self.effects.watch(result, f"the result of {path}", given=False)
                self.counters.watch(node, result)
                self.counters.show()
            return seen
        except Unsupported as error:
            self.fail(str(error))
        except Exception as error:
            self.fail(f"recording a {type(module).__name__} failed: {type(error).__name__}: {error}")
        return result

    def _watch_module(self) -> None:
        self.effects.watch_module(self.module)
        for name, value in self.module.__dict__.items():
            if name != "_qgraph" and isinstance(value, (list, dict)) and name != "_buffers":
                self._lists.append((f"self.{name}", value, list(_shallow(value))))

    def _flush(self) -> None:
        """Write down what the forward has changed in objects so far."""
        self._note(self.effects.flush)

    def _note(self, write: Callable[..., None], *values: Any) -> None:
        if not self.recording:
            return
        try:
            with torch._C.DisableTorchFunction():
                write(*values)
        except Unsupported as error:
            self.fail(str(error))
        except Exception as error:
            self.fail(f"recording objects failed: {type(error).__name__}: {error}")

    def _check_lists(self) -> None:
        for name, value, before in self._lists:
            now = list(_shallow(value))
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                self.fail(f"changes {name} in forward")

    def _check_random(self) -> None:
        if self.recording and self._rng is not None and not same_random(self._rng, random_states()):
            self.fail("draws from Python's or numpy's random numbers")


def _holds_python(module: nn.Module) -> bool:
    """Whether a child or one below it runs as Python, so that data may decide what it returns."""
    return any(getattr(m.__dict__.get(STATE), "opaque", None) for m in module.modules())


def _leaves(expression: Any) -> Iterator[Leaf]:
    if isinstance(expression, Leaf):
        yield expression
    else:
        for operand in getattr(expression, "operands", ()):
            yield from _leaves(operand)


def _printable(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.layout, type(None)))


def _shallow(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key != "qgraph":  # our own quantizers may be made during the run
                yield key
                yield item
    elif isinstance(value, (list, tuple)):
        yield from value


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, (tuple, list)) and any(_holds_tensor(v) for v in value)
