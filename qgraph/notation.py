"""The notation `A4W1-2:4@128` as text: grammar, tokens, and the nearest valid spelling of a typo.

What a notation means is decided in `qgraph.config`; this file only reads and suggests.
"""

import difflib
import re
from dataclasses import dataclass
from decimal import Decimal

from qgraph.errors import ConfigError

__all__ = [
    "GRAMMAR",
    "Notation",
    "bits_from_text",
    "format_percent",
    "nearest",
    "read_notation",
    "read_sparsity",
]

GRAMMAR = (
    "A<bits>[s]W<bits>[-<N>:<M> | -<percent>% | -<percent>%[<rows>x<cols>]][@<block> | @channel | @tensor], "
    "bits 1..8 or 1.58 (ternary), A or W or both may be left out, or 'float'; s gives activations a static range; "
    "for example A8W4@128, W1.58, A4W1-2:4@128, A8sW7, W2-70%, 2:4"
)
GROUP_WORDS = ("channel", "tensor")
BIT_WORDS = ("1", "1.58", "2", "3", "4", "5", "6", "7", "8")
MAX_M = 32

_SPARSITY = r"\d+:\d+|\d+(?:\.\d+)?%(?:\[\d+x\d+\])?"
_NOTATION = re.compile(
    rf"(?:A(?P<a>\d+(?:\.\d+)?)(?P<static>s)?)?(?:W(?P<w>\d+(?:\.\d+)?))?(?:(?:^|-)(?P<s>{_SPARSITY}))?(?:@(?P<g>\w+))?"
)


@dataclass(frozen=True, slots=True)
class Notation:
    """The parts of a notation, each None where it was left out; `group` is a block size or a word; `static` says that
    the activation's range is fixed.
    """

    activation: float | None
    weight: float | None
    sparsity: str | None
    group: int | str | None
    static: bool = False


def read_notation(text: str) -> Notation:
    """Split a notation into its parts.

    Parameters
    ----------
    text : str
        Such as `A4W1-2:4@128`; spaces around it are ignored. `float` stands for nothing at all.

    Raises
    ------
    ConfigError
        With the nearest valid notation and the grammar.
    """
    stripped = text.strip()
    if stripped == "float":
        return Notation(None, None, None, None)
    match = _NOTATION.fullmatch(stripped)
    if match is None or not stripped:
        raise ConfigError(typo(text, "this is not the notation"))
    activation, weight = (
        None if match[letter.lower()] is None else _bits(text, letter, match[letter.lower()]) for letter in "AW"
    )
    if activation is None and weight is None and match["g"] is not None:
        raise ConfigError(typo(text, f"@{match['g']} groups what is quantized, and neither A nor W is given"))
    return Notation(activation, weight, match["s"], _group(text, match["g"]), match["static"] is not None)


def bits_from_text(text: str) -> float | None:
    """1..8 as an int, 1.58 as a float, None for anything else."""
    return (float(text) if text == "1.58" else int(text)) if text in BIT_WORDS else None


def read_sparsity(text: str) -> dict[str, object]:
    """The fields of a `SparsitySpec` from `2:4`, `70%` or `70%[4x4]`; their ranges are not checked here."""
    stripped = text.strip()
    if not re.fullmatch(_SPARSITY, stripped):
        raise ConfigError(f"sparsity {text!r}: expected N:M such as 2:4, a percentage such as 70%, or 70%[4x4].")
    if ":" in stripped:
        n, m = stripped.split(":")
        return {"kind": "n:m", "n": int(n), "m": int(m)}
    percent, _, block = stripped.partition("%")
    ratio = float(Decimal(percent) / 100)
    if not block:
        return {"kind": "unstructured", "ratio": ratio}
    rows, columns = block.strip("[]").split("x")
    return {"kind": "block", "ratio": ratio, "block_shape": (int(rows), int(columns))}


def format_percent(ratio: float) -> str:
    """A ratio as a percentage that reads back as exactly the same float."""
    text = format(Decimal(repr(ratio)) * 100, "f")
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "%"


def nearest(text: str) -> str | None:
    """The valid notation that is most like `text`, or None where nothing is near."""
    repaired = _repair(text)
    if repaired is not None:
        return repaired
    found = difflib.get_close_matches(text.strip(), _candidates(), n=1, cutoff=0.5)
    return found[0] if found else None


def _bits(text: str, letter: str, digits: str) -> float:
    bits = bits_from_text(digits)
    if bits is None:
        raise ConfigError(typo(text, f"{letter}{digits} asks for {digits} bits, and bits are 1..8 or 1.58"))
    return bits


def _group(text: str, word: str | None) -> int | str | None:
    if word is None or word in GROUP_WORDS:
        return word
    if not word.isdecimal():
        raise ConfigError(typo(text, f"@{word} is neither a block size, @channel nor @tensor"))
    if int(word) == 0:
        raise ConfigError(typo(text, "a block holds at least one value, and @0 holds none"))
    return int(word)


def typo(text: str, problem: str) -> str:
    """The message for a notation that is wrong: the problem, the nearest valid one, the grammar."""
    near = nearest(text)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"config {text!r}: {problem}.{hint}\nThe grammar is {GRAMMAR}."


def _repair(text: str) -> str | None:
    """Right parts in the wrong order, case or punctuation, put together again; None where a part is wrong."""
    parts = {
        "A": re.findall(r"[Aa]\s*((?:1\.58|\d+(?:\.\d+)?)[sS]?)", text),
        "W": re.findall(r"[Ww]\s*(1\.58|\d+(?:\.\d+)?)", text),
        "-": re.findall(_SPARSITY, re.sub(r"(?<=\d)\s*;\s*(?=\d)", ":", text)),
        "@": re.findall(r"@\s*(\w+)", text),
    }
    if any(len(found) > 1 for found in parts.values()):
        return None
    activation, weight, sparsity, group = (found[0] if found else "" for found in parts.values())
    group = (difflib.get_close_matches(group.lower(), GROUP_WORDS, n=1) or [group])[0]
    bits = "".join(letter + _nearest_bits(value) for letter, value in (("A", activation), ("W", weight)) if value)
    pruned = f"-{_nearest_sparsity(sparsity)}" if sparsity else ""
    grouped = f"@{group}" if group and bits and (group in GROUP_WORDS or group.strip("0").isdecimal()) else ""
    repaired = (bits + pruned).removeprefix("-" if not bits else "") + grouped
    return repaired if repaired and _NOTATION.fullmatch(repaired) else None


def _nearest_bits(value: str) -> str:
    digits = value.rstrip("sS")
    return min(BIT_WORDS, key=lambda word: abs(float(word) - float(digits))) + ("s" if digits != value else "")


def _nearest_sparsity(text: str) -> str:
    if ":" not in text:
        percent, _, block = text.partition("%")
        if not 0 < float(percent) < 100:
            percent = "90" if float(percent) >= 100 else "10"
        return f"{percent}%{block}"
    n, m = sorted(int(part) for part in text.split(":"))
    m = min(max(m, 1), MAX_M)
    return f"{min(max(n, 1), m)}:{m}"


def _candidates() -> list[str]:
    options = ["", *BIT_WORDS]
    bits = [(f"A{a}" if a else "") + (f"W{w}" if w else "") for a in options for w in options]
    tails = [s + g for s in ("", "-2:4", "-50%") for g in ("", "@128", "@64", "@32", "@channel", "@tensor")]
    return [head + tail for head in bits if head for tail in tails]
