"""Names of modules and parameters in the code of graphs: torch.fx quotes them without a look at what is in them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import fx

_replacing = threading.RLock()


@contextlib.contextmanager
def any_name() -> Iterator[None]:
    """While active, torch.fx writes code in which a name may hold a quote, a backslash or a new line."""
    with _replacing:
        original = fx.graph._format_target
        fx.graph._format_target = format_target
        try:
            yield
        finally:
            fx.graph._format_target = original


def format_target(base: str, target: str) -> str:
    """The code for what lies at a dotted path below `base`; that of torch.fx, but for names that need escapes."""
    for name in target.split("."):
        if name.isidentifier():
            base = f"{base}.{name}"
        else:
            quoted = name.encode("unicode_escape").decode().replace('"', r"\"")
            base = f'getattr({base}, "{quoted}")'
    return base


def python_code(graph: fx.Graph) -> Any:
    """`graph.python_code("self")`, whatever names the graph has."""
    targets = [node.target for node in graph.nodes if isinstance(node.target, str)]
    plain = all(target.isprintable() and '"' not in target and "\\" not in target for target in targets)
    with contextlib.nullcontext() if plain else any_name():
        return graph.python_code("self")
