"""QuantSpec and SparsitySpec: how one operand is quantized, and which weights are pruned."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal

from qgraph import notation
from qgraph.errors import ConfigError
from qgraph.rules import near

__all__ = ["QuantSpec", "SparsitySpec", "checked_keys", "set_field"]

Scheme = Literal["affine", "linear"]
Granularity = Literal["tensor", "channel", "block", "token"]
Method = Literal["ddt", "ste", "lsq", "seq"]
Scale = Literal["minmax", "absmean", "windowed"]
Range = Literal["dynamic", "static"]
SparsityKind = Literal["n:m", "unstructured", "block"]

TERNARY = 1.58
MAX_BITS = 8
MIN_STATIC_LINEAR_BITS = 3
WINDOWED_BITS = 2  # up to so many the default scale of affine ddt is "windowed": docs/accuracy.md
DEFAULT_LAM = 0.01  # the paper's ridge penalty, in integer units of the codes, for every bit width


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one operand is quantized.

    Parameters
    ----------
    bits : int or float
        1..8, or 1.58 for ternary.
    scheme : "affine" or "linear", optional
        Affine levels are 0..2^bits-1 with a zero point, linear ones are symmetric about zero. Ternary is
        linear; everything else is affine unless said.
    granularity : "tensor", "channel", "block" or "token"
        Which values share a scale. A weight takes tensor, channel (one group per output channel) or block
        (runs of `group_size` along the contracted dimensions); an activation takes tensor, token or block.
    group_size : int, optional
        The length of a block; given with "block" and only then. The last block of a row may be shorter, and
        a row that is no longer than a block is one group.
    method : "ddt", "ste", "lsq" or "seq"
        The denoising transform, straight-through rounding, a learned step size, or ParetoQ's learned range for at most
        2 bits.
    scale : "minmax", "absmean" or "windowed", optional
        Where the scale comes from. "minmax" is the range of the group, as in the paper (linear levels within -1..1: the
        mean magnitude); "absmean" the mean magnitude, about the mean of the group if affine; "windowed" the same, and
        values further than half a step beyond the outer levels pass no gradient on through their codes. Method "ste"
        learns through such a scale. A learned step has none: "minmax". Left out it is "windowed" for affine levels of 1
        and 2 bits by method "ddt", which trained better there (docs/accuracy.md), else "minmax".
    lam : float
        Ridge penalty of the denoising regression.
    range : "dynamic" or "static"
        Whether an activation's scale is computed from the values at hand, or fixed: kept as running averages while
        training, or filled by `qgraph.calibrate`. A static range is that of a whole tensor, its zero point is an
        integer, and its linear levels are those of two's complement: what integer kernels take.
    """

    bits: float
    scheme: Scheme | None = None
    granularity: Granularity = "channel"
    group_size: int | None = None
    method: Method = "ddt"
    scale: Scale | None = None
    lam: float = DEFAULT_LAM
    range: Range = "dynamic"

    def __post_init__(self) -> None:
        set_field(self, "bits", _checked_bits(self.bits))
        if self.scheme is None:
            set_field(self, "scheme", "linear" if self.bits == TERNARY else "affine")
        _check_choice("scheme", self.scheme, Scheme)
        _check_choice("granularity", self.granularity, Granularity)
        _check_choice("method", self.method, Method)
        if self.scale is None:
            set_field(self, "scale", self._default_scale())
        _check_choice("scale", self.scale, Scale)
        _check_choice("range", self.range, Range)
        if self.bits == TERNARY and self.scheme == "affine":
            raise ConfigError("QuantSpec: ternary levels are -1, 0, 1, so 1.58 bits take scheme='linear'.")
        if self.scale != "minmax" and self.method not in ("ddt", "ste"):
            raise ConfigError(
                f"QuantSpec: scale={self.scale!r} belongs to method='ddt' or 'ste', found method={self.method!r}, "
                "whose step is learned."
            )
        if self.method == "seq" and (self.bits > 2 or (self.bits, self.scheme) == (2, "linear")):
            raise ConfigError(
                f"QuantSpec: method='seq' has 2, 3 or 4 levels, so bits are 1, 1.58 or 2 (affine), "
                f"found bits={self.bits!r} and scheme={self.scheme!r}; use method='lsq'."
            )
        self._check_group_size()
        if self.range == "static":
            self._check_static()
        if not _is_number(self.lam) or not 0 <= self.lam < math.inf:
            raise ConfigError(f"QuantSpec: lam is a finite number of at least 0, found {self.lam!r}.")

    def _check_group_size(self) -> None:
        if self.granularity != "block":
            if self.group_size is not None:
                raise ConfigError(
                    f"QuantSpec: group_size={self.group_size!r} needs granularity='block', "
                    f"found granularity={self.granularity!r}."
                )
            return
        if not _is_int(self.group_size) or self.group_size < 1:  # type: ignore[operator]
            raise ConfigError(
                f"QuantSpec: granularity='block' needs a group_size of at least 1, found {self.group_size!r}."
            )

    def _check_static(self) -> None:
        if self.granularity != "tensor":
            raise ConfigError(
                f"QuantSpec: range='static' needs granularity='tensor', found {self.granularity!r}: one fixed scale a "
                f"tensor is what integer kernels take."
            )
        if self.method not in ("ddt", "ste") or self.scale != "minmax":
            raise ConfigError(
                f"QuantSpec: range='static' takes method 'ddt' or 'ste' and scale='minmax', found method="
                f"{self.method!r} and scale={self.scale!r}; a learned step is fixed by itself."
            )
        if self.scheme == "linear" and self.bits < MIN_STATIC_LINEAR_BITS:
            raise ConfigError(
                f"QuantSpec: range='static' with scheme='linear' takes {MIN_STATIC_LINEAR_BITS} to {MAX_BITS} bits, "
                f"found {self.bits}: below, the scale is a mean and no range; take scheme='affine'."
            )

    def _default_scale(self) -> Scale:
        few = self.scheme == "affine" and self.bits <= WINDOWED_BITS
        return "windowed" if few and self.method == "ddt" and self.range == "dynamic" else "minmax"

    def with_bits(self, bits: float) -> "QuantSpec":
        """The same at other bits: 1.58 bits are linear, and a scale that is the default one stays the default one.

        Raises
        ------
        ConfigError
            For bits that such a spec cannot have.
        """
        scheme = "linear" if bits == TERNARY else self.scheme
        default = self.scale == replace(self, scale=None).scale
        return replace(self, bits=bits, scheme=scheme, scale=None if default else self.scale)

    @property
    def learns(self) -> bool:
        """Whether the step is a parameter."""
        return self.method in ("lsq", "seq")

    @property
    def levels(self) -> tuple[int, int]:
        """The smallest and the largest code. Binary linear has only these two, and no 0 between them."""
        if self.scheme == "affine":
            return 0, 2 ** int(self.bits) - 1
        top = 1 if self.bits in (1, TERNARY) else 2 ** (int(self.bits) - 1) - 1
        return (-top - 1 if self.range == "static" else -top), top

    @property
    def storage_bits(self) -> float:
        """Bits that one code carries: `bits`, and log2(3) for ternary."""
        return math.log2(3) if self.bits == TERNARY else float(self.bits)

    def __str__(self) -> str:
        group = f"block {self.group_size}" if self.granularity == "block" else self.granularity
        bits = "ternary" if self.bits == TERNARY else f"{self.bits}-bit"
        scale = "" if self.scale == "minmax" else f" {self.scale}"
        fixed = ", static range" if self.range == "static" else ""
        return f"{bits} {self.scheme} {self.method}{scale} per {group}{fixed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `QuantSpec.from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "QuantSpec":
        """Read what `to_dict` wrote; unknown keys are an error."""
        return cls(**checked_keys("QuantSpec", data, cls))


