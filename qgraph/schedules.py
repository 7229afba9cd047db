"""What changes while a model trains: when quantization starts, how many bits, how much is pruned, when masks are fixed.

A schedule is a plain object, stepped as a learning-rate scheduler is, once a step of the optimizer. It says what holds
at a step as a function of that step alone, and sets the quantizers and sparsifiers where that changes, those that are
made by a later call too. An export, an inspection or a copy shows the model as it then is. Compiled code is compiled
anew when it meets a change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar, cast

from torch import Tensor, nn

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.errors import CaptureError, CheckpointError, ConfigError
from qgraph.graph import STATE, is_prepared, matches_site, quantizer_modules, unwrapped
from qgraph.modules import ActivationQuantizer, Quantizer, Sparsifier, WeightQuantizer

__all__ = ["FreezeMasks", "ProgressiveBits", "QuantizationStart", "Schedule", "SparsityRamp"]

Value = TypeVar("Value")


class Schedule(ABC, Generic[Value]):
    """One setting of a prepared model as a function of the training step.

    Parameters
    ----------
    prepared : nn.Module
        A prepared model, also inside torch.compile's or DistributedDataParallel's wrapper. Prepare it before, and shard
        it or not as you like.
    match : str, optional
        A glob of the sites, or of modules that hold them, as `qgraph.disabled` takes it. None is all of them.

    Raises
    ------
    CaptureError
        For a model that is not prepared.
    ConfigError
        For a glob that matches no site of the kind, or values that no such site can take.
    """

    kinds: tuple[type, ...] = (Quantizer, Sparsifier)

    def __init__(self, prepared: nn.Module, match: str | None = None) -> None:
        self._model = unwrapped(prepared)
        if not is_prepared(self._model):
            raise CaptureError(f"{type(self._model).__name__} is not prepared: call qgraph.prepare on it first.")
        self.match = match
        self.last_step = 0
        if not self._sites():
            kinds, where = " or ".join(kind.__name__ for kind in self.kinds), "" if match is None else f" at {match!r}"
            raise ConfigError(
                f"{type(self).__name__}: the model has no {kinds}{where}; qgraph.inspect(model).layers lists sites, "
                f"those of a model's own forward appear with example_inputs in qgraph.prepare, or at the first call."
            )
        settings = self._model.__dict__[STATE].shared.settings
        self._name = f"{type(self).__name__} {len(settings)}"
        self._set: Value | None = None
        self._applied = False
        self._update()

    @abstractmethod
    def value_at(self, step: int) -> Value:
        """What holds at a step, counted from 0."""

    @staticmethod
    @abstractmethod
    def apply(module: Any, value: Any) -> None:
        """Set one quantizer or sparsifier. It does not see the schedule: a copy of the model carries it on."""

    def step(self) -> None:
        """Go to the next step: call it where a learning-rate scheduler is stepped."""
        self.last_step += 1
        self._update()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the step of a state, and set the model as it was then.

        Raises
        ------
        CheckpointError
            For a state that is not one of this kind of schedule.
        """
        step = state.get("last_step") if isinstance(state, Mapping) else None
        if not isinstance(step, int) or step < 0 or set(state) != set(self.state_dict()):
            raise CheckpointError(
                f"{type(self).__name__}.load_state_dict: expected the keys {sorted(self.state_dict())} with a step "
                f"of at least 0, found {state!r}; pass what state_dict returned."
            )
        self.last_step, self._applied = step, False
        self._update()

    def _update(self) -> None:
        value = self.value_at(self.last_step)
        if self._applied and value == self._set:
            return
        setting = _Setting(type(self).apply, self.kinds, self.match, value)
        for module in quantizer_modules(self._model):
            setting.apply(module)
        self._model.__dict__[STATE].shared.settings[self._name] = setting
        self._set, self._applied = value, True

    def _sites(self) -> list[Any]:
        """The quantizers and sparsifiers that it sets, those that exist by now."""
        return [module for module in quantizer_modules(self._model) if _concerns(module, self.kinds, self.match)]


class QuantizationStart(Schedule[bool]):
    """The model is float before step `at`, and quantized and pruned from there on.

    Parameters
    ----------
    prepared, match : see `Schedule`
    at : int
        The first step that is quantized; 0 is the start.
    """

    def __init__(self, prepared: nn.Module, at: int, match: str | None = None) -> None:
        self.at = _checked_step("QuantizationStart: at", at)
        super().__init__(prepared, match)

    def value_at(self, step: int) -> bool:
        return step >= self.at

    @staticmethod
    def apply(module: Any, value: bool) -> None:
        module.enabled = value


