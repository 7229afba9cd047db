"""Files that are there whole or not at all: written beside, and renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qgraph.errors import InspectError

__all__ = ["written"]


def written(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` make a file beside `path`, and rename it; returns the absolute path.

    Raises
    ------
    InspectError
        When the folder does not exist, or the path is one.
    """
    path = path.absolute()
    if not path.parent.is_dir():
        raise InspectError(f"{path}: its folder does not exist. Expected a path in a folder; make {path.parent} first.")
    if path.is_dir():
        raise InspectError(f"{path}: found a folder. Expected the path of a file to write; name a file in it.")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path
