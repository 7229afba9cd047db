"""What is compared: bit widths (settings) and, at each, the ways to train them (methods) as qgraph configs.

A method quantizes weights and activations alike, unless the setting says what all methods do with the activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qgraph.config import QConfig, QuantSpec, Rule, SparsitySpec

FULL_PRECISION = "float"


@dataclass(frozen=True, slots=True)
class Method:
    """One way to quantize: fields of QuantSpec. `scheme` None is the width's own, linear where weights are pruned."""

    method: str
    scale: str = "minmax"
    scheme: str | None = None
    decay: float = 0.0
    activation_scale: str | None = None  # that of the weights unless said
    note: str = ""


METHODS = {
    "ddt": Method("ddt", note="DDT, min/max scale: the paper's transform"),
    "ddt-absmean": Method("ddt", "absmean", note="DDT, mean-magnitude scale about the mean"),
    "ddt-windowed": Method("ddt", "windowed", note="the same, with a gradient window"),
    "ddt-linear": Method("ddt", "minmax", "linear", note="linear DDT, scale by the largest magnitude"),
    "ddt-windowed-weights": Method(
        "ddt", "windowed", activation_scale="minmax", note="weights by ddt-windowed, activations by ddt"
    ),
    "ste": Method("ste", note="straight-through, min/max scale"),
    "ste-windowed": Method("ste", "windowed", note="straight-through, mean-magnitude scale learned through, window"),
    "xnor": Method("ste", "absmean", "linear", note="XNOR-Net: sign, mean-magnitude scale learned through"),
    "bitnet": Method("ste", "minmax", "linear", note="BitNet (b1.58): mean-magnitude scale, gradient 1"),
    "sr-ste": Method("ste", decay=2e-4, note="straight-through, min/max scale, SR-STE's decay of pruned weights"),
    "lsq": Method("lsq", note="LSQ: learned step"),
    "seq": Method("seq", note="ParetoQ: elastic binarization at 1 bit, SEQ at 1.58 and 2"),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A bit width of weights and activations, and the methods that are compared at it."""

    weight: float
    activation: float | None
    methods: tuple[str, ...]
    sparsity: str | None = None
    fixed_activation: QuantSpec | None = None
    block: int | None = None  # weights in a block along the contracted dimension; None: one scale a channel


# The activations of BitNet b1.58: 8 bits, symmetric, one scale a token.
EIGHT_BITS = QuantSpec(8, "linear", "token", method="ste")
ONE_BIT = ("ddt", "ddt-linear", "ddt-windowed", "ste", "ste-windowed", "xnor", "bitnet", "seq")
SETTINGS = {
    "A1W1": Setting(1, 1, (*ONE_BIT, "ddt-windowed-weights", "ddt-absmean")),
    "W1": Setting(1, None, ONE_BIT),
    "A4W1": Setting(1, 4, ("ddt", "ddt-windowed", "ste", "ste-windowed", "seq")),
    "W2": Setting(2, None, ("ddt", "ddt-windowed", "ste", "ste-windowed", "lsq", "seq")),
    "W4": Setting(4, None, ("ddt", "ste", "lsq")),
    "A8W4": Setting(4, None, ("ddt", "ste", "lsq"), fixed_activation=EIGHT_BITS),
    "A1W1-2:4": Setting(1, 1, ("ddt", "ddt-windowed", "ste", "sr-ste", "ste-windowed"), sparsity="2:4"),
    "W1-1:4": Setting(1, None, ("ddt", "ddt-windowed", "ste", "sr-ste"), sparsity="1:4"),
    "A2W2": Setting(2, 2, ("ddt", "ddt-windowed", "ddt-windowed-weights", "ste", "ste-windowed", "lsq", "seq")),
    "A4W1-2:4": Setting(1, 4, ("ddt", "ddt-windowed", "ste", "sr-ste", "ste-windowed"), sparsity="2:4"),
    "A8W1.58": Setting(
        1.58, None, ("ddt", "ddt-windowed", "bitnet", "ste-windowed", "seq"), fixed_activation=EIGHT_BITS
    ),
    "W1-1:8": Setting(1, None, ("ddt", "ddt-windowed", "ste", "sr-ste"), sparsity="1:8"),
    "A4W2": Setting(2, 4, ("ddt", "ddt-windowed", "ste", "ste-windowed", "seq")),
    "W1@32": Setting(1, None, ("ddt", "ddt-windowed", "ste-windowed", "bitnet"), block=32),
    "W1@128": Setting(1, None, ("ddt", "ddt-windowed", "ste-windowed", "bitnet"), block=128),
}


def config(setting: str, method: str, keep: tuple[str, ...]) -> QConfig | None:
    """The qgraph config of one run; None is full precision. `keep`: modules that stay float, as globs."""
    if method == FULL_PRECISION:
        return None
    how, what = METHODS[method], SETTINGS[setting]
    sparsity = None if what.sparsity is None else replace(SparsitySpec.parse(what.sparsity), decay=how.decay)
    scheme = "linear" if sparsity is not None else how.scheme
    groups = "channel" if what.block is None else "block"
    weight = QuantSpec(what.weight, scheme, groups, group_size=what.block, method=how.method, scale=how.scale)
    activation = what.fixed_activation
    if what.activation is not None:
        # Above 2 bits the mean-magnitude scales are not what is studied.
        scale = how.activation_scale or how.scale if what.activation <= 2 else "minmax"
        kind = how.method if what.activation <= 2 or how.method == "ddt" else "ste"
        activation = QuantSpec(what.activation, how.scheme, "token", method=kind, scale=scale)
    rules = tuple(Rule(match, None) for match in keep)
    return QConfig(weight, activation, sparsity).with_rules(*rules)
