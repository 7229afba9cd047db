"""Captured graphs as text that reads like the user's own code: torch.fx's code without its noise."""

from __future__ import annotations

import os
import re
from typing import Any

from torch import fx, nn

from qgraph.capture.names import python_code
from qgraph.graph import states

_RELEASE = re.compile(r";\s+(?:\w+ = )+None\s*$")
_ASSIGNED = re.compile(r"^\s*(\w+)(?:\s*:[^=]+)? = ")
_NUMBERED = re.compile(r'getattr\((self[\w.\[\]]*), "(\d+)"\)')
_SETITEM = re.compile(r"^(\s*(\w+)\[.*\] = .*);\s+\w+ = \2$")
_INDEX = re.compile(r"\[\((.*?)\)\](?=$| = )")
_CHECK = re.compile(r"^(\s*)\w+ = qgraph_capture_(?:guards|recorder)_(check(?:_structure)?)\((.*)\)$")
_APPLY = re.compile(r"qgraph_capture_calls_(\w+)_apply\(")
_SLICE = re.compile(r"slice\(([^(),]+), ([^(),]+), ([^(),]+)\)")
_WORD = re.compile(r"(?<![\w.'\"])\w+")
_KEYWORD = re.compile(r"(?<=[(, ])(\w+) = ")
_COMPARED = re.compile(r" = (\w+)\.__(eq|ne|lt|le|gt|ge|and|or|xor)__\((\w+|[-\d.]+)\)$")
_OPERATORS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "and": "&",
    "or": "|",
    "xor": "^",
}
_NAMESPACES = (
    ("torch.nn.functional.", "F."),
    ("torch._C._nn.", "F."),
    ("torch.functional.", "torch."),
    ("torch._VF.", "torch."),
)


def graph_text(graph: fx.Graph, *, where: bool = True) -> str:
    """One graph as Python text: ``forward(self, ...)`` with the names of the user's own variables.

    Parameters
    ----------
    graph : fx.Graph
    where : bool
        Put a comment with file and line before the operations of each line of the user's code.
    """
    nodes = {node.name: node for node in graph.nodes}
    renamed = _renamed(graph)
    aliases = {f"{new} = {old}" for new, old in renamed.items()}
    lines: list[str] = []
    last = ""
    for line in python_code(graph).src.splitlines():
        if not line.strip() or _RELEASE.sub("", line).strip() in aliases:
            continue
        found = _ASSIGNED.match(line)
        node = nodes.get(found.group(1)) if found else None
        place = short_where(node.meta.get("where", "")) if node is not None and where else ""
        if place and place != last:
            lines.append(f"    # {place}")
            last = place
        line = tidy(line)
        lines.append(_with_names(line, renamed))
    return "\n".join(lines)


def _renamed(graph: fx.Graph) -> dict[str, str]:
    """Arguments that torch.fx gave another name (``input_1`` for ``input``), and the user's own."""
    taken = {node.name for node in graph.nodes}
    return {
        node.name: str(node.target)
        for node in graph.nodes
        if node.op == "placeholder" and node.name != node.target and node.target not in taken
    }


def _with_names(text: str, names: dict[str, str]) -> str:
    return _WORD.sub(lambda m: names.get(m.group(), m.group()), text) if names else text


def tidy(line: str) -> str:
    """One line of torch.fx's code without what only the interpreter needs."""
    line = _SETITEM.sub(r"\1", _RELEASE.sub("", line).rstrip())
    check = _CHECK.match(line)
    if check:
        value = check.group(3).rpartition(", '")[0] or check.group(3)
        value = value.partition(", (")[0] if check.group(2) == "check_structure" else value
        return f"{check.group(1)}{check.group(2)}({value})"
    line = _APPLY.sub(r"\1.apply(", line)
    for long, short in _NAMESPACES:
        line = line.replace(long, short)
    line = line.replace("device(type='cpu')", "'cpu'")
    while (shorter := _NUMBERED.sub(r"\1[\2]", line)) != line:
        line = shorter
    name, equals, rest = line.partition(" = ")
    line = name + equals + _KEYWORD.sub(r"\1=", rest)
    line = _COMPARED.sub(lambda m: f" = {m[1]} {_OPERATORS[m[2]]} {m[3]}", line)
    if "slice(" in line:
        line = _INDEX.sub(lambda m: f"[{_SLICE.sub(_slice, m.group(1)).rstrip(',')}]", line)
        line = re.sub(r"\[slice\(([^()]*)\)\](?=$| = )", lambda m: f"[{_slice(m)}]", line)
    return line


def model_graphs(model: nn.Module) -> dict[str, str]:
    """The captured graphs of each module of a prepared model, by path; "" is the model itself."""
    result = {}
    for _, module, state in states(model):
        if state.variants:
            kind = type(module).__name__
            result[state.path] = _texts(state.path or "the model", kind, state.variants)
    return result


def _texts(path: str, kind: str, variants: list[Any]) -> str:
    """Every variant of a module; those that differ in mode alone are one text."""
    modes: dict[str, list[str]] = {}
    for variant in variants:
        modes.setdefault(_variant_text(variant), []).append("train" if variant.training else "eval")
    return "\n\n".join(
        f"# {path} ({kind}), {' and '.join(dict.fromkeys(found))}\n{text}" for text, found in modes.items()
    )


def short_where(where: str) -> str:
    """A file and line for people: relative to the working folder, or the file's last two parts."""
    if not where or where.startswith("<"):
        return ""
    file, _, line = where.rpartition(":")
    here = os.getcwd() + os.sep
    if file.startswith(here):
        return where[len(here) :]
    return f"{os.sep.join(file.split(os.sep)[-2:])}:{line}"


def _variant_text(variant: Any) -> str:
    lines = []
    names = _renamed(variant.graph)
    for guard in variant.guards:
        place = short_where(guard.where)
        lines.append(f"# holds while {_with_names(guard.source, names)}" + (f"  ({place})" if place else ""))
    if variant.late_guards:
        lines.append(f"# and while its checks hold: {variant.late_guards}")
    return "\n".join([*lines, graph_text(variant.graph)])


def _slice(found: re.Match[str]) -> str:
    parts = [part.strip() for part in found.group(0).strip("[]").removeprefix("slice(")[:-1].split(",")]
    start, stop, step = ("" if part == "None" else part for part in parts)
    return f"{start}:{stop}" + (f":{step}" if step else "")
