"""The small modules that rewritten graphs call: weight and activation quantizers and the sparsifier.

A module here holds what one site needs (spec, groups, learned step) and can be switched off. The mathematics is in
`qgraph.ops`; where the calls are inserted is decided by the passes.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.errors import CaptureError
from qgraph.ops import Groups, Quantized, fake_quantize, initial_step, quantize, sparsify, sparsity_mask
from qgraph.ops.bits import Compact
from qgraph.ops.memo import Memo
from qgraph.ops.memory import LARGE, give_back
from qgraph.ops.sharded import whole
from qgraph.ops.sparsity import apply_mask
from qgraph.ops.sr_ste import SparseRefined
from qgraph.ops.static import FixedScale
from qgraph.ops.vmapped import each_member, is_batched
from qgraph.ranges import RunningRange


@torch.library.custom_op("qgraph::weight", mutates_args=())
def _weight_op(weight: Tensor, site: str) -> Tensor:
    """Stand in for one quantized weight in an exported graph; the exporter replaces it by packed codes."""
    return weight.clone()


@torch.library.custom_op("qgraph::activation", mutates_args=())
def _activation_op(x: Tensor, site: str) -> Tensor:
    """Stand in for one quantized activation in an exported graph; the exporter replaces it by ONNX nodes."""
    return x.clone()


@_activation_op.register_vmap
def _batched_activation(info: Any, dims: tuple[int | None, ...], x: Tensor, site: str) -> tuple[Tensor, int | None]:
    return torch.ops.qgraph.activation(x, site), dims[0]


@_weight_op.register_fake
@_activation_op.register_fake
def _same_as_input(x: Tensor, site: str) -> Tensor:
    return torch.empty_like(x)


@dataclass(frozen=True, slots=True)
class ActivationForm:
    """What an activation quantizer computes: its spec, its groups, for a learned step the step, for a static range its
    scale.
    """

    spec: QuantSpec
    groups: Groups
    step: Tensor | None = None
    fixed: FixedScale | None = None


@dataclass(slots=True)
class Collected:
    """What every quantizer of a model saw and would deploy during one run, by site, in order of first use.

    Weights wait in a few bits a code: of a large model all of them are here before the first is written.
    """

    weights: dict[str, Compact] = field(default_factory=dict)
    activations: dict[str, ActivationForm] = field(default_factory=dict)
    sparsity: dict[str, SparsitySpec] = field(default_factory=dict)
    calls: dict[str, list[str]] = field(default_factory=dict)  # by site the name of what each of its calls deploys
    released: set[str] = field(default_factory=set)  # weights whose codes are gone

    def release(self, site: str) -> None:
        """Let go of the codes of a weight, which someone else has now."""
        self.weights[site] = Compact(self.weights[site].rest, None, ())
        self.released.add(site)

    def add_weight(self, site: str, quantized: Quantized) -> None:
        """Keep what a site deploys; where a later call has another weight (`functional_call`), by a name of its own."""
        weight, names = Compact.of(quantized), self.calls.setdefault(site, [])
        met = list(dict.fromkeys(names))
        name = next((name for name in met if self.weights[name].equals(weight)), None)
        if name is None:
            name = f"{site}/{len(met) + 1}" if met else site
            self.weights[name] = weight
            if site in self.sparsity:
                self.sparsity[name] = self.sparsity[site]
        names.append(name)


class _Run:
    """How quantizers behave now: plainly (the default), collecting, or emitting stand-in operators for export.

    A plain object with attributes, not a context variable, since torch.compile and torch.export read it.
    """

    def __init__(self) -> None:
        self.thread: int | None = None  # whose quantizers behave so; None where all behave plainly
        self.collected: Collected | None = None
        self.exporting = False
        self.python = False
        self.emitted: set[str] = set()
        self.calls: Mapping[str, Sequence[str]] = {}  # as in `Collected`
        self.called: Counter[str] = Counter()
        self.observe: Callable[[ActivationQuantizer, Tensor], None] | None = None


_run, _plain = _Run(), _Run()
_one_thread = threading.RLock()


def run_state() -> _Run:
    """How quantizers behave now in this thread."""
    return _run if _run.thread is not None and _run.thread == threading.get_ident() else _plain


@contextlib.contextmanager
def _behaving(**changes: Any) -> Iterator[None]:
    """Let the quantizers of this thread behave otherwise for a while; another thread that wants to, waits."""
    with _one_thread:
        changes["thread"] = threading.get_ident()
        previous = {name: getattr(_run, name) for name in changes}
        try:
            vars(_run).update(changes)
            yield
        finally:
            vars(_run).update(previous)


@contextlib.contextmanager
def collecting(python: bool = False) -> Iterator[Collected]:
    """Record what each quantizer would deploy while the model runs (in eval, without gradients); `python` as in
    `exporting`.
    """
    collected = Collected()
    with _behaving(collected=collected, python=python):
        yield collected


@contextlib.contextmanager
def observing(observe: Callable[[ActivationQuantizer, Tensor], None]) -> Iterator[None]:
    """Let every quantizer of a static range show what it is given, and pass it on as it is."""
    with _behaving(observe=observe):
        yield


@contextlib.contextmanager
def exporting(python: bool = False, calls: Mapping[str, Sequence[str]] | None = None) -> Iterator[set[str]]:
    """Make each quantizer emit one stand-in operator, `qgraph::weight` or `qgraph::activation`.

    Parameters
    ----------
    python : bool
        Run every module's own Python, with the same quantizers, where else its captured graph runs.
    calls : mapping, optional
        What each call of a site is named, as a run of the model has collected it.

    Yields
    ------
    set of str
        The sites that have emitted theirs.
    """
    emitted: set[str] = set()
    with _behaving(exporting=True, python=python, emitted=emitted, calls=calls or {}, called=Counter()):
        yield emitted


def _emit_weight(run: _Run, weight: Tensor, site: str) -> Tensor:
    if is_batched(weight):
        return each_member(lambda member: _emit_weight(run, member, site), weight)
    names = run.calls.get(site, (site,))
    name = names[min(run.called[site], len(names) - 1)]
    run.called[site] += 1
    run.emitted.add(name)
    return torch.ops.qgraph.weight(weight, name)


def exports_python() -> bool:
    """Whether an export traces the modules' own Python now (`exporting`)."""
    return run_state().python


