"""One capture: the recorders of nested forwards on one thread, and the order in which they work."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from qgraph.capture.checkpointing import REENTRANT, repeatable
from qgraph.capture.compiling import is_torchs
from qgraph.capture.functions import watched
from qgraph.capture.guards import GuardMiss
from qgraph.capture.opaque import quantized_again
from qgraph.capture.patches import patched
from qgraph.capture.recorder import Recorder
from qgraph.capture.source import definition, within_call_of
from qgraph.capture.state import ModuleState
from qgraph.capture.structure import Unsupported
from qgraph.capture.values import plain
from qgraph.capture.variants import MAX_VARIANTS, Call, Variant, shapes
from qgraph.graph import STATE

_local = threading.local()
_install_lock = threading.RLock()


def current() -> Session | None:
    """The capture of this thread, or None."""
    return getattr(_local, "session", None)


@contextlib.contextmanager
def capturing(quantize: bool, reason: str | None = None, where: str | None = None) -> Iterator[Session]:
    """Run code with every module forward recorded; see `Session`."""
    session, outer = Session(quantize, reason, where), current()
    try:
        with patched(current), repeatable(_checkpointed):
            active.add(1)
            _local.session = session
            yield session
    finally:
        if current() is session:
            _local.session = outer
            active.add(-1)


def _copied(value: Any) -> Any:
    # A copy that asks for a gradient and is no leaf, as what a Function writes into may not be one.
    return value.detach().requires_grad_(value.requires_grad).clone() if isinstance(value, Tensor) else value


def _checkpointed(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """A function is checkpointed: by a forward, which no graph holds then, or by the `__call__` of a child's class,
    which a graph calls all the same.
    """
    session = current()
    recorder = None if session is None else session.recorder
    if recorder is not None and not within_call_of(nn.Module, Recorder.run.__code__):
        recorder.fail("checkpoints activations")
    return quantized_again(function, args)


class _Active:
    """How many captures run, over all threads: lets the installed forward skip the thread-local look-up."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self, change: int) -> None:
        with self._lock:
            self.count += change


active = _Active()


