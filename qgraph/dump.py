"""`prepare(..., dump_dir=...)`: every captured graph as text and JSON, as captured and after each pass."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from torch import fx

__all__ = ["Dump"]


class Dump:
    """Writes graphs into one folder, numbered: ``0003-layers.0-eval-2-quantize-weights.txt`` and ``.json``.

    The first number is that of the graph, in the order of capture; the second that of the pass, 0 for the graph as it
    was captured. Files of an earlier run are written over.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.graphs = 0

    def __deepcopy__(self, memo: Any) -> Dump:
        return self  # copies of a model go on with the numbers

    def begin(self, path: str, training: bool, graph: fx.Graph) -> str:
        """Write a graph as it was captured; returns what the names of its files begin with."""
        with _numbering:
            self.graphs += 1
            number = self.graphs
        name = re.sub(r"[^\w.\[\]-]", "_", path) or "model"
        prefix = f"{number:04d}-{name}-{'train' if training else 'eval'}"
        self.write(prefix, 0, "captured", path, graph, 0.0)
        return prefix

    def write(self, prefix: str, step: int, pass_name: str, path: str, graph: fx.Graph, seconds: float) -> None:
        """Write a graph after a pass."""
        from qgraph.inspection.code import graph_text

        file = self.folder / f"{prefix}-{step}-{pass_name}"
        file.with_name(f"{file.name}.txt").write_text(f"{graph_text(graph)}\n")
        data = {"module": path, "pass": pass_name, "seconds": seconds, "nodes": [_node(node) for node in graph.nodes]}
        file.with_name(f"{file.name}.json").write_text(json.dumps(data, indent=1))


_numbering = threading.Lock()


def _node(node: fx.Node) -> dict[str, Any]:
    meta: dict[str, Any] = {
        key: str(node.meta[key]) for key in ("where", "source", "dtype", "qgraph") if key in node.meta
    }
    return {
        "name": node.name,
        "op": node.op,
        "target": node.target if isinstance(node.target, str) else fx.node._get_qualified_name(node.target),
        "args": [str(arg) for arg in node.args],
        "kwargs": {key: str(value) for key, value in node.kwargs.items()},
        "inputs": [source.name for source in node.all_input_nodes],
        "shape": list(node.meta["shape"]) if "shape" in node.meta else None,
        **meta,
    }
