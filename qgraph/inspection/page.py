"""Puts the HTML page of a model together: one file with its data, its scripts and the libraries they use."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraph.inspection.beside import written
from qgraph.version import __version__

if TYPE_CHECKING:
    from qgraph.inspection.summary import Inspection

__all__ = ["page", "write_page"]

LIBRARIES = ("cytoscape", "dagre", "d3-hierarchy")
SCRIPTS = (
    "format.js",
    "model.js",
    "layout.js",
    "graph.js",
    "tree.js",
    "treemap.js",
    "histogram.js",
    "panel.js",
    "app.js",
)


def write_page(inspection: Inspection, path: Path) -> Path:
    """Write the page; it is there whole or not at all."""
    from qgraph.inspection.view import view

    text = page(view(inspection))
    return written(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def page(data: dict[str, Any]) -> str:
    """The page that shows `data`, which is what `view` returns.

    Nothing in the data can end its element or start another: ``<``, ``>`` and ``&`` are written as escapes of JSON.
    The policy in the page allows its own scripts, by their hashes, and no connection at all.
    """
    folder = resources.files("qgraph.inspection") / "html"

    def read(*parts: str) -> str:
        return folder.joinpath(*parts).read_text(encoding="utf-8")

    scripts: list[str] = []
    hashes: list[str] = []
    for name in LIBRARIES:
        notice = read("vendor", f"{name}.LICENSE").replace("--", "- -")
        scripts.append(f"<!-- {name}\n{notice}-->\n{_script(read('vendor', f'{name}.min.js'), hashes)}")
    scripts += [_script(read(name), hashes) for name in SCRIPTS]
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; "
        f"img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    name = data["boxes"][0]["name"]
    values = {
        "policy": html.escape(policy, quote=True).replace("&#x27;", "'"),
        "version": __version__,
        "title": html.escape(f"{name} - qgraph"),
        "name": html.escape(name),
        "style": read("style.css"),
        "data": embedded(data),
        "scripts": "\n".join(scripts),
    }
    first, *rest = read("page.html").split("{{")
    filled = [first]
    for part in rest:  # each place once, so that a name in the data is no place
        key, _, after = part.partition("}}")
        filled += [values[key], after]
    return "".join(filled)


def embedded(data: Any) -> str:
    """JSON that may stand inside a script element, whatever its strings hold."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script(text: str, hashes: list[str]) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    hashes.append(f"'sha256-{digest}'")
    return f"<script>{text}</script>"