class Session:
    """The recorders of one captured run, innermost last.

    Parameters
    ----------
    quantize : bool
        Whether the run itself is quantized: True for a call of the user's, False for the example run of `prepare`.
    reason : str, optional
        Why this run is not to be recorded; only the sites are then noted.
    where : str, optional
        The line of the user's code that is to blame for it.
    """

    def __init__(self, quantize: bool, reason: str | None = None, where: str | None = None) -> None:
        self.quantize = quantize
        self.reason, self.where = reason, where
        self.stack: list[Recorder] = []
        self._announced: nn.Module | None = None
        self.new: list[tuple[nn.Module, Variant]] = []

    @property
    def recorder(self) -> Recorder | None:
        """The recorder whose forward's own code is running."""
        top = self.stack[-1] if self.stack else None
        return top if top is not None and top.inside else None

    def rewrite(self) -> None:
        """Run the model's pipeline on the graphs captured by a run in float."""
        new, self.new = self.new, []
        for module, variant in new:
            state: ModuleState = module.__dict__[STATE]
            try:
                state.shared.pipeline.rewrite(state.owner(module), variant)
            except BaseException:
                state.variants.remove(variant)
                raise

    # -- what the patches report -------------------------------------------------------------------------------------

    def call_module(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        parent = self.recorder
        if parent is None:
            self._announced = module
            return original(module, *args, **kwargs)
        with parent.outside():
            path = parent.path_to(module)
            if path is not None and STATE not in module.__dict__:  # perhaps made in a forward
                parent.state.install(module, path)
        if path is None and STATE not in module.__dict__:
            return original(module, *args, **kwargs)  # made on the fly: part of the caller's own forward
        plain_args, plain_kwargs = plain(args), plain(kwargs)
        with parent.suspended(plain_args, plain_kwargs):
            versions = parent.values.versions(plain_args, plain_kwargs)
            self._announced = module
            result = original(module, *plain_args, **plain_kwargs)
        with torch._C.DisableTorchFunction(), parent.outside():
            return parent.child_called(path, module, args, kwargs, result, versions)

    def call_functionally(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        tensors: dict[str, Any],
        args: Any,
        kwargs: Any,
        options: dict[str, bool],
    ) -> Any:
        """A `functional_call` by the forward: a child is called, with other tensors than its own."""
        parent = self.recorder
        if parent is None:
            return original(module, tensors, args, kwargs, **options)
        with parent.outside():
            path = parent.path_to(module)
        if not path:
            parent.fail("calls a module with other parameters than its own, which is not its child (functional_call)")
            return original(module, tensors, args, kwargs, **options)
        plain_args, plain_kwargs = plain(args), plain(kwargs)
        with parent.suspended((*tensors.values(), *plain_args), plain_kwargs):
            versions = parent.values.versions((*tensors.values(), *plain_args), plain_kwargs)
            result = original(module, tensors, plain_args, plain_kwargs, **options)
        with torch._C.DisableTorchFunction(), parent.outside():
            return parent.child_called(path, module, args, kwargs, result, versions, (tensors, options))

    def call_leaf(self, target: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A torch.autograd.Function: one call of the graph, never looked into."""
        parent = self.recorder
        if parent is None:
            return original(*args, **kwargs)
        plain_args, plain_kwargs = plain(args), plain(kwargs)
        if target.function is CheckpointFunction:  # runs the forward's own code
            parent.fail(REENTRANT)
            return original(*plain_args, **plain_kwargs)
        with parent.suspended(plain_args, plain_kwargs):
            versions = parent.values.versions(plain_args, plain_kwargs)
            result = self._run_leaf(parent, target, original, plain_args, plain_kwargs)
        with torch._C.DisableTorchFunction(), parent.outside():
            return self._leaf_called(parent, target, args, kwargs, result, versions)

    def _run_leaf(self, parent: Recorder, target: Any, original: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run a Function that may be a site; where the run is quantized, a run on copies says what to quantize."""
        if kwargs or not any(parent.operands.source(value).kind == "parameter" for value in args):
            return original(*args, **kwargs)
        if not parent.quantize:
            result, target.site = watched(target.function, original, args)
            self._site_of(parent, target, args)
            return result
        with torch.random.fork_rng({value.device for value in args if isinstance(value, Tensor) and value.is_cuda}):
            _, target.site = watched(target.function, original, tuple(map(_copied, args)))
        return original(*self._site_of(parent, target, args))

    def _site_of(self, parent: Recorder, target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Note the site of a Function, if it is one: the arguments to run it with."""
        if target.site is None:
            return args
        with torch._C.DisableTorchFunction():
            return parent.operands.at_call(target.site, args, {}, parent.quantize)[0]

    def _leaf_called(
        self, parent: Recorder, target: Any, args: Any, kwargs: Any, result: Any, versions: dict[int, int]
    ) -> Any:
        plain_args, plain_kwargs = plain(args), plain(kwargs)
        parent.operands.follow(plain_args, plain_kwargs, result, "apply")
        if not parent.recording:
            return result
        try:
            seen = parent.add(target, args, kwargs, result, versions)
            parent.counters.show()
            return seen
        except Unsupported as error:
            parent.fail(str(error))
            return result

    def assigning(self, module: nn.Module, name: str) -> None:
        """An attribute of a module is about to be set: where a forward's own code does, perhaps one of a child."""
        recorder = self.recorder
        for running in self.stack:
            running.attributes.wrote(module, name, own=running is recorder)
        if recorder is not None and recorder.recording and module is not recorder.module:
            with recorder.outside():
                path = recorder.path_to(module)
            if path is None and STATE in module.__dict__:
                recorder.fail(f"assigns to a {type(module).__name__} that is not its child")
            elif path is not None:
                with recorder.outside():
                    recorder.effects.watch_child(module, path)

    def enter_autocast(self, context: torch.autocast) -> None:
        if self.recorder is not None:
            self.recorder.modes.enter_autocast(context)

    def leave_autocast(self, context: torch.autocast) -> None:
        if self.recorder is not None:
            self.recorder.modes.leave_autocast(context)

    def start(
        self, module: nn.Module, state: ModuleState, forward: Callable[..., Any], args: Any, kwargs: Any, call: Call
    ) -> Any:
        """Run the outermost forward of a session that began inside its call, since no graph held for that."""
        return self.record_forward(module, state, forward, args, kwargs, call, known=False)

    # -- forwards ----------------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one installed forward: by its graph if one holds for the call, else recorded."""
        announced, self._announced = self._announced is module, None
        if self.recorder is not None and not announced:
            return forward(module, *args, **kwargs)  # called as a plain method: part of the caller's own forward
        state: ModuleState = module.__dict__[STATE]
        call = state.call(args, kwargs)
        variant = state.select(module, call)
        if variant is not None and not variant.late_guards:
            with contextlib.suppress(GuardMiss):  # of a child, which gives something else than a tensor now
                return variant.run(module, call.values)
            variant = None
        return self.record_forward(module, state, forward, args, kwargs, call, known=variant is not None)

    def record_forward(
        self,
        module: nn.Module,
        state: ModuleState,
        forward: Any,
        args: Any,
        kwargs: Any,
        call: Call,
        known: bool,
    ) -> Any:
        """Run a forward under a recorder; keep the graph, or the reason why there is none."""
        reason = self.reason or call.problem
        if known:
            reason = "already captured"
        elif len(state.variants) >= MAX_VARIANTS:
            reason = f"more than {MAX_VARIANTS} variants"
        elif reason is None and (entry := state.known_opaque(call, module.training)) is not None:
            reason = entry.reason
        training, before = module.training, len(state.variants)
        recorder = Recorder(module, state, self.quantize, reason, self.where or definition(module, forward))
        self.stack.append(recorder)
        try:
            try:
                result = recorder.run(forward, call.names, args, {name: kwargs[name] for name in sorted(kwargs)})
            finally:
                self.stack.pop()
            if not known:
                self._keep(recorder, call, training, before)
        finally:
            recorder.release()
        state.returned(result)
        return result

    def _keep(self, recorder: Recorder, call: Call, training: bool, before: int) -> None:
        state = recorder.state
        with _install_lock:
            # With the tensors at hand: a learned step starts from the weight, whichever way it came here.
            recorder.operands.place_all()
            if recorder.recording:
                variant = Variant(
                    call.names,
                    call.signature,
                    training,
                    recorder.attributes.held,
                    tuple(recorder.guards.values()),
                    recorder.graph,
                    recorder.late_guards,
                    recorder.in_place,
                    torchs=is_torchs(type(recorder.module)),
                    left_to_python=recorder.left_to_python,
                )
                if any(variant.alike(other) for other in state.variants[before:]):
                    return  # another thread was faster
                if self.quantize:  # other threads, and a second call in this very run, must meet the rewritten graph
                    state.shared.pipeline.rewrite(state.owner(recorder.module), variant)
                    variant.validated.add(shapes(call.values))
                else:
                    self.new.append((recorder.module, variant))
                state.variants.append(variant)
                return
            state.keep_sites(recorder.operands.sites)
            first = recorder.globals.changed
            state.give_up(call, training, recorder.reason or "", recorder.reason_where, first)
