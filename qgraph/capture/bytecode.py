"""What a function's code names outside of itself: globals, and variables that it encloses."""

from __future__ import annotations

import dis
import functools
import itertools
from types import CodeType
from typing import NamedTuple

from qgraph.capture.structure import Step

_NAMES = ("LOAD_GLOBAL", "LOAD_DEREF", "STORE_GLOBAL", "STORE_DEREF", "DELETE_GLOBAL")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR")
_SILENT = ("CACHE", "PRECALL", "EXTENDED_ARG", "COPY")  # nothing that a step would end at


class Name(NamedTuple):
    """A name outside of a function, and the attributes and constant keys that its code takes on from there."""

    enclosed: bool  # whether the function encloses it; else it is a global
    name: str
    steps: tuple[Step, ...]


@functools.lru_cache(maxsize=4096)
def names_outside(code: CodeType) -> tuple[Name, ...]:
    """The names outside of a function that its code, and the functions inside it, load or set."""
    found: list[Name] = []
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _SILENT]
    for at, instruction in enumerate(instructions):
        enclosed = instruction.argval in code.co_freevars
        if instruction.opname in _NAMES and (enclosed or instruction.opname.endswith("GLOBAL")):
            found.append(Name(enclosed, instruction.argval, _steps(instructions, at + 1)))
    for inner in _inner(code):
        found += [n for n in names_outside(inner) if not n.enclosed or n.name in code.co_freevars]
    return tuple(dict.fromkeys(found))


@functools.lru_cache(maxsize=4096)
def attributes_named(code: CodeType) -> frozenset[str]:
    """The names of attributes in a function's code, by which it may call methods."""
    return frozenset(code.co_names).union(*map(attributes_named, _inner(code)))


@functools.lru_cache(maxsize=4096)
def multiplies(code: CodeType) -> bool:
    """Whether a function's code has an ``@`` in it."""
    own = any(i.opname == "BINARY_OP" and i.argrepr.startswith("@") for i in dis.get_instructions(code))
    return own or any(map(multiplies, _inner(code)))


def _inner(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _steps(instructions: list[dis.Instruction], start: int) -> tuple[Step, ...]:
    steps: list[Step] = []
    following = iter(itertools.pairwise(instructions[start:]))
    for first, second in following:
        if first.opname in _ATTRIBUTES:
            steps.append(Step(True, first.argval))
        elif first.opname == "LOAD_CONST" and second.opname == "BINARY_SUBSCR":
            steps.append(Step(False, first.argval))
            next(following, None)
        else:
            break
    return tuple(steps)