@dataclass(frozen=True, slots=True)
class SparsitySpec:
    """Which weights are pruned: N kept of every M, a fraction, or a fraction in blocks.

    Parameters
    ----------
    kind : "n:m", "unstructured" or "block"
    n, m : int, optional
        Of every `m` weights along the input dimension the `n` largest are kept; 1 <= n <= m <= 32.
    ratio : float, optional
        The fraction that is pruned, above 0 and below 1.
    block_shape : tuple of int, optional
        Rows and columns of the blocks that are kept or pruned whole.
    decay : float
        SR-STE: what of a pruned weight is added to its gradient, which pulls it to 0 (2e-4 in its paper). Not with
        weights quantized by method "ddt", which has its own gradient for them.
    """

    kind: SparsityKind
    n: int | None = None
    m: int | None = None
    ratio: float | None = None
    block_shape: tuple[int, int] | None = None
    decay: float = 0.0

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, SparsityKind, owner="SparsitySpec")
        wanted = {"n:m": ("n", "m"), "unstructured": ("ratio",), "block": ("ratio", "block_shape")}[self.kind]
        for name in ("n", "m", "ratio", "block_shape"):
            given = getattr(self, name) is not None
            if given != (name in wanted):
                state = "does not take" if given else "needs"
                raise ConfigError(f"SparsitySpec: kind={self.kind!r} {state} {name}; it takes {', '.join(wanted)}.")
        if self.kind == "n:m":
            self._check_counts()
        else:
            self._check_ratio()
        if not _is_number(self.decay) or not 0 <= self.decay < math.inf:
            raise ConfigError(f"SparsitySpec: decay is a finite number of at least 0, found {self.decay!r}.")

    def _check_counts(self) -> None:
        n, m = self.n, self.m
        if not (_is_int(n) and _is_int(m) and 1 <= n <= m <= notation.MAX_M):  # type: ignore[operator]
            raise ConfigError(f"sparsity {n}:{m}: N of every M weights are kept, so 1 <= N <= M <= {notation.MAX_M}.")

    def _check_ratio(self) -> None:
        if not _is_number(self.ratio) or not 0 < self.ratio < 1:  # type: ignore[operator]
            found = notation.format_percent(self.ratio) if _is_number(self.ratio) else repr(self.ratio)  # type: ignore[arg-type]
            raise ConfigError(f"sparsity {found}: the fraction that is pruned lies above 0 % and below 100 %.")
        if self.block_shape is None:
            return
        if isinstance(self.block_shape, list):
            set_field(self, "block_shape", tuple(self.block_shape))
        shape = self.block_shape
        if not (isinstance(shape, tuple) and len(shape) == 2 and all(_is_int(s) and s > 0 for s in shape)):
            raise ConfigError(f"SparsitySpec: block_shape is two sizes of at least 1, found {shape!r}.")

    @classmethod
    def parse(cls, text: "str | SparsitySpec") -> "SparsitySpec":
        """Read `2:4`, `70%` or `70%[4x4]`, and any of them with a decay as in `2:4~0.0002`.

        >>> SparsitySpec.parse("2:4")
        SparsitySpec(kind='n:m', n=2, m=4, ratio=None, block_shape=None, decay=0.0)
        """
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            hint = ' YAML reads an unquoted 2:4 as a number; write "2:4".' if _is_int(text) else ""
            raise ConfigError(f"sparsity {text!r}: expected text such as '2:4' or '70%'.{hint}")
        pattern, tilde, decay = text.partition("~")
        try:
            pull = float(decay) if tilde else 0.0
        except ValueError:
            raise ConfigError(f"sparsity {text!r}: expected a number after '~', such as 2:4~0.0002.") from None
        return cls(**notation.read_sparsity(pattern), decay=pull)  # type: ignore[arg-type]

    @property
    def density(self) -> float:
        """The fraction of weights that is kept."""
        return self.n / self.m if self.n and self.m else 1.0 - (self.ratio or 0.0)

    def __str__(self) -> str:
        pull = f"~{self.decay!r}" if self.decay else ""
        if self.kind == "n:m":
            return f"{self.n}:{self.m}{pull}"
        block = "[{}x{}]".format(*self.block_shape) if self.block_shape else ""
        return notation.format_percent(self.ratio or 0.0) + block + pull


