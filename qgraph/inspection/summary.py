"""`inspect`: what a model, a prepared model or an .onnx file holds, layer by layer, as text and as data."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qgraph.errors import InspectError
from qgraph.graph import STATE, Coverage, coverage, is_prepared, states
from qgraph.inspection.code import model_graphs
from qgraph.inspection.eager import eager_coverage, eager_layers
from qgraph.inspection.floats import float_parameters
from qgraph.inspection.layers import FloatTensor, Layer, Totals
from qgraph.inspection.prepared import in_order_of_use, prepared_layers

if TYPE_CHECKING:
    import networkx

    from qgraph.inspection.rewritten import PassRecord, RewrittenCode
    from qgraph.pipeline import Note


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Inspection:
    """What `inspect` found; `print` it.

    Parameters
    ----------
    kind : str
        ``eager``, ``prepared`` or ``onnx``.
    title : str
    layers : tuple of Layer
        One a weight of a site, in the order of use as far as it is known.
    floats : tuple of FloatTensor
        Parameters that no site covers, with the reason.
    coverage : Coverage
        Modules captured and opaque, sites, sites quantized, guard misses.
    notes : tuple of Note
        What the passes said, each once.
    remarks : tuple of str
        Lines about a file.
    file_bytes : int or None
        What a file takes, external data included.
    parameter_bytes : int or None
        What a model's parameters take, each once.
    """

    kind: str
    title: str
    layers: tuple[Layer, ...]
    floats: tuple[FloatTensor, ...]
    coverage: Coverage
    notes: tuple[Note, ...] = ()
    remarks: tuple[str, ...] = ()
    file_bytes: int | None = None
    parameter_bytes: int | None = None
    source: nn.Module | Path | None = None

    @functools.cached_property
    def totals(self) -> Totals:
        """Sums over the layers and float tensors."""
        return Totals.of(self.layers, self.floats, self.parameter_bytes)

    @property
    def first(self) -> Layer | None:
        """The first layer in the order of use."""
        return self.layers[0] if self.layers else None

    @property
    def last(self) -> Layer | None:
        """The last layer in the order of use."""
        return self.layers[-1] if self.layers else None

    @functools.cached_property
    def graphs(self) -> dict[str, str]:
        """Module path -> its captured graphs as readable code, with mode, guards, and the user's lines."""
        prepared = isinstance(self.source, nn.Module) and is_prepared(self.source)
        return model_graphs(self.source) if prepared else {}  # type: ignore[arg-type]

    def code(self, path: str) -> RewrittenCode:
        """The captured code of one module before and after the rewrite as a unified diff; `print` it.

        Parameters
        ----------
        path : str
            Module path, such as ``encoder.0``; "" is the model itself.

        Raises
        ------
        InspectError
            For a model that is not prepared, a file, or a module that has no captured graph.
        """
        from qgraph.inspection.rewritten import rewritten_code

        return rewritten_code(self._prepared_source("code"), path)

    @property
    def passes(self) -> tuple[PassRecord, ...]:
        """What each pass did, site by site, with the seconds that it took over all graphs."""
        from qgraph.inspection.rewritten import pass_records

        return pass_records(self._prepared_source("passes"))

    def _prepared_source(self, what: str) -> nn.Module:
        if isinstance(self.source, nn.Module) and is_prepared(self.source):
            return self.source
        raise InspectError(f"inspect: {self.title} has no {what}. Expected a model that qgraph.prepare returned.")

    def to_networkx(self) -> networkx.DiGraph:
        """The whole model as one graph: operations and parameters as nodes, data flow as edges.

        The attributes of nodes are a table in ``docs/inspect.md``.

        Raises
        ------
        InspectError
            For a model of which nothing is captured.
        """
        from qgraph.inspection.annotate import annotate

        if isinstance(self.source, nn.Module):
            from qgraph.inspection.network import model_network

            network = model_network(self.source)
        else:
            from qgraph.inspection.onnx_network import onnx_network

            assert self.source is not None
            network = onnx_network(self.source, self.layers)
        annotate(network, self.layers, self.floats)
        return network

    def to_graphml(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_networkx` as GraphML, for Gephi, yEd or igraph; returns the path."""
        from qgraph.inspection.graph_files import write_graphml

        return write_graphml(self.to_networkx(), Path(path))

    def to_dot(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_networkx` as DOT, for Graphviz, coloured by bits; needs pydot. Returns the path."""
        from qgraph.inspection.graph_files import write_dot

        return write_dot(self.to_networkx(), Path(path))

    def to_node_link(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_networkx` as JSON for `networkx.node_link_graph(data, edges="links")`; returns the path."""
        from qgraph.inspection.graph_files import write_node_link

        return write_node_link(self.to_networkx(), Path(path))

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one HTML file that shows the model in a browser, without a network; returns its path.

        It has the module hierarchy, the data flow, each weight before and after quantization, and where the bytes
        are. The file is written beside and renamed.

        Parameters
        ----------
        path : str or Path

        Raises
        ------
        InspectError
            When the folder does not exist.
        """
        from qgraph.inspection.page import write_page

        return write_page(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "kind": self.kind,
            "title": self.title,
            "layers": [layer.to_dict() for layer in self.layers],
            "floats": [item.to_dict() for item in self.floats],
            "totals": self.totals.to_dict(),
            "first": self.first.site if self.first else None,
            "last": self.last.site if self.last else None,
            "coverage": {
                **dataclasses.asdict(self.coverage),
                "opaque": [dataclasses.asdict(module) for module in self.coverage.opaque],
            },
            "notes": [dataclasses.asdict(note) for note in self.notes],
            "remarks": list(self.remarks),
            "file_bytes": self.file_bytes,
            "graphs": dict(self.graphs),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def text(self, width: int | None = None) -> str:
        """What `print` shows, in a given width; None is that of the terminal."""
        from qgraph.inspection.table import render

        return render(self, width)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:  # what a notebook shows
        return self.text()


def inspect(model_or_path: nn.Module | str | os.PathLike[str]) -> Inspection:
    """What is in a model or a file: sites, specs, sizes, errors, what stays float, what was not captured.

    Nothing of the model changes: modes, gradients, buffers and random states are as before.

    Parameters
    ----------
    model_or_path : nn.Module, str or Path
        An eager model, a prepared one, or the path of an .onnx file.

    Returns
    -------
    Inspection

    Raises
    ------
    InspectError
        For anything else, for a file that is not there, and for one that is no ONNX model.

    Examples
    --------
    >>> print(qgraph.inspect(prepared))
    """
    if isinstance(model_or_path, nn.Module):
        model = _prepared_inside(model_or_path)
        return _prepared(model) if is_prepared(model) else _eager(model)
    if isinstance(model_or_path, (str, os.PathLike)):
        return _file(Path(model_or_path))
    raise InspectError(
        f"inspect: found {type(model_or_path).__name__}. Expected a torch.nn.Module or the path of an .onnx "
        f"file; pass the model object itself."
    )


def _prepared_inside(model: nn.Module) -> nn.Module:
    """The prepared model that a wrapper (torch.compile, data parallel, a trainer) holds, or `model` itself."""
    if is_prepared(model):
        return model
    roots = {path: module for path, module, state in states(model) if not state.path}
    if len(roots) > 1:
        raise InspectError(
            f"inspect: {type(model).__name__} holds {len(roots)} prepared models, at {', '.join(roots)}. "
            f"Expected one; inspect each of them."
        )
    return next(iter(roots.values()), model)


def _eager(model: nn.Module) -> Inspection:
    layers, floats = eager_layers(model)
    title = f"{type(model).__name__}: not prepared, everything is float"
    return Inspection(
        "eager",
        title,
        tuple(layers),
        tuple(floats),
        eager_coverage(model, layers),
        parameter_bytes=_parameter_bytes(model),
        source=model,
    )


def _prepared(model: nn.Module) -> Inspection:
    shared = model.__dict__[STATE].shared if STATE in model.__dict__ else None
    assert shared is not None
    layers, covered = prepared_layers(model)
    layers = in_order_of_use(model, layers)
    found = coverage(model)
    if len(layers) != found.sites:  # layers that stand ready and were not run yet count as sites
        quantized = sum(layer.quantized for layer in layers)
        found = dataclasses.replace(found, sites=len(layers), sites_quantized=quantized)
    title = f"{shared.model_name or type(model).__name__}: prepared with {shared.config}"
    if path := model.__dict__[STATE].path:
        title = f"{path} ({type(model).__name__}) of {title}"
    return Inspection(
        "prepared",
        title,
        tuple(layers),
        tuple(float_parameters(model, covered)),
        found,
        tuple(dict.fromkeys(shared.notes)),
        parameter_bytes=_parameter_bytes(model),
        source=model,
    )


def _parameter_bytes(model: nn.Module) -> int:
    named = [(name, p) for name, p in model.named_parameters() if "qgraph" not in name.split(".")]
    return sum(p.numel() * p.element_size() for _, p in named if not nn.parameter.is_lazy(p))


def _file(path: Path) -> Inspection:
    from qgraph.inspection.onnx_file import read_onnx

    found = read_onnx(path)
    return Inspection(
        "onnx",
        found.title,
        tuple(found.layers),
        tuple(found.floats),
        found.coverage,
        remarks=tuple(found.notes),
        file_bytes=found.file_bytes,
        source=path,
    )
