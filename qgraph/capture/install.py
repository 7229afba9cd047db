"""The installed forward: each captured module gets a subclass of its own class whose `forward` runs its graph.

The module object, its class by isinstance, its parameters, hooks and state_dict keys stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import _pop_mode_temporarily

from qgraph.capture.arguments import SELF
from qgraph.capture.checkpointing import REENTRANT, StopRecomputation
from qgraph.capture.compiling import (
    beside_graphs,
    entry,
    leave_alone,
    leave_alone_with_all_below,
    outside_graphs,
    run_child,
    under_compiler,
)
from qgraph.capture.guards import GuardMiss
from qgraph.capture.methods import beside_forward
from qgraph.capture.opaque import Running, SiteMode, run_opaque, running_mode
from qgraph.capture.session import active, capturing, current
from qgraph.capture.snapshot import Snapshot, copies
from qgraph.capture.source import raised_at
from qgraph.capture.state import ModuleState
from qgraph.capture.variants import MAX_VARIANTS, Call, Variant, shapes
from qgraph.errors import CaptureError
from qgraph.graph import OWN_FORWARD, STATE, quantizer_modules
from qgraph.modules import ActivationQuantizer, Sparsifier, WeightQuantizer, exports_python

_MOST_TRIED = 2  # graphs in one call

_classes: dict[tuple[type, bool], type] = {}

# In eval these have a fused path of torch's own, which a graph does not take: with every quantizer off they may.
_FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class Captured:
    """Marks installed subclasses. Before the user's class, whose `__init_subclass__` (a registry) is not for them."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def install(module: nn.Module, state: ModuleState) -> None:
    """Give a module its captured class and state. A `forward` that was set on the object itself steps aside for it."""
    module.__dict__[STATE] = state
    own = module.__dict__.pop("forward", None)
    if own is not None:
        module.__dict__[OWN_FORWARD] = own
    module.__class__ = captured_class(base_class(type(module)), own is not None)


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    module.__dict__.pop(STATE, None)
    if OWN_FORWARD in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop(OWN_FORWARD)
    module.__class__ = base_class(type(module))


def base_class(cls: type) -> type:
    """The user's own class behind a captured one."""
    return cls.__bases__[-1] if issubclass(cls, Captured) and Captured in cls.__bases__ else cls


def captured_class(cls: type, own: bool = False) -> type:
    """The subclass of `cls` whose forward runs captured graphs; made once for each class, and for objects of it with a
    forward of their own.
    """
    found = _classes.get((cls, own))
    if found is None:
        found = _classes.setdefault((cls, own), _make_class(cls, own))  # of two threads, the first
    return found


def _own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module.__dict__[OWN_FORWARD](*args, **kwargs)


