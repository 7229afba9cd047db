"""Random models: a description drawn by hypothesis, written out as the Python source of a module, built and checked.

    python -m tests.zoo.generator --seed 7 --count 1000      # any seed by hand
    python -m tests.zoo.generator --seed 7 --print 3         # the source of three of them

A model that fails a check is shrunk to a minimal one, which is printed as code.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import linecache
import re
import string
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from torch import nn

from tests.zoo.checks import Call, check, run
from tests.zoo.operations import CONVERSIONS, HELPERS, NESTED, OPS, PLAIN, RETURNS, TAKES, WEIGHTS, Op

# -- descriptions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One operation, which earlier value it also takes, and the steps inside it."""

    op: str
    pick: int = 0
    body: tuple[Step, ...] = ()
    other: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Description:
    """A model: the kind of its input, its steps, and the form of its argument and of its result."""

    kind: str
    steps: tuple[Step, ...]
    takes: str = "tensor"
    returns: str = "tensor"


def _lists(steps: st.SearchStrategy[Step], most: int) -> st.SearchStrategy[tuple[Step, ...]]:
    return st.lists(steps, min_size=1, max_size=most).map(tuple)


def _nested(inner: st.SearchStrategy[Step]) -> st.SearchStrategy[Step]:
    body = _lists(inner, 2)
    return st.builds(Step, st.sampled_from(list(NESTED)), st.integers(0, 2), body, body)


def descriptions() -> st.SearchStrategy[Description]:
    """Random models, up to two levels of nesting."""
    weights, plain = (st.builds(Step, st.sampled_from(list(ops)), st.integers(0, 2)) for ops in (WEIGHTS, PLAIN))
    leaf = weights | plain
    once = _nested(leaf)
    steps = _lists(weights | plain | once | _nested(leaf | once), 4)
    return st.builds(
        Description, st.sampled_from("vsit"), steps, st.sampled_from(list(TAKES)), st.sampled_from(list(RETURNS))
    )


# -- source ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Value:
    """A variable of a forward, its kind, and a number that values of one length or size share."""

    name: str
    kind: str
    size: int


@dataclass(slots=True)
class _Source:
    """The classes of one model, innermost first."""

    classes: list[str] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def add_class(self, name: str, kind: str, steps: tuple[Step, ...], takes: str, returns: str, tokens: bool) -> None:
        body = _Class(self)
        x = _Value("x", kind, 0)
        if tokens:
            body.init.append("self.embed = nn.Embedding(8, 4)")
            body.lines.append("x = self.embed(x)")
        end = body.convert(body.write(steps, [x], ""), kind, "")
        lines = [*TAKES[takes].splitlines(), *body.lines]
        returned = RETURNS[returns].replace("$x", end.name).replace("$first", "x")
        init = "".join(f"        {line}\n" for line in ["super().__init__()", *body.init])
        forward = "".join(f"        {line}\n" if line else "\n" for line in [*lines, f"return {returned}"])
        self.classes.append(
            f"class {name}(nn.Module):\n    def __init__(self):\n{init}\n"
            f"    def forward(self, x, extra=None, flag=False, gain=1.0):\n{forward}"
        )


@dataclass(slots=True)
class _Class:
    """The lines of one class while it is written."""

    source: _Source
    init: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def write(self, steps: tuple[Step, ...], scope: list[_Value], indent: str) -> _Value:
        """Write the steps, beginning from the last value of `scope`; returns the value they end with."""
        for step in steps:
            scope.append(self._write_one(step, OPS[step.op], scope, indent))
        return scope[-1]

    def convert(self, x: _Value, kind: str, indent: str) -> _Value:
        if x.kind == kind:
            return x
        number = next(self.source.numbers)
        self.lines.append(f"{indent}x{number} = {CONVERSIONS[x.kind + kind].replace('$x', x.name)}")
        return _Value(f"x{number}", kind, number)

    def _write_one(self, step: Step, op: Op, scope: list[_Value], indent: str) -> _Value:
        if scope[-1].kind not in op.kinds:
            scope.append(self.convert(scope[-1], op.kinds[0], indent))
        x, number = scope[-1], next(self.source.numbers)
        alike = [v for v in reversed(scope) if (v.kind, v.size) == (x.kind, x.size)]
        names = {"x": x.name, "y": alike[step.pick % len(alike)].name, "r": f"x{number}", "n": str(number)}
        inner = op.inner or x.kind
        if "$Child" in op.init:
            names["Child"] = f"Block{number}"
            self.source.add_class(names["Child"], inner, step.body, op.takes, op.returns, tokens=False)
        self.init.extend(string.Template(op.init).substitute(names).splitlines())
        for line in string.Template(op.forward).substitute(names).splitlines():
            found = re.fullmatch(r"(\s*)@(body|other) (\w+) (\w+)", line)
            if found is None:
                self.lines.append(f"{indent}{line}" if line else "")
                continue
            deeper, which, start, end = indent + found[1], found[2], found[3], found[4]
            steps = step.body if which == "body" else step.other
            held = x.size if start == x.name else number
            last = self.write(steps, [*(scope if inner == x.kind else []), _Value(start, inner, held)], deeper)
            self.lines.append(f"{deeper}{end} = {self.convert(last, inner, deeper).name}")
        same_size = not op.resizes and not op.nests
        return _Value(names["r"], x.kind, x.size if same_size else number)