_enabled = operator.attrgetter("enabled")


class Quantizer(nn.Module):
    """What the quantizers share: a site name, a switch and, for methods that learn it, a step.

    Parameters
    ----------
    spec : QuantSpec
    groups : Groups
        Which values share one scale.
    site : str
        Module path and operand, such as ``encoder.fc1.weight``; unique in a model.
    """

    def __init__(self, spec: QuantSpec, groups: Groups, site: str) -> None:
        super().__init__()
        self.planned = spec  # as the config says; a schedule may let `spec` be another for a while
        self.spec = spec
        self.groups = groups
        self.site = site
        self.enabled = True
        self.step: nn.Parameter | None = None

    def initialize_step(self, example: Tensor) -> None:
        """Create or fill the learned step from an example of what is quantized (LSQ's rule); float32."""
        start = initial_step(example.detach(), self.spec, self.groups)
        if self.step is None:
            self.step = nn.Parameter(start)
        else:
            self.step.data.copy_(start)

    @property
    def is_leaf(self) -> bool:
        """What parallelize_module asks of whatever is called "weight" inside a layer: too late for a prepared one.

        Nobody else finds it: torch.jit and debuggers ask for all that there is.
        """
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch.distributed"):
            raise AttributeError(f"{type(self).__name__} has no is_leaf")
        raise CaptureError(
            f"site '{self.site}': a prepared layer cannot be made tensor-parallel. Call "
            f"parallelize_module on the float model, then qgraph.prepare with inplace=True."
        )

    def extra_repr(self) -> str:
        state = "" if self.enabled else ", disabled"
        return f"{self.site!r}, {self.spec}, {self.groups}{state}"


class WeightQuantizer(Quantizer):
    """Quantize and dequantize one weight operand; `dense` is the unpruned weight where the operand is sparse.

    Shape: any floating tensor in, the same shape and dtype out. Source: arXiv 2409.09245, section 3.
    """

    scale_dtype = torch.float32  # an export sets another in its copy of a model: scales are rounded to it
    sparsity: SparsitySpec | None = None  # what the config prunes its operand by

    def __init__(self, spec: QuantSpec, groups: Groups, site: str) -> None:
        super().__init__(spec, groups, site)
        self.memo = Memo()

    def forward(self, weight: Tensor, dense: Tensor | None = None) -> Tensor:
        if not self.enabled:
            return weight
        if dense is weight:  # the sparsifier is off
            dense = None
        run = run_state()
        if run.exporting:
            return _emit_weight(run, weight if dense is None else dense, self.site)
        if run.collected is not None or self.scale_dtype != torch.float32:
            deployed = each_member(functools.partial(self._deployed, run), weight, dense)
            if self.scale_dtype != torch.float32:
                return deployed
        if self.step is None and not torch.compiler.is_compiling():
            known = self.memo.quantized(weight, dense, self.spec, self.groups)
            if known is not None:
                return known
        return fake_quantize(weight, self.spec, self.groups, dense=dense, step=self.step)

    def _deployed(self, run: _Run, weight: Tensor, dense: Tensor | None) -> Tensor:
        """The weight, by the file's scales where those are rounded; a run that collects keeps what the file holds."""
        pruned = None if dense is None else dense.detach()
        deployed = quantize(weight.detach(), self.spec, self.groups, dense=pruned, step=self.step)
        deployed = deployed.with_scales_of(self.scale_dtype)
        if run.collected is not None:
            run.collected.add_weight(self.site, deployed)
            if weight.numel() >= LARGE:
                give_back()
        return weight if self.scale_dtype == torch.float32 else deployed.dequantize().to(weight.dtype)


