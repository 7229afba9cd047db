"""Where in the user's code an error comes from: the innermost frame that is neither torch's nor ours."""

from __future__ import annotations

import inspect
import linecache
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import nn

from qgraph import modules
from qgraph.capture.variants import GENERATED

_Frame = tuple[str, int | None, str]  # file, line, function
_TOOLS = frozenset({"torch", "functorch", "sympy", "numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime"})


def user_line(error: BaseException) -> str | None:
    """``file:line (in function)`` of the innermost frame in the user's code, else in the library that they use."""
    frames: list[_Frame] = []
    for exception in reversed(list(chain(error))):
        frames += _frames_in(str(exception))
        frames += reversed([(f.filename, f.lineno, f.name) for f in traceback.extract_tb(exception.__traceback__)])
    return _innermost(frames)


def forward_line(model: nn.Module) -> str:
    """Where a model's forward is written."""
    code = inspect.unwrap(type(model).forward).__code__
    return f"{code.co_filename}:{code.co_firstlineno} (in forward)"


def line_in(stack_trace: str) -> str | None:
    """The same for a stack trace as text."""
    return _innermost(_frames_in(stack_trace))


def calling_line(entry: str) -> str | None:
    """The same for the code that runs now, below the innermost function named `entry`."""
    stack = [(f.filename, f.lineno, f.name) for f in traceback.extract_stack()]
    start = max((i for i, frame in enumerate(stack) if frame[2] == entry), default=0)
    return _innermost(reversed(stack[start:]))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _frames_in(text: str) -> list[_Frame]:
    recorded = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', text)
    return [(filename, int(line), function) for filename, line, function in reversed(recorded)]


def _innermost(frames: Iterable[_Frame]) -> str | None:
    library = None
    for filename, line, function in map(_recorded, frames):
        place = f"{filename}:{line} (in {function})"
        if is_user_file(filename):
            return place
        if library is None and _is_library(filename):
            library = place
    return library


def _recorded(frame: _Frame) -> _Frame:
    """A line of a captured graph stands for the line that it was recorded from."""
    filename, line, function = frame
    if filename.startswith(GENERATED) and line is not None:
        noted = re.search(r"# (\S.*):(\d+)$", linecache.getline(filename, line).rstrip())
        if noted:
            return noted[1], int(noted[2]), function
    return frame


def is_user_file(filename: str) -> bool:
    """Whether a file is neither generated, nor compiled (Cython names its source), nor installed, nor one of ours."""
    path = filename.replace("\\", "/")
    if path.startswith("<") or path.endswith(".pyx") or "/site-packages/" in path or "/lib/python" in path:
        return False
    return path not in _own_files()


def _is_library(filename: str) -> bool:
    """Whether a file belongs to an installed package that is no tool of the export, as transformers is."""
    package = filename.replace("\\", "/").partition("/site-packages/")[2].partition("/")[0]
    return bool(package) and package not in _TOOLS and filename not in _own_files()


def _own_files() -> frozenset[str]:
    roots = {Path(__file__).resolve().parent, Path(modules.__file__).resolve().parent}
    return frozenset(str(file) for root in roots for file in root.rglob("*.py"))
