"""How a rule names parts of a model: matching, near misses, and its form as plain data."""

import difflib
import fnmatch
import re
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from qgraph.errors import ConfigError

__all__ = ["check_match", "describe", "match_from_data", "match_to_data", "matches", "near", "no_match"]


def check_match(match: Any) -> None:
    """Raise ConfigError for what is no glob, regular expression, module class or predicate."""
    is_class = isinstance(match, type)
    if is_class and not issubclass(match, nn.Module):
        raise ConfigError(f"Rule: {match.__name__} is a class, but not of modules; expected a subclass of nn.Module.")
    if not is_class and not isinstance(match, str | re.Pattern) and not callable(match):
        raise ConfigError(
            f"Rule: match is a glob, a compiled regular expression, a module class or a predicate "
            f"(path, module) -> bool, found {match!r}."
        )


def matches(match: Any, path: str, module: nn.Module) -> bool:
    """Whether `match` names this module, or by path one that holds it."""
    if isinstance(match, str):
        return any(fnmatch.fnmatchcase(prefix, match) for prefix in _prefixes(path))
    if isinstance(match, re.Pattern):
        return any(match.search(prefix) is not None for prefix in _prefixes(path))
    if isinstance(match, type):
        return isinstance(module, match)
    return bool(match(path, module))


def describe(match: Any) -> str:
    """The match as a user would write it."""
    if isinstance(match, str):
        return repr(match)
    if isinstance(match, re.Pattern):
        return f"re.compile({match.pattern!r})"
    return getattr(match, "__qualname__", repr(match))


def no_match(match: Any, modules: Sequence[tuple[str, nn.Module]]) -> str:
    """The message for a rule that matches nothing, with the names that are nearest."""
    if isinstance(match, type):
        kinds = sorted({type(module).__name__ for _, module in modules})
        return f"rule {describe(match)}: no module of the model is one{near(match.__name__, kinds)}."
    if isinstance(match, str | re.Pattern):
        text = match if isinstance(match, str) else match.pattern
        return f"rule {describe(match)}: no module path of the model matches{_near_paths(text, modules)}."
    return f"rule {describe(match)}: the predicate is false for all {len(modules)} modules of the model."


def near(name: str, names: Sequence[str]) -> str:
    """`; did you mean 'a' or 'b'?` without the question mark, or `; there are ...`, or nothing."""
    found = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if found:
        return f"; did you mean {' or '.join(map(repr, found))}"
    return f"; there are {', '.join(names[:8])}" + (", ..." if len(names) > 8 else "") if names else ""


def match_to_data(match: Any) -> Any:
    """A glob as text, a regular expression as `{"regex": ...}`, a class as `{"type": "module:QualName"}`."""
    if isinstance(match, str):
        return match
    if isinstance(match, re.Pattern):
        flags = match.flags & ~re.UNICODE  # every text pattern carries it
        return {"regex": match.pattern, **({"flags": int(flags)} if flags else {})}
    if isinstance(match, type):
        name = f"{match.__module__}:{match.__qualname__}"
        if _find_class(name) is not match:
            raise ConfigError(f"rule {describe(match)}: {name} cannot be found again; move the class to module level.")
        return {"type": name}
    raise ConfigError(
        f"rule {describe(match)}: a predicate is code and has no text form; "
        "write the rule as a glob, a regular expression or a class to save this config."
    )


def match_from_data(data: Any) -> Any:
    """The inverse of `match_to_data`. It imports nothing: a class must be loaded already."""
    if isinstance(data, str):
        return data
    if isinstance(data, dict) and {"regex"} <= set(data) <= {"regex", "flags"}:
        try:
            return re.compile(data["regex"], data.get("flags", 0))
        except (re.error, TypeError, ValueError) as error:
            raise ConfigError(f"rule {data!r}: not a regular expression: {error}.") from error
    if isinstance(data, dict) and set(data) == {"type"}:
        found = _find_class(str(data["type"]))
        if found is None:
            raise ConfigError(f"rule {data['type']!r}: no such class is loaded; import its module first.")
        return found
    raise ConfigError(f"rule {data!r}: expected a glob, {{'regex': ...}} or {{'type': 'module:QualName'}}.")


def _prefixes(path: str) -> list[str]:
    """The path of a module and of every module above it, the root (an empty path) only for itself."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _near_paths(text: str, modules: Sequence[tuple[str, nn.Module]]) -> str:
    paths = [path for path, _ in modules if path]
    found = difflib.get_close_matches(text, paths, n=3, cutoff=0.5)
    if not found:  # `*.atention` is near no whole path, but its last part is near the last part of some
        tail = text.split(".")[-1].strip("*^$\\")
        leaves = {path.split(".")[-1]: path for path in reversed(paths)}
        found = [leaves[name] for name in difflib.get_close_matches(tail, list(leaves), n=3, cutoff=0.5)]
    if found:
        return f"; did you mean {' or '.join(map(repr, found))}"
    return near(text, paths)


def _find_class(name: str) -> type[nn.Module] | None:
    module_name, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module_name)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None