class ActivationQuantizer(Quantizer):
    """Quantize and dequantize one activation, its ranges computed from the values at hand (dynamic) or fixed (static).

    Shape: any floating tensor in, the same shape and dtype out. Source: arXiv 2409.09245, section 3.
    """

    range: RunningRange | None

    def __init__(self, spec: QuantSpec, groups: Groups, site: str) -> None:
        super().__init__(spec, groups, site)
        if spec.learns:
            # One step a tensor, since a step learned per token has no meaning; 0 says "not yet initialized".
            self.step = nn.Parameter(torch.zeros(1, 1, dtype=torch.float32))
        self.range = RunningRange(spec) if spec.range == "static" else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or not x.is_floating_point():
            return x
        run = run_state()
        if run.exporting:
            run.emitted.add(self.site)
            return torch.ops.qgraph.activation(x, self.site)
        if self.range is not None:
            return self._static(x, self.range)
        if self.step is not None:
            self._begin(x, self.step)
        if run.collected is not None:
            run.collected.activations[self.site] = ActivationForm(self.spec, self.groups, self.step)
        return fake_quantize(x, self.spec, self.groups, step=self.step)

    def _begin(self, x: Tensor, step: nn.Parameter) -> None:
        """Let a step that is not yet initialized be that of `x`; compiled code cannot branch on it, and selects."""
        if torch.compiler.is_compiling():
            with torch.no_grad():
                step.copy_(torch.where(step == 0, initial_step(x.detach(), self.spec, self.groups), step))
        elif not bool(step.any()):
            self.initialize_step(x)

    def _static(self, x: Tensor, range: RunningRange) -> Tensor:
        run = run_state()
        if run.observe is not None:
            run.observe(self, x)
            return x
        if run.collected is not None:
            range.require(self.site)
            run.collected.activations[self.site] = ActivationForm(self.spec, self.groups, fixed=range.fixed())
        return range.quantize(x, self.site)


class Sparsifier(nn.Module):
    """Prune one weight operand; the gradient passes to every weight, so a pruned one can come back.

    `alone` says that no quantizer follows, so that this module stands for the operand in an export. A schedule may set
    `sparsity` to None for a while, which prunes nothing, and `frozen`: the mask of the next call then stays.
    Source: arXiv 2409.09245, forward step 0.
    """

    mask: Tensor | None

    def __init__(self, sparsity: SparsitySpec | None, groups: Groups, site: str, alone: bool = False) -> None:
        super().__init__()
        self.planned = sparsity
        self.sparsity = sparsity
        self.groups = groups
        self.site = site
        self.alone = alone
        self.enabled = True
        self.frozen = False
        self.memo = Memo()
        self.register_buffer("mask", None, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled or self.sparsity is None:
            return weight
        run = run_state()
        if run.exporting:
            if not self.alone:
                return weight
            return _emit_weight(run, weight, self.site)
        pruned = self._pruned(weight, self.sparsity)
        if self.sparsity.decay and torch.is_grad_enabled():
            pruned = SparseRefined.apply(pruned, weight, self.sparsity.decay)
        if run.collected is not None:
            run.collected.sparsity[self.site] = self.sparsity
            if self.alone:
                run.collected.add_weight(self.site, quantize(pruned.detach(), None, self.groups, dense=weight))
        return pruned

    def _pruned(self, weight: Tensor, sparsity: SparsitySpec) -> Tensor:
        if self.frozen and self.mask is None:
            self.mask = sparsity_mask(whole(weight.detach()), sparsity, self.groups)
        mask = self.mask if self.frozen else None
        known = None if torch.compiler.is_compiling() else self.memo.pruned(weight, sparsity, self.groups, mask)
        if known is not None:
            return known
        return sparsify(weight, sparsity, self.groups) if mask is None else apply_mask(weight, mask)

    def extra_repr(self) -> str:
        state = ("" if self.enabled else ", disabled") + (", frozen" if self.frozen else "")
        return f"{self.site!r}, {self.sparsity}{state}"


class Quantizers(nn.Module):
    """The quantizers of one module, its child `qgraph`; named after their operands, with dots written as `__`.

    Not an nn.ModuleDict, whose method names a parameter may bear (``values``, ``items``).
    """

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> nn.Module:
        found = self._modules[name]
        assert found is not None
        return found

    def off(self) -> bool:
        """Whether none of them does anything now."""
        return not any(map(_enabled, self._modules.values()))

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self.add_module(name, module)
