"""What comes before a changed layer need not be computed again: outputs kept in one evaluation, given in the next.

A call is kept where it is known to do nothing but compute: it runs as graphs that assign nothing, changes no argument
and no buffer, draws nothing at random, and nobody changes its output later.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree

from qgraph.graph import STATE

ASSIGNS = (setattr, delattr, operator.setitem, operator.delitem)
Call = Callable[..., Any]
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


@dataclass(slots=True, eq=False)
class _Call:
    """One call of a module: the calls inside it, its place in the order of events, and its output where it is kept."""

    path: str
    start: int
    end: int = 0
    inside: list[_Call] = field(default_factory=list)
    watched: bool = False  # whether a module inside it has hooks, which have to run
    given: _Value | None = None  # the arguments of an outermost call
    output: _Value | None = None


@dataclass(slots=True, eq=False)
class _Value:
    """Tensors and plain values in containers, and by what to tell that the tensors were changed."""

    leaves: list[Any]
    spec: Any
    marks: list[Any]

    @classmethod
    def of(cls, value: Any) -> _Value | None:
        """None for what holds other objects, which may be changed unseen."""
        leaves, spec = pytree.tree_flatten(value)
        if not all(map(_is_plain_leaf, leaves)):
            return None
        return cls(leaves, spec, [_mark(leaf) for leaf in leaves if isinstance(leaf, Tensor)])

    def tensors(self) -> Iterator[Tensor]:
        return (leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def untouched(self) -> bool:
        return all(map(_bears, self.tensors(), self.marks))

    def equals(self, other: _Value | None) -> bool:
        return other is not None and self.spec == other.spec and all(map(_equal, self.leaves, other.leaves))

    def rebuilt(self) -> Any:
        return pytree.tree_unflatten(self.leaves, self.spec)


class Replay:
    """Keeps what the modules of a model compute in one evaluation, and gives it back in others.

    Parameters
    ----------
    model : nn.Module
        A prepared model.
    limit : int
        Bytes to keep at most; beyond it, what saves least time for its size is let go.
    """

    def __init__(self, model: nn.Module, limit: int) -> None:
        self.model, self.limit = model, limit
        self._modules = {path: module for path, module in model.named_modules() if _is_followed(path, module)}
        self._within = {path: _within(path, self._modules) for path in self._modules}
        self.clear()

    def clear(self, reason: str | None = None) -> None:
        """Give nothing back from now on, and say why."""
        self.reason = reason
        self.bytes = 0  # that are kept
        self._roots: list[_Call] = []
        self._stack: list[_Call] = []
        self._storages: dict[int, tuple[str, int]] = {}  # address -> the path that it counts for, and its bytes
        self._seconds: dict[str, float] = defaultdict(float)
        self._dropped: set[str] = set()
        self._ticks = 0

    def keep(self, evaluate: Callable[[], float], units: Sequence[Collection[nn.Module]]) -> float:
        """Evaluate, keep what is computed, and see whether giving it back would change the score.

        Parameters
        ----------
        evaluate : callable
            Runs the model, as often as it likes, and returns a number.
        units : sequence of collections of quantizers
            What the evaluations that follow will change, one a time.
        """
        with self._recording():
            score = evaluate()
        if self._roots and units:
            try:
                with self.until(max(units, key=self._first_use)):
                    again = evaluate()
            except Exception as error:  # it looks at what the model does inside
                self.clear(f"with activations given back evaluate raised {type(error).__name__}: {error}")
            else:
                if again != score:
                    self.clear(f"with activations given back evaluate found {again} for {score}")
        return score

    def note(self) -> str:
        """What is kept, for people."""
        kept = {call.path for call in self._calls(self._roots) if call.output is not None}
        if kept:
            return f"activations of {len(kept)} modules were kept ({self.bytes / 2**20:,.1f} MB), not computed again"
        return f"every evaluation ran in full: {self.reason or 'no activation could be kept'}"

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Keep what is computed inside."""
        self.clear()
        if self.limit <= 0:
            self.reason = "cache_bytes is 0"
            yield
            return
        with intercepted(self._modules, self._record):
            yield
        pure = {path: is_pure(module) for path, module in self._modules.items()}
        for call in self._calls(self._roots):
            if call.output is not None:
                good = pure[call.path] and call.output.untouched()
                call.output = _Value(call.output.leaves, call.output.spec, []) if good else None
        for root in self._roots:
            if root.given is not None and not root.given.untouched():
                root.given = None
        self.bytes = sum(self._storages_of(self._roots).values())

    @contextlib.contextmanager
    def until(self, changed: Collection[nn.Module], calls: int | None = None) -> Iterator[_Run]:
        """Give inside what was kept, up to the first call of a module that holds one of these quantizers; where a
        number of calls is given, run that many of the model's and give the outputs of the others as they were kept.
        """
        total = len(self._roots)
        sample = range(total) if calls is None else {(2 * i + 1) * total // (2 * calls) for i in range(calls)}
        run = _Run(self._roots, self._holders(changed), sample)
        with intercepted(self._modules, run.call) if self._roots else contextlib.nullcontext():
            yield run

    def _first_use(self, changed: Collection[nn.Module]) -> int:
        """Where in the first outermost call the quantizers are first used."""
        return _cut(self._roots[0], self._holders(changed)) if self._roots else 0

    def _holders(self, quantizers: Collection[nn.Module]) -> set[str]:
        wanted = {id(module) for module in quantizers}
        named = self.model.named_modules(remove_duplicate=False)
        parts = [path.split(".") for path, module in named if id(module) in wanted]
        return {".".join(names[: names.index("qgraph")]) for names in parts}

    def _record(self, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call = _Call(path, self._tick())
        outermost = not self._stack
        (self._roots if outermost else self._stack[-1].inside).append(call)
        if _has_hooks(self._modules[path]):
            for around in self._stack:
                around.watched = True
        with torch._C.DisableTorchFunction():  # the mode of a module that runs as Python must not see this
            given, buffers = _Value.of((args, kwargs)), _Value.of(list(self._modules[path].buffers()))
            random = _random_state() if outermost else None
        self._stack.append(call)
        started = time.perf_counter()
        try:
            result = forward(*args, **kwargs)
        finally:
            self._stack.pop()
        self._seconds[path] += time.perf_counter() - started
        call.end = self._tick()
        with torch._C.DisableTorchFunction():
            if outermost and not _same_random(random, _random_state()):
                self.reason = "the model draws random numbers"
                for inner in self._calls([call]):
                    inner.output = None
            else:
                call.given = given if outermost else None
                # A child without tensors may make a weight, whose origin the Python around it has to see.
                computed = given is not None and next(given.tensors(), None) is not None and given.untouched()
                still = buffers is not None and buffers.untouched()
                if computed and still and not call.watched and path not in self._dropped:
                    call.output = self._kept(path, result)
        return result

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def _kept(self, path: str, result: Any) -> _Value | None:
        value = _Value.of(result)
        if value is None:
            return None
        if any(tensor.requires_grad for tensor in value.tensors()):
            self.reason = "evaluate runs with gradients; put torch.no_grad() around it"
            return None
        for tensor in value.tensors():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._storages:
                self._storages[storage.data_ptr()] = (path, storage.nbytes())
                self.bytes += storage.nbytes()
        while self.bytes > self.limit:
            self._drop_least()
        return None if path in self._dropped else value

    def _storages_of(self, calls: list[_Call]) -> dict[int, int]:
        values = [call.output for call in self._calls(calls) if call.output is not None]
        storages = [tensor.untyped_storage() for value in values for tensor in value.tensors()]
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    def _drop_least(self) -> None:
        """Let go of the outputs of one module: what would save least, a byte."""
        sizes: dict[str, int] = defaultdict(int)
        for path, size in self._storages.values():
            sizes[path] += size
        least = min(sizes, key=lambda path: self._seconds[path] * self._within[path] / max(1, sizes[path]))
        self._dropped.add(least)
        self.bytes -= sizes[least]
        self._storages = {key: held for key, held in self._storages.items() if held[0] != least}
        for call in self._calls(self._roots):
            if call.path == least:
                call.output = None

    def _calls(self, calls: list[_Call]) -> Iterator[_Call]:
        for call in calls:
            yield call
            yield from self._calls(call.inside)


@contextlib.contextmanager
def intercepted(modules: Mapping[str, nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Inside, each module's forward is `call(path, forward, args, kwargs)`."""
    own = {path: module.__dict__.get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.__dict__["forward"] = _Forward(call, path, module.forward)
        yield
    finally:
        for path, module in modules.items():
            if own[path] is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own[path]


class _Forward:
    """A module's forward, handed to who decides whether it runs."""

    def __init__(self, call: Callable[..., Any], path: str, forward: Callable[..., Any]) -> None:
        self.call, self.path, self.forward = call, path, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.forward(*args, **kwargs)
        return self.call(self.path, self.forward, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.forward, memo)  # a copy of the model is no part of this


class _Run:
    """One evaluation beside the recorded one, as long as it makes the same calls."""

    def __init__(self, roots: list[_Call], holders: set[str], sample: Collection[int]) -> None:
        self.roots, self.holders, self.sample = roots, holders, sample
        self.skipped = 0  # outermost calls that did not run, for they are not in the sample
        self.next = 0  # of the outermost calls
        self.cut = 0
        self.stack: list[list[_Call]] = []  # of each call that is running, the calls that it is still to make

    @property
    def times(self) -> float:
        """How many times as many of the outermost calls there are as have run."""
        return len(self.roots) / (len(self.roots) - self.skipped) if self.skipped else 1.0

    def call(self, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            recorded = self._recorded(path, args, kwargs)
        if recorded is not None and recorded.output is not None:
            unwanted = not self.stack and self.next - 1 not in self.sample
            self.skipped += unwanted
            if unwanted or recorded.end < self.cut:
                return recorded.output.rebuilt()
        self.stack.append([] if recorded is None else recorded.inside[::-1])
        try:
            return forward(*args, **kwargs)
        finally:
            self.stack.pop()

    def _recorded(self, path: str, args: Any, kwargs: Any) -> _Call | None:
        if self.stack:
            expected = self.stack[-1].pop() if self.stack[-1] else None
            if expected is not None and expected.path == path:
                return expected
            self.stack[-1].clear()  # another branch: none of what comes is known
            return None
        found = self.roots[self.next] if self.next < len(self.roots) else None
        self.next += 1
        if found is None or found.path != path or found.given is None:
            return None
        if not found.given.equals(_Value.of((args, kwargs))):
            return None
        self.cut = _cut(found, self.holders)
        return found


def _cut(root: _Call, holders: set[str]) -> int:
    """The first event of the holders; of one that was not called, of the module around it that was."""
    first: dict[str, int] = {}
    waiting = [root]
    while waiting:
        call = waiting.pop()
        first[call.path] = min(call.start, first.get(call.path, call.start))
        waiting.extend(call.inside)
    cuts = []
    for path in holders:
        while path not in first and path:
            path = path.rpartition(".")[0]
        cuts.append(first.get(path, root.start))
    return min(cuts, default=root.start)


def _is_followed(path: str, module: nn.Module) -> bool:
    return "qgraph" not in path.split(".") and (STATE in module.__dict__ or (_is_torch(module) and not module._modules))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module_hooks._global_forward_hooks)


def _is_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _within(path: str, modules: Collection[str]) -> int:
    """How many modules the one around it holds: of the layers among them those that follow gain."""
    around = path.rpartition(".")[0]
    return sum(other.startswith(f"{around}.") for other in modules) if around else len(modules)


def _assigns(variant: Any) -> bool:
    return variant.in_place or any(node.target in ASSIGNS for node in variant.graph.nodes if node.op == "call_function")


def is_pure(module: nn.Module) -> bool:
    """Whether a module and all below it run as graphs that assign nothing, in every way in which they were called."""
    for below, part in module.named_modules():
        state = part.__dict__.get(STATE)
        if state is None and not (_is_torch(part) or "qgraph" in below.split(".")):
            return False
        if state is not None and (state.opaque or any(map(_assigns, state.variants))):
            return False
    return True


def is_plain(value: Any) -> bool:
    """Whether it is containers of tensors, numbers and names alone."""
    return all(map(_is_plain_leaf, pytree.tree_leaves(value)))


def _is_plain_leaf(leaf: Any) -> bool:
    """A tensor has to hold its own values: not one inside torch.func.vmap or grad."""
    if isinstance(leaf, Tensor):
        return type(leaf) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(leaf)
    return isinstance(leaf, PLAIN)


def _mark(tensor: Tensor) -> Any:
    return tensor.clone() if tensor.is_inference() else tensor._version  # inference tensors count no versions


def _bears(tensor: Tensor, mark: Any) -> bool:
    return torch.equal(tensor, mark) if isinstance(mark, Tensor) else tensor._version == mark


def _random_state() -> tuple[Tensor, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return (torch.get_rng_state(), *cuda)


def _same_random(before: tuple[Tensor, ...] | None, after: tuple[Tensor, ...]) -> bool:
    return before is not None and len(before) == len(after) and all(map(torch.equal, before, after))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return one is other or (alike and torch.equal(one, other))
    return type(one) is type(other) and one == other
