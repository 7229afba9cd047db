"""What the passes did to a module: its code before and after as a unified diff, and their notes pass by pass."""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text
from torch import fx, nn

from qgraph.errors import InspectError
from qgraph.graph import STATE, coverage, is_quantizer, states, without_quantizers
from qgraph.inspection.code import graph_text, short_where

if TYPE_CHECKING:
    from qgraph.pipeline import Note

__all__ = ["PassRecord", "RewrittenCode", "pass_records", "rewritten_code"]

SHOWN = 6  # modules that a title names
STYLES = {"---": "bold", "+++": "bold", "@@": "cyan", "+": "green", "-": "red"}


@dataclass(frozen=True, slots=True, repr=False)
class RewrittenCode:
    """The code of one module without and with what was inserted; `print` it, coloured on a terminal.

    Parameters
    ----------
    path : str
        Module path.
    before, after : tuple of str
        One text for each captured graph; those of eval and train are one where they are equal.
    diff : str
        Both as a unified diff with the user's lines as comments, plain.
    """

    path: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    diff: str

    def text(self, color: bool | None = None) -> str:
        """The diff with or without colours; None is with them where standard output is a terminal that takes them."""
        if color is None:
            color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        if not color:
            return self.diff
        console = Console(
            file=io.StringIO(), force_terminal=True, color_system="standard", width=10_000, no_color=False
        )
        console.print(self.__rich__(), soft_wrap=True)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip("\n")

    def __rich__(self) -> Text:
        lines = (Text(line, style=_style(line)) for line in self.diff.splitlines())
        return Text("\n").join(lines)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:  # what a notebook shows
        return self.diff


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one pass did to all graphs so far: its notes, site by site, and the seconds that it took."""

    name: str
    seconds: float
    notes: tuple[Note, ...]

    def __str__(self) -> str:
        lines = [f"  {note.site or 'the model'}: {note.text}" for note in self.notes]
        return "\n".join([f"{self.name} ({1e3 * self.seconds:.1f} ms)", *lines])


def pass_records(model: nn.Module) -> tuple[PassRecord, ...]:
    """One record a pass that has run, in the order of their first run."""
    shared = model.__dict__[STATE].shared
    notes = dict.fromkeys(shared.notes)
    names = dict.fromkeys([*shared.seconds, *(note.pass_name for note in notes)])
    return tuple(
        PassRecord(name, shared.seconds.get(name, 0.0), tuple(note for note in notes if note.pass_name == name))
        for name in names
    )


def rewritten_code(model: nn.Module, path: str) -> RewrittenCode:
    """The code of the module at `path` of a prepared model.

    Raises
    ------
    InspectError
        When there is no such module, or nothing of it is captured.
    """
    found = {state.path: (module, state) for _, module, state in states(model)}
    if path not in found:
        close = difflib.get_close_matches(path, found, 3) or list(found)[:3]
        raise InspectError(
            f"inspect: no module {path!r} with a forward of its own. Expected a module path, such as "
            f"{', '.join(repr(name) for name in close)}."
        )
    module, state = found[path]
    if not state.variants:
        opaque = next((o for o in coverage(model).opaque if o.path == path), None)
        why = f"it stays Python: {opaque.reason} at {short_where(opaque.where)}" if opaque else "it has not run yet"
        raise InspectError(f"inspect: '{path or 'the model'}' has no captured graph: {why}.")
    pairs: dict[tuple[str, str], list[str]] = {}
    for variant in state.variants:
        pair = graph_text(without_quantizers(variant.graph)), graph_text(variant.graph)
        pairs.setdefault(pair, []).append("train" if variant.training else "eval")
    title = f"{path or 'the model'} ({type(module).__name__})"
    nothing = _nothing_inserted(path, found)
    diffs = [
        _unified(before, after, f"{title}, {' and '.join(dict.fromkeys(modes))}", nothing)
        for (before, after), modes in pairs.items()
    ]
    return RewrittenCode(path, tuple(b for b, _ in pairs), tuple(a for _, a in pairs), "\n\n".join(diffs))


def _nothing_inserted(path: str, found: Mapping[str, Any]) -> str:
    """What stands above the code of a module that calls no quantizer itself: which modules in it do."""
    inner = [
        name
        for name, (_, state) in found.items()
        if (not path or name.startswith(f"{path}.")) and any(map(is_quantizer, _nodes(state)))
    ]
    if not inner:
        return "nothing inserted"
    more = f" and {len(inner) - SHOWN} more" if len(inner) > SHOWN else ""
    return f"nothing inserted but in {', '.join(inner[:SHOWN])}{more}"


def _nodes(state: Any) -> Iterator[fx.Node]:
    return (node for variant in state.variants for node in variant.graph.nodes)


def _unified(before: str, after: str, title: str, nothing: str) -> str:
    """The whole code, so that every change stands below its line of the user's file."""
    old, new = before.splitlines(), after.splitlines()
    lines = difflib.unified_diff(old, new, f"{title}, before", f"{title}, after", lineterm="", n=len(old) + len(new))
    return "\n".join(lines) or f"# {title}: {nothing}\n{after}"


def _style(line: str) -> str:
    return next((style for start, style in STYLES.items() if line.startswith(start)), "")