def _make_class(cls: Any, own: bool) -> type:
    original = _own_forward if own else cls.forward

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if active.count or Running.count or STATE not in self.__dict__:
            return dispatch(self, original, args, kwargs)
        return _run(self, original, args, kwargs)

    def named_children(self: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        # A forward that loops over its children must not meet the quantizers; `.to` and `fully_shard` must.
        children = cls.named_children(self)
        return children if running_mode() is None else (item for item in children if item[0] != "qgraph")

    def reduce(self: nn.Module, protocol: int) -> Any:
        # The class is made at run time, so a pickle names the user's class.
        if cls.__reduce__ is not object.__reduce__ or cls.__reduce_ex__ is not object.__reduce_ex__:
            return _reduce_as(cls, self, protocol)
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _restore, (cls, own), state

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> Any:
        with _uncaptured(self, cls):
            made = cls.__deepcopy__(self, memo)
        return _equip(made, copy.deepcopy(_equipment(self), memo))

    namespace = {
        **beside_forward(cls),
        **({"__deepcopy__": deepcopy} if hasattr(cls, "__deepcopy__") else {}),
        "forward": entry(cls, forward),
        SELF: property(lambda self: self),
        "qgraph_fused": issubclass(cls, _FUSED),
        "named_children": named_children,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (Captured, cls), namespace)


def _restore(cls: type, own: bool = False) -> Any:
    return copyreg.__newobj__(captured_class(cls, own))  # type: ignore[attr-defined]


def _reduce_as(cls: type, module: nn.Module, protocol: int) -> Any:
    """A pickle in the user's own way, which may know nothing of what is ours."""
    with _uncaptured(module, cls):
        reduced: Any = module.__reduce_ex__(protocol)
    function, args, *state = reduced
    return _restore_from, (function, args, state, _equipment(module))


@contextlib.contextmanager
def _uncaptured(module: nn.Module, cls: type) -> Iterator[None]:
    """Let a module be of the user's own class meanwhile: its methods may ask for that."""
    captured = type(module)
    module.__class__ = cls
    try:
        yield
    finally:
        module.__class__ = captured


def _restore_from(function: Any, args: tuple[Any, ...], state: list[Any], equipment: list[Any]) -> Any:
    made = function(*args)
    if state and state[0] is not None:
        made.__setstate__(state[0])
    return _equip(made, equipment)


def _equipment(module: nn.Module) -> list[tuple[str, ModuleState, nn.Module | None]]:
    """What is ours in a module and those below it, by path: the states, and the quantizers."""
    below = [(path, m) for path, m in module.named_modules() if STATE in m.__dict__]
    return [(path, m.__dict__[STATE], m._modules.get("qgraph")) for path, m in below]


def _equip(made: Any, equipment: list[tuple[str, ModuleState, nn.Module | None]]) -> Any:
    """Give it to a copy that a class's own method has made, as far as it is not there."""
    modules = dict(made.named_modules()) if isinstance(made, nn.Module) else {}
    for path, state, quantizers in equipment:
        module = modules.get(path)
        if module is not None and not (isinstance(module, Captured) and STATE in module.__dict__):
            if quantizers is not None:
                module._modules["qgraph"] = quantizers
            install(module, state)
    return made


def dispatch(module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an installed forward: by a captured graph that holds for this call, else as recorded Python."""
    if STATE not in module.__dict__:  # a slice of a Sequential, another of a model's class: made of it, not prepared
        return forward(module, *args, **kwargs)
    if active.count and not torch.compiler.is_compiling():
        session = current()
        if session is not None:
            return session.enter(module, forward, args, kwargs)
    if Running.count and torch._C._len_torch_function_stack() > 0:
        with _pop_mode_temporarily() as mode:
            if not isinstance(mode, SiteMode):
                return _run(module, forward, args, kwargs)
            state = module.__dict__[STATE]
            result = run_child(_run, state, mode.compiler, (module, forward, args, kwargs))
            mode.operands.follow_child(module, state.path, args, kwargs, result)
            return result
    return _run(module, forward, args, kwargs)


def _run(module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: ModuleState = module.__dict__[STATE]
    if exports_python():
        return run_opaque(module, state, forward, args, kwargs)
    if module.qgraph_fused and not module.training and _all_off(module):
        return forward(module, *args, **kwargs)
    if state.asked < len(state.shared.varying):
        _ask_for_structure(module, state)
    call = state.call(args, kwargs)
    variant = state.select(module, call)
    if variant is None:
        return run_python(module, state, forward, args, kwargs, call)
    if torch.compiler.is_dynamo_compiling() and variant.left_to_python:
        return beside_graphs(variant.function(), module, *call.values)
    if torch.compiler.is_compiling():
        return variant.run(module, call.values)
    if variant.late_guards:
        return _run_checked(module, state, variant, forward, call, args, kwargs)
    try:
        return variant.run(module, call.values)
    except GuardMiss:  # of a child, which gives something else than a tensor for the first time
        return run_python(module, state, forward, args, kwargs, call)


def _ask_for_structure(module: nn.Module, state: ModuleState) -> None:
    for variant in state.variants:
        variant.ask_for_structure(module, state.shared.varying)
    state.asked = len(state.shared.varying)


def _all_off(module: nn.Module) -> bool:
    return not any(quantizer.enabled for quantizer in quantizer_modules(module))


def _run_checked(
    module: nn.Module, state: ModuleState, first: Variant, forward: Any, call: Call, args: Any, kwargs: Any
) -> Any:
    """Graphs with guards inside them, until one holds: for sizes not met before, be ready to take back what ran."""
    key = shapes(call.values)
    tried = []
    for variant in itertools.islice(state.candidates(module, call, first, key), _MOST_TRIED):
        tried.append(variant)
        before = None if key in variant.validated else Snapshot(module, call.values, contents=variant.in_place)
        try:
            if before is not None and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
                # A checkpoint counts the tensors saved: a run that may be taken back must save none.
                with torch.no_grad():
                    variant.run(module, call.values)
                before.restore()
            result = variant.run(module, call.values)
        except GuardMiss as miss:
            if key in variant.validated:
                variant.validated.clear()  # a child does something else than it did at these sizes
            if miss.by_size:
                variant.rejected.add(key)
            if before is not None:
                before.restore()
            continue
        variant.validated.add(key)
        return result
    if len(state.variants) >= MAX_VARIANTS:  # no other will come
        for variant in tried:
            variant.rejected.add(key)
    return run_python(module, state, forward, args, kwargs, call)


def run_python(module: nn.Module, state: ModuleState, forward: Any, args: Any, kwargs: Any, call: Call) -> Any:
    """Run the module's own Python. Under torch.compile that is a graph break, but where it has nothing to quantize it
    is compiled as eager's would be; under torch.export it is traced like the rest.
    """
    if state.frozen:
        raise CaptureError(
            f"module '{state.path}' is frozen and was called in a way that none of its graphs holds for "
            f"({', '.join(call.names) or 'no arguments'}{', in train mode' if module.training else ''}); expected a "
            f"call as those before qgraph.freeze. Make such a call of the prepared model in eval, then freeze it again."
        )
    if any(isinstance(value, fx.Proxy) for value in call.values):
        raise CaptureError(
            f"module '{state.path}' is prepared and was called by torch.fx.symbolic_trace, which would lose them. "
            f"Trace the float model and prepare the GraphModule; qgraph.inspect(model).graphs has our graphs."
        )
    if torch.compiler.is_exporting() or not under_compiler():
        return _python_body(module, state, forward, args, kwargs, call)
    known = state.known_opaque(call, module.training)
    if known is not None and not state.python_sites and not _own_weights(module):
        return forward(module, *args, **kwargs)
    # Compiled, the second run of a reentrant checkpoint in backward would be float.
    children = known is None or known.reason != REENTRANT
    return outside_graphs(_python_body, module, state, forward, args, kwargs, call, children=children)


def _own_weights(module: nn.Module) -> bool:
    """Whether a module holds a matrix itself, which another branch of its forward may multiply with."""
    return any(parameter is not None and parameter.dim() > 1 for parameter in module._parameters.values())


def _python_body(
    module: nn.Module, state: ModuleState, forward: Any, args: Any, kwargs: Any, call: Call, compiler: Any = None
) -> Any:
    """Run the module's own Python under the same quantizers; capture a call of a new kind for the next time."""
    known = state.known_opaque(call, module.training)
    if known is None and (state.variants or state.opaque):
        state.misses += 1
    # Inside torch.export no graph of ours can be recorded, since the tensors are not real.
    if known is not None or torch.compiler.is_exporting() or len(state.variants) >= MAX_VARIANTS:
        result = run_opaque(module, state, forward, args, kwargs, compiler)
        state.returned(result)
        if not torch.compiler.is_exporting():
            _install_made(module, state)
        return result
    before = Snapshot(module, call.values, contents=True)
    try:
        if not torch.is_inference_mode_enabled():
            with capturing(quantize=True) as session:
                return session.start(module, state, forward, args, kwargs, call)
        _record_for_inference(module, state, forward, args, kwargs, call)
    except (StopRecomputation, GuardMiss):
        raise
    except Exception as error:
        # Should recording be to blame, the plain run goes well; else the user's own error is raised again from there.
        before.restore()
        result = run_opaque(module, state, forward, args, kwargs)
        reason = f"recording raised {type(error).__name__}: {error}"
        state.give_up(call, module.training, reason, raised_at(error))
        return result
    before.restore()
    if state.select(module, call) is None:
        return run_opaque(module, state, forward, args, kwargs)
    return _run(module, forward, args, kwargs)


def _record_for_inference(
    module: nn.Module, state: ModuleState, forward: Any, args: Any, kwargs: Any, call: Call
) -> None:
    """Record a call that is made in inference mode outside of it, on copies: its tensors do not tell of changes."""
    with torch.inference_mode(False), torch.no_grad(), capturing(quantize=True) as session:
        session.start(module, state, forward, copies(args), copies(kwargs), call)


def _install_made(module: nn.Module, state: ModuleState) -> None:
    """Capture from the next call on what a forward has made: this one ran as part of its maker's."""
    children = [
        (name, child)
        for name, child in module._modules.items()
        if child is not None and name != "qgraph" and STATE not in child.__dict__
    ]
    left = tuple((id(child), len(child._modules)) for _, child in children)
    if left != state.left:
        state.left = left
        for name, child in children:
            state.install(child, name)


_ours = (
    *(f"{__package__}.", "qgraph.graph", "qgraph.modules", "qgraph.ops.recompute", "qgraph.placement", "qgraph.sites"),
)
leave_alone(*(module for name, module in sys.modules.items() if name.startswith(_ours)))
_functions = [f for f in torch.autograd.Function.__subclasses__() if f.__module__.startswith("qgraph.ops.")]
leave_alone_with_all_below(
    WeightQuantizer.forward, ActivationQuantizer.forward, Sparsifier.forward, *(f.backward for f in _functions)
)