def _checked_bits(bits: Any) -> float:
    if _is_number(bits):
        if bits == TERNARY:
            return TERNARY
        if bits == int(bits) and 1 <= bits <= MAX_BITS:
            return int(bits)
    raise ConfigError(f"QuantSpec: bits are 1..8, or 1.58 for ternary, found {bits!r}.")


def _check_choice(name: str, value: Any, choices: Any, owner: str = "QuantSpec") -> None:
    if not isinstance(value, str) or value not in choices.__args__:
        raise ConfigError(f"{owner}: {name} is one of {', '.join(choices.__args__)}, found {value!r}.")


def checked_keys(what: str, data: Any, cls: type) -> dict[str, Any]:
    """A mapping as a dict, its keys the fields of the dataclass `cls`."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{what}: expected a mapping, found {type(data).__name__}.")
    known = [field.name for field in fields(cls)]
    for key in data:
        if key not in known:
            raise ConfigError(f"{what}: unknown key {key!r}{near(str(key), known)}; the keys are {', '.join(known)}.")
    for field in fields(cls):
        if field.default is MISSING and field.name not in data:
            raise ConfigError(f"{what}: {field.name} is missing; the keys are {', '.join(known)}.")
    return dict(data)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def set_field(spec: Any, name: str, value: Any) -> None:
    """Set a field of a frozen value while it is being made."""
    object.__setattr__(spec, name, value)
