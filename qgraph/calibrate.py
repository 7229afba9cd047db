"""`calibrate`: static activation ranges from batches, without training.

What a quantizer is given is kept as a histogram that grows with the values, so that batches may be a generator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qgraph.config import QuantSpec
from qgraph.errors import CalibrationError
from qgraph.graph import is_prepared, is_quantizer, keeping_modes, quantizer_modules, states, unwrapped
from qgraph.modules import ActivationQuantizer, observing
from qgraph.ops.sharded import whole
from qgraph.ops.static import static_codes, static_gain, static_scale
from qgraph.terminal import progress_bar

__all__ = ["calibrate"]

Method = Literal["minmax", "percentile", "mse", "average"]
BINS = 8192  # of a histogram: at least 16 a code at 8 bits, also where it has just grown
SHRINKS = 100  # ranges that method="mse" tries
NAMED = 5  # sites that a message lists


def calibrate(
    prepared: nn.Module,
    batches: Iterable[Any],
    *,
    method: Method = "minmax",
    percentile: float = 99.99,
    progress: bool = False,
) -> dict[str, tuple[float, float]]:
    """Fill the static activation ranges of a prepared model.

    The model runs on the batches in eval mode and without gradients. Quantizers of static ranges pass their input on as
    it is while they look; everything else does what it does in eval. Ranges are written when all batches are through:
    after an error they are as they were. Training goes on from them with running averages.

    Parameters
    ----------
    prepared : nn.Module
        What `qgraph.prepare` returned; in DistributedDataParallel each process calibrates with the batches it is given.
    batches : iterable
        Each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
    method : {"minmax", "percentile", "mse", "average"}
        "minmax": the least and the largest value of all batches. "average": the averages over batches of each batch's
        least and largest, as training keeps them. "percentile": the values that `percentile` percent lie below, and as
        many above. "mse": of the ranges that are shorter by one share at both ends, the one of least squared error.
    percentile : float
        Above 50, at most 100; of method "percentile".
    progress : bool
        Show a bar on standard error, where that is a terminal.

    Returns
    -------
    dict
        Site -> (least, largest) value of its range.

    Raises
    ------
    CalibrationError
        For a model without static ranges, no batches, a batch that the model rejects, NaN or Inf in an activation, or a
        quantizer that no batch reached; it names the site.

    Examples
    --------
    >>> qgraph.calibrate(prepared, (x for x, _ in loader), method="percentile")  # doctest: +SKIP
    """
    model = unwrapped(prepared)
    _check_arguments(model, batches, method, percentile)
    observers: dict[str, Observer] = {}

    def observe(quantizer: ActivationQuantizer, x: Tensor) -> None:
        observers.setdefault(quantizer.site, Observer(quantizer)).add(x)

    count = 0
    with (
        keeping_modes(model),
        torch.no_grad(),
        observing(observe),
        progress_bar(progress, None, "calibrate") as advance,
    ):
        model.eval()
        for count, batch in enumerate(batches, start=1):
            _run(model, batch, count)
            advance()
    if not count:
        raise CalibrationError("calibrate: the batches are empty; expected at least one. Is the generator used up?")
    _check_reached(model, set(observers))
    return {site: observer.finish(method, percentile, count) for site, observer in observers.items()}


class Observer:
    """What one quantizer was given: extremes, their sums over calls, and a histogram over -radius to radius."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer
        self.calls = 0
        self.low, self.high = float("inf"), float("-inf")
        self.low_sum = self.high_sum = 0.0
        self.radius = 1e-30  # of the values seen: it doubles as needed
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take the values of one call."""
        if x.numel() == 0:
            return
        values = whole(x.detach()).float().flatten()
        low, high = map(float, torch.aminmax(values))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise CalibrationError(
                f"calibrate: site '{self.quantizer.site}': its activation holds NaN or Inf; expected finite values. "
                f"Check the batch and the weights."
            )
        self.calls += 1
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.low_sum, self.high_sum = self.low_sum + low, self.high_sum + high
        while self.radius < max(-low, high):
            self._double()
        self.counts += torch.histc(values, BINS, -self.radius, self.radius).double().cpu()

    def _double(self) -> None:
        self.radius *= 2
        inner = self.counts.view(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[BINS // 4 : BINS // 4 * 3] = inner

    def finish(self, method: Method, percentile: float, batches: int) -> tuple[float, float]:
        """Choose the range and give it to the quantizer."""
        found = {
            "minmax": lambda: (self.low, self.high),
            "average": lambda: (self.low_sum / self.calls, self.high_sum / self.calls),
            "percentile": lambda: self._percentile(percentile),
            "mse": self._least_error,
        }[method]()
        spec, range = self.quantizer.spec, self.quantizer.range
        assert range is not None
        gain = self._gain(*found, spec) if spec.method == "ddt" else 1.0
        range.set(*found, gain, batches)
        return found

    def _percentile(self, percent: float) -> tuple[float, float]:
        total = self.counts.sum()
        below = self.counts.cumsum(0)
        share = total * (percent / 100)
        width = 2 * self.radius / BINS
        low = int(torch.searchsorted(below, total - share, right=True))
        high = int(torch.searchsorted(below, share))
        edges = -self.radius + min(low, BINS - 1) * width, -self.radius + (min(high, BINS - 1) + 1) * width
        return max(self.low, edges[0]), min(self.high, edges[1])

    def _least_error(self) -> tuple[float, float]:
        spec = self.quantizer.spec
        kept = torch.arange(1, SHRINKS + 1, dtype=torch.float64) / SHRINKS
        lows, highs = self.low * kept, self.high * kept
        errors = [float(self._error(low, high, spec)) for low, high in zip(lows, highs, strict=True)]
        best = min(range(SHRINKS), key=errors.__getitem__)
        return float(lows[best]), float(highs[best])

    def _error(self, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
        centres, counts = self._filled()
        step, zero = static_scale(low, high, spec)
        return (counts * (static_codes(centres, step, zero, spec) * step - centres) ** 2).sum()

    def _gain(self, low: float, high: float, spec: QuantSpec) -> float:
        centres, counts = self._filled()
        ends = [torch.tensor(end, dtype=torch.float64) for end in (low, high)]
        step, zero = static_scale(ends[0], ends[1], spec)
        weights = (counts / counts.mean()).sqrt()  # the mean of w x w q is that of x q over all values
        q = static_codes(centres, step, zero, spec)
        return float(static_gain(centres * weights, q * weights, step, spec.lam))

    def _filled(self) -> tuple[Tensor, Tensor]:
        """Centres and counts of the bins that hold something."""
        filled = self.counts > 0
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * self.radius / BINS) - self.radius
        return centres[filled], self.counts[filled]


def _check_arguments(model: Any, batches: Any, method: str, percentile: float) -> None:
    if not isinstance(model, nn.Module) or not is_prepared(model):
        raise CalibrationError(
            f"calibrate: found a {type(model).__name__} that is not prepared; expected what qgraph.prepare returned."
        )
    if method not in get_args(Method):
        raise CalibrationError(f"calibrate: method is one of {', '.join(get_args(Method))}, found {method!r}.")
    if not 50 < percentile <= 100:
        raise CalibrationError(f"calibrate: percentile lies above 50 and is at most 100, found {percentile!r}.")
    if isinstance(batches, (Tensor, str, Mapping)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"calibrate: batches is an iterable of batches, found a {type(batches).__name__}; put one batch in a list."
        )
    if not any(module.range is not None for module in _quantizers(model)) and _all_captured(model):
        raise CalibrationError(
            "calibrate: no activation of this model has a static range; expected a config such as 'A8sW7', or "
            "QuantSpec(8, granularity='tensor', method='ste', range='static') for its activations."
        )


def _all_captured(model: nn.Module) -> bool:
    """Whether no quantizer can appear at a first call: then the config asks for none."""
    (_, _, state) = next(states(model))
    configs = (state.shared.config, *state.shared.configs.values())
    return all(c is None or c.activation is None or c.activation.range != "static" for c in configs)


def _quantizers(model: nn.Module) -> Iterator[ActivationQuantizer]:
    return (module for module in quantizer_modules(model) if isinstance(module, ActivationQuantizer))


def call_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments and keywords that a batch stands for; None for what is no call."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    return ((), dict(batch)) if isinstance(batch, Mapping) else None


def _run(model: nn.Module, batch: Any, number: int) -> None:
    call = call_of(batch)
    if call is None:
        raise CalibrationError(
            f"calibrate: batch {number} is a {type(batch).__name__}; expected a tensor, a tuple of positional "
            f"arguments or a mapping of keyword arguments."
        )
    args, kwargs = call
    try:
        model(*args, **kwargs)
    except CalibrationError as error:
        raise CalibrationError(f"{error} (batch {number})") from error
    except Exception as error:
        raise CalibrationError(
            f"calibrate: {type(model).__name__} rejects batch {number}, {type(batch).__name__} of "
            f"{len(args) + len(kwargs)}: {type(error).__name__}: {error}. Pass the model's inputs alone, without "
            f"labels."
        ) from error


def _check_reached(model: nn.Module, reached: set[str]) -> None:
    """Every static quantizer that stands in a graph of an eval forward was given something."""
    missing = []
    for _, module, state in states(model):
        for variant in state.variants:
            targets = [str(n.target) for n in variant.graph.nodes if not variant.training and is_quantizer(n)]
            found = [module.get_submodule(target) for target in targets]
            missing += [
                m.site
                for m in found
                if isinstance(m, ActivationQuantizer) and m.range is not None and m.enabled and m.site not in reached
            ]
    if missing := list(dict.fromkeys(missing)):
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise CalibrationError(
            f"calibrate: no batch reached {', '.join(missing[:NAMED])}{more}; expected every quantizer of a static "
            f"range to see values. Pass batches that take that path, or leave the layer float with a rule."
        )
