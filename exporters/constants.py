"""What a trace decides by the sizes of inputs, and which it takes for constants: the lines of the user's code."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qgraph.exporters.where import calling_line, chain

_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")


class MadeConstant(Exception):
    """torch.export refused sizes that were to be dynamic; `lines` says of each which line made it a constant."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


@dataclass(frozen=True, slots=True)
class Decision:
    """What a trace took for granted of sizes: a condition over symbols, the size that each is, and the user's line."""

    condition: Any
    sizes: dict[Any, tuple[str, int]]
    line: str

    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether it does for inputs of these shapes; a condition on anything else counts as one that does."""
        known = {symbol: shapes[name][dim] for symbol, (name, dim) in self.sizes.items()}
        return bool(self.condition.subs(known) != sympy.false)


@contextlib.contextmanager
def decisions_by_size(entry: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[list[Decision]]:
    """While active, collect what the code below the function `entry` decides by sizes that are to be dynamic.

    `shapes`: those of the inputs that it is traced with.

    An error about sizes that became constants then comes from a `MadeConstant` that names the lines.
    """
    found: list[Decision] = []
    constants: dict[str, str] = {}
    replaced, noted = ShapeEnv._set_replacement, ShapeEnv._maybe_guard_rel

    def replace(env: ShapeEnv, symbol: Any, target: Any, message: str) -> None:
        if target.is_Integer:
            for name in _names(env, symbol):
                constants.setdefault(name, calling_line(entry) or "a line of no file")
        replaced(env, symbol, target, message)

    def note(env: ShapeEnv, condition: Any) -> None:
        named = {s: _SIZE.fullmatch(name) for s in condition.free_symbols for name in _names(env, s)[:1]}
        sizes = {symbol: (match[1], int(match[2])) for symbol, match in named.items() if match}
        if sizes and len(sizes) == len(condition.free_symbols) and (line := calling_line(entry)):
            found.append(Decision(condition, sizes, line))
        noted(env, condition)

    ShapeEnv._set_replacement, ShapeEnv._maybe_guard_rel = replace, note  # type: ignore[method-assign,assignment]
    try:
        yield found
    except Exception as error:
        sizes = dict.fromkeys(re.findall(_SIZE, str(error))) if "Constraints violated" in str(error) else {}
        lines = [
            f"dimension {dim} of {name} is made the constant {shapes[name][int(dim)]} by "
            f"{_first_to_fix(found, name, int(dim), shapes) or constants[key]}"
            for name, dim in sizes
            if (key := f"L['{name}'].size()[{dim}]") in constants
        ]
        if not lines:
            raise
        raise MadeConstant(lines) from error
    finally:
        ShapeEnv._set_replacement, ShapeEnv._maybe_guard_rel = replaced, noted  # type: ignore[method-assign]


def _first_to_fix(
    decisions: Sequence[Decision], name: str, dim: int, shapes: Mapping[str, Sequence[int]]
) -> str | None:
    """The first line that holds for the traced size and no other: where it becomes a constant is often further on."""
    size = shapes[name][dim]
    others = [{**shapes, name: [*shapes[name][:dim], size + step, *shapes[name][dim + 1 :]]} for step in (1, 2, 3)]
    return next((d.line for d in decisions if not any(d.holds(other) for other in others)), None)


def decided_otherwise(decisions: Sequence[Decision], shapes: Iterable[Mapping[str, Sequence[int]]]) -> list[str]:
    """The lines that decide by a size, and would go another way at inputs of one of these shapes."""
    others = list(shapes)
    return list(dict.fromkeys(d.line for d in decisions if not all(d.holds(each) for each in others)))


def constants(error: BaseException) -> list[str]:
    """What a `MadeConstant` behind an error says."""
    return next((e.lines for e in chain(error) if isinstance(e, MadeConstant)), [])


def _names(env: ShapeEnv, symbol: Any) -> list[str]:
    return [str(source.name) for source in env.var_to_sources.get(symbol, ())]
