"""Everything that capture patches while it runs, in one place, undone in `finally`.

The patched functions ask for the capture of the calling thread, so other threads go on undisturbed.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._functorch import vmap
from torch._higher_order_ops import utils as higher_order
from torch.nn.utils import stateless
from torch.utils import checkpoint

from qgraph.capture.calls import Apply
from qgraph.capture.values import plain

# Everything that is replaced, here and in `checkpointing`; tests hold that after a capture each is as before.
PATCHED: tuple[tuple[Any, str], ...] = (
    (nn.Module, "__call__"),
    (nn.Module, "__getattribute__"),
    (nn.Module, "__setattr__"),
    (torch.autograd.Function, "apply"),
    (torch.autocast, "__enter__"),
    (torch.autocast, "__exit__"),
    (stateless, "_functional_call"),
    (vmap, "_vmap_increment_nesting"),
    (checkpoint, "_checkpoint_without_reentrant_generator"),
    (checkpoint.CheckpointFunction, "forward"),
    ("torch._dynamo.eval_frame", "_stance"),  # by its name: importing the compiler takes seconds
    (higher_order, "_hop_compile_and_call"),
)

_INHERITED: Any = object()  # in place of an original that a base class has


class Patches:
    """Replaced attributes of classes and modules, put back when the last user is through."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._originals: dict[tuple[Any, str], Any] = {}

    @contextlib.contextmanager
    def on(self, install: Callable[[], None]) -> Iterator[None]:
        """Run with what `install` replaces; a user beside another finds it replaced."""
        try:
            with self._lock:
                self._users += 1
                if self._users == 1:
                    install()
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute; for `install` to call."""
        if (owner, name) not in PATCHED and (getattr(owner, "__name__", None), name) not in PATCHED:
            raise KeyError(f"{owner}.{name}: list it in PATCHED")
        self._originals[owner, name] = owner.__dict__.get(name, _INHERITED)
        setattr(owner, name, value)

    def _restore(self) -> None:
        for (owner, name), value in self._originals.items():
            if value is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._originals.clear()


_patches, _branches = Patches(), Patches()


@contextlib.contextmanager
def branching() -> Iterator[None]:
    """While this runs, `torch.cond` runs the branch that its predicate says.

    Otherwise it compiles both, in eager mode too, and a compiler cannot look into the prepared modules in them.
    """

    def install() -> None:
        compile_and_call = getattr(higher_order, "_hop_compile_and_call", None)  # of torch's own, and not of every one
        if compile_and_call is None:
            return

        def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any = None) -> Any:
            if function.__name__ != "_cond_op_wrapper" or torch.compiler.is_exporting():
                return compile_and_call(function, args, kwargs)
            predicate, if_true, if_false, operands = args
            return if_true(*operands) if predicate else if_false(*operands)

        _branches.replace(higher_order, "_hop_compile_and_call", call)

    with contextlib.nullcontext() if torch.compiler.is_compiling() else _branches.on(install):
        yield


@contextlib.contextmanager
def patched(current: Callable[[], Any]) -> Iterator[None]:
    """While a capture runs, calls of modules and of autograd functions, autocast, functional calls, vmap, and
    reads and assignments of a module's attributes report to the session of their thread.

    Parameters
    ----------
    current : callable
        Gives the calling thread's capture session, or None.
    """
    with _patches.on(lambda: _install(current)), branching():
        yield


def _install(current: Callable[[], Any]) -> None:
    module_call = nn.Module.__call__
    apply = torch.autograd.Function.__dict__["apply"]
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def call_module(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        session = current()
        if session is None:
            return module_call(module, *args, **kwargs)
        return session.call_module(module_call, module, args, kwargs)

    def apply_function(function: type, *args: Any, **kwargs: Any) -> Any:
        session = current()
        original = apply.__get__(None, function)
        if session is None:
            return original(*args, **kwargs)
        return session.call_leaf(Apply(function), original, args, kwargs)

    def enter_autocast(context: torch.autocast) -> Any:
        session = current()
        if session is not None:
            session.enter_autocast(context)
        return enter(context)

    def leave_autocast(context: torch.autocast, *error: Any) -> Any:
        session = current()
        if session is not None:
            session.leave_autocast(context)
        return leave(context, *error)

    get_attribute, set_attribute = nn.Module.__getattribute__, nn.Module.__setattr__

    def read(module: nn.Module, name: str) -> Any:
        session = current()
        if session is not None and session.recorder is not None:
            session.recorder.attributes.read(module, name, sys._getframe(1))
        return get_attribute(module, name)

    def assign(module: nn.Module, name: str, value: Any) -> None:
        session = current()
        if session is not None:
            session.assigning(module, name)
        set_attribute(module, name, value)

    functional_call, vmap_level = stateless._functional_call, vmap._vmap_increment_nesting

    def call_functionally(module: nn.Module, tensors: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        session = current()
        if session is None:
            return functional_call(module, tensors, args, kwargs, **options)
        args = args if isinstance(args, tuple) else () if args is None else (args,)
        return session.call_functionally(functional_call, module, tensors, args, kwargs or {}, options)

    def enter_vmap(*args: Any, **kwargs: Any) -> Any:
        session = current()
        if session is not None and session.recorder is not None:
            session.recorder.fail("runs under vmap")
        return vmap_level(*plain(args), **kwargs)

    _patches.replace(stateless, "_functional_call", call_functionally)
    _patches.replace(vmap, "_vmap_increment_nesting", enter_vmap)
    _patches.replace(nn.Module, "__call__", call_module)
    _patches.replace(nn.Module, "__getattribute__", read)
    _patches.replace(nn.Module, "__setattr__", assign)
    _patches.replace(torch.autograd.Function, "apply", classmethod(apply_function))
    _patches.replace(torch.autocast, "__enter__", enter_autocast)
    _patches.replace(torch.autocast, "__exit__", leave_autocast)
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None:  # compiled functions inside a recorded forward run as they are written
        _patches.replace(compiler, "_stance", compiler.DynamoStance("force_eager"))