class ProgressiveBits(Schedule[float | None]):
    """Bits that change at given steps, such as 8, then 4, then 1.

    Scheme, granularity and method stay those of the config, a scale that it leaves out is the default at the new bits;
    1.58 bits are linear. At 1 bit compare the recipe with one that starts there: what is best depends on the model.

    Parameters
    ----------
    prepared, match : see `Schedule`
    bits : mapping of int to int or float
        The bits from each step on, such as ``{0: 8, 1000: 4, 3000: 1}``. Before the first of them those of the config.
    operand : "weight" or "activation"

    Raises
    ------
    ConfigError
        Also for sites whose step is learned or whose range is static: these belong to their bits.
    """

    def __init__(
        self,
        prepared: nn.Module,
        bits: Mapping[int, float],
        operand: Literal["weight", "activation"] = "weight",
        match: str | None = None,
    ) -> None:
        if operand not in ("weight", "activation"):
            raise ConfigError(f"ProgressiveBits: operand is 'weight' or 'activation', found {operand!r}.")
        if not isinstance(bits, Mapping) or not bits:
            raise ConfigError(f"ProgressiveBits: expected bits by step, such as {{0: 8, 1000: 4}}, found {bits!r}.")
        for step, number in bits.items():
            _checked_step("ProgressiveBits: a step of bits", step)
            QuantSpec(number)  # or its error
        self.bits = dict(sorted(bits.items()))
        self.kinds = (WeightQuantizer,) if operand == "weight" else (ActivationQuantizer,)
        super().__init__(prepared, match)
        for module in self._sites():
            for number in self.bits.values():
                spec_with_bits(module, number)

    def value_at(self, step: int) -> float | None:
        reached = [number for start, number in self.bits.items() if start <= step]
        return reached[-1] if reached else None

    @staticmethod
    def apply(module: Any, value: float | None) -> None:
        module.spec = module.planned if value is None else spec_with_bits(module, value)


class SparsityRamp(Schedule[float]):
    """Pruning that grows from none to what the config says, by the cubic of Zhu and Gupta.

    The share of the ramp done is ``1 - (1 - t)**3``, with t from 0 at step `start` to 1 at step `end`, in `changes`
    equal stages: nothing is pruned before `start`. A ratio is that share of the config's; N:M starts from M of every M.

    Parameters
    ----------
    prepared, match : see `Schedule`
    start, end : int
    changes : int
        How often the ratio changes. torch.compile compiles anew at each change, by default at most 8 times in all.

    Notes
    -----
    Source: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, eq. 1.
    """

    kinds = (Sparsifier,)

    def __init__(self, prepared: nn.Module, start: int, end: int, changes: int = 6, match: str | None = None) -> None:
        self.start, self.end = _checked_step("SparsityRamp: start", start), _checked_step("SparsityRamp: end", end)
        self.changes = _checked_step("SparsityRamp: changes", changes)
        if end <= start or not changes:
            raise ConfigError(
                f"SparsityRamp: the ramp ends after it starts and has at least one change, found start={start}, "
                f"end={end}, changes={changes}."
            )
        super().__init__(prepared, match)

    def value_at(self, step: int) -> float:
        passed = min(max(step - self.start, 0), self.end - self.start)
        stage = passed * self.changes // (self.end - self.start)
        return 1 - (1 - stage / self.changes) ** 3

    @staticmethod
    def apply(module: Any, value: float) -> None:
        module.sparsity = ramped(module.planned, value)


class FreezeMasks(Schedule[bool]):
    """From step `at` on each pruned weight keeps the mask that it has at its first call then.

    Before, masks follow the weights: a pruned one that grows comes back. `state_dict` carries the masks.

    Parameters
    ----------
    prepared, match : see `Schedule`
    at : int
    """

    kinds = (Sparsifier,)

    def __init__(self, prepared: nn.Module, at: int, match: str | None = None) -> None:
        self.at = _checked_step("FreezeMasks: at", at)
        super().__init__(prepared, match)

    def value_at(self, step: int) -> bool:
        return step >= self.at

    @staticmethod
    def apply(module: Any, value: bool) -> None:
        module.frozen = value
        if not value:
            module.mask = None

    def state_dict(self) -> dict[str, Any]:
        masks = {module.site: module.mask for module in self._sites() if module.mask is not None}
        return {"last_step": self.last_step, "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        masks: dict[str, Tensor] = dict(state["masks"])
        for module in self._sites():
            module.mask = masks.pop(module.site, None) if module.frozen else None
        if masks and self.value_at(self.last_step):
            raise CheckpointError(
                f"FreezeMasks.load_state_dict: masks of {sorted(masks)}, which are no pruned sites of this model; load "
                f"the state of a model that was prepared with the same config."
            )


def spec_with_bits(quantizer: Quantizer, bits: float) -> QuantSpec:
    """The spec of a quantizer's config at other bits; ConfigError where the site cannot take them."""
    planned = quantizer.planned
    if planned.learns or planned.range == "static":
        raise ConfigError(
            f"ProgressiveBits: site '{quantizer.site}' has {planned}, whose learned step or static range belongs to "
            f"its bits; leave the site out by match=, or give it another method."
        )
    try:
        return planned.with_bits(bits)
    except ConfigError as error:
        raise ConfigError(f"ProgressiveBits: site '{quantizer.site}' cannot have {bits} bits: {error}") from error


def ramped(planned: SparsitySpec | None, share: float) -> SparsitySpec | None:
    """A share of the pruning of a spec; None where that prunes nothing."""
    if planned is None:
        return None
    if planned.kind == "n:m":
        n, m = planned.n or 1, planned.m or 1
        kept = m - round(share * (m - n))
        return None if kept == m else replace(planned, n=kept)
    ratio = share * (planned.ratio or 0.0)
    return None if ratio == 0 else replace(planned, ratio=ratio)


@dataclass(frozen=True, slots=True)
class _Setting:
    """A value for the quantizers of some kinds and sites."""

    change: Callable[[Any, Any], None]
    kinds: tuple[type, ...]
    match: str | None
    value: Any

    def apply(self, module: Any) -> None:
        if _concerns(module, self.kinds, self.match):
            self.change(module, self.value)


def _concerns(module: Any, kinds: tuple[type, ...], match: str | None) -> bool:
    return isinstance(module, kinds) and (match is None or matches_site(cast(Any, module).site, match))


def _checked_step(what: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{what} is a whole number of at least 0, found {value!r}.")
    return value
