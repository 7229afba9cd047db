"""Where in the user's code an error comes from: the innermost frame that is neither torch's nor ours."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from qgraph import modules


def user_line(error: BaseException) -> str | None:
    """``file:line (function)`` of the innermost frame that is neither torch's nor ours."""
    for exception in reversed(list(chain(error))):
        recorded = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', str(exception))
        frames = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(exception.__traceback__)]
        for filename, line, function in [*reversed(recorded), *reversed(frames)]:
            if is_user_file(filename):
                return f"{filename}:{line} (in {function})"
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_user_file(filename: str) -> bool:
    """Whether a file is neither generated, nor installed, nor one of ours."""
    path = filename.replace("\\", "/")
    if path.startswith("<") or "/site-packages/" in path or "/lib/python" in path:
        return False
    return path not in _own_files()


def _own_files() -> frozenset[str]:
    roots = {Path(__file__).resolve().parent, Path(modules.__file__).resolve().parent}
    return frozenset(str(file) for root in roots for file in root.rglob("*.py"))