# Shapes of the example and of a second call, by kind of input; `t` are tokens of a sequence.
_SHAPES = {"v": ((2, 4), (3, 4)), "s": ((2, 3, 4), (3, 5, 4)), "i": ((2, 4, 4, 4), (3, 4, 5, 6)), "t": ((2, 3), (3, 5))}
_GIVEN = {
    "tensor": "{0}",
    "dict": '{{"x": {0}, "more": None}}',
    "pair": "({0}, {1})",
    "list": "[{0}, {1}]",
    "dataclass": "Inputs({0}, {1})",
}
_IMPORTS = """\
import dataclasses
import functools
import math
import random
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
"""


def source_of(model: Description) -> str:
    """A Python module with the classes, the last of them `Model`, and `calls`: the arguments of its calls."""
    tokens = model.kind == "t"
    kind = "s" if tokens else model.kind
    takes = "tensor" if tokens else model.takes
    source = _Source()
    source.add_class("Model", kind, model.steps, takes, model.returns, tokens)
    drawn = [f"torch.randint(8, {s})" if tokens else f"torch.randn{s}" for s in _SHAPES[model.kind]]
    first, second = (_GIVEN[takes].format(text, text) for text in drawn)
    calls = (
        "def calls():\n    return [\n"
        f"        (({first},), {{}}),\n"
        f"        (({second},), {{}}),\n"
        f'        (({first},), {{"flag": True, "gain": 0.5, "extra": torch.randn(3)}}),\n    ]\n'
    )
    parts = [*source.classes, calls]
    text = "\n".join(parts)
    helpers = [f"{code}\n" for name, code in HELPERS.items() if re.search(rf"\b{name}\b", text)]
    return "\n\n".join([_IMPORTS, *helpers, *parts])


@contextlib.contextmanager
def built(source: str) -> Iterator[tuple[nn.Module, list[Call]]]:
    """The model of a source and its calls, in a module that tracebacks and pickle find while the block runs."""
    name = "generated_model"
    home = types.ModuleType(name)
    home.__file__ = f"{name}.py"
    linecache.cache[home.__file__] = (len(source), None, source.splitlines(True), home.__file__)
    sys.modules[name] = home
    try:
        torch.manual_seed(0)
        exec(compile(source, home.__file__, "exec"), home.__dict__)
        model = home.__dict__["Model"]()
        yield model, [Call(args, kwargs) for args, kwargs in home.__dict__["calls"]()]
    finally:
        del sys.modules[name], linecache.cache[home.__file__]


# -- checks ------------------------------------------------------------------------------------------------------------


def failures(source: str) -> list[str] | None:
    """What the checks find wrong with the model of a source; None where eager itself does not run it."""
    with warnings.catch_warnings(action="ignore"), built(source) as (model, calls):
        try:
            for call in calls:
                for training in (False, True):
                    run(model, call, training)
        except Exception:
            return None
    with warnings.catch_warnings(action="ignore"), built(source) as (model, calls):
        try:
            return check("Model", model, calls).failures
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n\n{source}") from error


def search(seed: int, count: int) -> None:
    """Check `count` random models; raises AssertionError with a minimal failing model as code."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(descriptions())
    def every_check_holds(description: Description) -> None:
        source = source_of(description)
        found = failures(source)
        hypothesis.assume(found is not None)
        assert not found, "\n".join([*(found or ()), "", source])

    every_check_holds()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--print", type=int, default=0, metavar="N", help="only print the source of N models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.print:
        for source in samples(options.seed, options.print):
            print(source, end="\n\n")
        return 0
    try:
        search(options.seed, options.count)
    except AssertionError as error:
        print(error)
        return 1
    print(f"seed {options.seed}: {options.count} models pass")
    return 0


def samples(seed: int, count: int) -> list[str]:
    """The sources of the first models of a seed."""
    found: list[str] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, database=None, phases=(Phase.generate,), deadline=None)
    @hypothesis.given(descriptions())
    def keep(description: Description) -> None:
        found.append(source_of(description))

    keep()
    return found


if __name__ == "__main__":
    sys.exit(main())
