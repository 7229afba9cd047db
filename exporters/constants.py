"""Which sizes of the inputs torch.export takes for constants, and the lines of the user's code that make them so."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qgraph.exporters.where import calling_line, chain

_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")


class MadeConstant(Exception):
    """torch.export refused sizes that were to be dynamic; `lines` says of each which line made it a constant."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


@contextlib.contextmanager
def lines_of_constants(entry: str) -> Iterator[None]:
    """While active, an error about sizes that became constants comes from a `MadeConstant` that names the lines.

    `entry`: the function below which the user's code runs.
    """
    found: dict[str, str] = {}
    original = ShapeEnv._set_replacement

    def noting(env: ShapeEnv, symbol: Any, target: Any, message: str) -> None:
        if target.is_Integer:
            for name in (str(source.name) for source in env.var_to_sources.get(symbol, ())):
                found.setdefault(name, f"{target} by {calling_line(entry) or 'a line of no file'}")
        original(env, symbol, target, message)

    ShapeEnv._set_replacement = noting  # type: ignore[method-assign,assignment]
    try:
        yield
    except Exception as error:
        sizes = dict.fromkeys(re.findall(_SIZE, str(error))) if "Constraints violated" in str(error) else {}
        lines = [
            f"dimension {dim} of {name} is made the constant {found[key]}"
            for name, dim in sizes
            if (key := f"L['{name}'].size()[{dim}]") in found
        ]
        if not lines:
            raise
        raise MadeConstant(lines) from error
    finally:
        ShapeEnv._set_replacement = original  # type: ignore[method-assign]


def constants(error: BaseException) -> list[str]:
    """What a `MadeConstant` behind an error says."""
    return next((e.lines for e in chain(error) if isinstance(e, MadeConstant)), [])
