"""What people read in a terminal: printed reports as text, and progress bars."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["as_text", "progress_bar"]


def as_text(printable: Any, width: int = 120) -> str:
    """What rich prints of an object in `width` columns, without colours, and with brackets as they are."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=width, highlight=False, markup=False, color_system=None).print(printable)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


@contextlib.contextmanager
def progress_bar(show: bool, total: int | None, name: str) -> Iterator[Callable[[], None]]:
    """A bar on standard error, where that is a terminal; gives the function that advances it by one."""
    if not show or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.update(task, advance=1)
