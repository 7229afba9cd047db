"""Where in the user's code an operation stands: file and line, and the variable that receives its result."""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import os
import sys
from types import CodeType, FrameType

import torch
from torch import nn

from qgraph.graph import OWN_FORWARD

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_PLUMBING = frozenset({contextlib.__file__, functools.__file__})
_TORCH_LAYERS = os.path.join(TORCH, "nn", "modules") + os.sep


def locate() -> tuple[str, str | None]:
    """``file:line`` of the innermost user frame, and the name that the running statement assigns, if it has one."""
    frame: FrameType | None = sys._getframe(1)
    named: FrameType | None = None
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(HERE) and frame.f_code.co_name == "record_forward":
            # The caller's frames belong to the parent: they tell the line, not the variable.
            if named is None:
                named = frame
        elif not path.startswith((HERE, TORCH, "<")) and path not in _PLUMBING:
            return f"{path}:{frame.f_lineno}", _assigned(named or frame)
        elif named is None and path.startswith(_TORCH_LAYERS) and frame.f_code.co_name != "_call_impl":
            named = frame
        frame = frame.f_back
    return "<unknown>:0", None


def raised_at(error: BaseException) -> str:
    """``file:line`` of the innermost user frame that an error came through."""
    found, step = "<unknown>:0", error.__traceback__
    while step is not None:
        path = step.tb_frame.f_code.co_filename
        if not path.startswith((HERE, TORCH, "<")) and not path.endswith(".pyx") and path not in _PLUMBING:
            found = f"{path}:{step.tb_lineno}"
        step = step.tb_next
    return found


def within_call_of(kind: type, outermost: CodeType) -> bool:
    """Whether a `__call__` written in Python, of an object of `kind`, is running inside of the frame of `outermost`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not outermost:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_argcount and isinstance(frame.f_locals[code.co_varnames[0]], kind):
            return True
        frame = frame.f_back
    return False


def definition(module: nn.Module, function: object) -> str:
    """``file:line`` where the forward of a module is written."""
    function = module.__dict__.get(OWN_FORWARD, function)
    code = getattr(function, "__code__", None) or getattr(getattr(function, "__wrapped__", None), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "<unknown>:0"


def _assigned(frame: FrameType) -> str | None:
    return _stores(frame.f_code).get(frame.f_lasti)


@functools.lru_cache(maxsize=4096)
def _stores(code: CodeType) -> dict[int, str]:
    """For each instruction whose result is stored at once in a local variable: that variable's name.

    By the places of the instruction and of its cache: a call that has run often stands at the end of the latter.
    """
    instructions = list(dis.get_instructions(code))
    return {
        place: after.argval
        for before, after in itertools.pairwise(instructions)
        if after.opname in ("STORE_FAST", "STORE_NAME", "STORE_DEREF")
        for place in range(before.offset, after.offset, 2)
    }
