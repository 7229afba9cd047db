"""`ExportReport`: what is in an exported file, layer by layer, as a table, as data, and read back from the
file itself.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from rich.table import Table

from qgraph.config import QuantSpec
from qgraph.errors import InspectError
from qgraph.exporters.packing import shares
from qgraph.terminal import as_text

LAYERS, CONFIG, VERSION, TARGET, BITS, DYNAMIC, LEFTOVERS = (
    f"qgraph.{key}" for key in ("layers", "config", "version", "target", "bits_per_weight", "dynamic", "leftovers")
)

LONGEST = 2**26  # bytes that compressed metadata is taken for
PARTS = ("packed", "mask", "scale", "zero_point")  # initializers of one weight, `<site>.<part>`
UNPACKED = "unpacked"  # and of one that is stored as runtimes hold it, `<site>.unpacked`, `<site>.unpacked_1` ..
PREUNPACKED = "qgraph.packed_bytes"  # in the metadata of a file of such weights: what they would take packed


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One quantized site.

    `bytes` counts codes, scales and zero points where they are stored, 0 where `shared_with` names another
    layer; `max_difference` is that of the layer's output against torch on the same inputs, relative to the
    largest value (None: not measured); `axis` is the dimension of the output channels. `stack` is the name under which
    it is stored together with others, rows under rows in the order of the layers.
    """

    path: str
    operand: str
    op: str
    shape: tuple[int, ...]
    spec: QuantSpec | None
    groups: str
    format: str
    bytes: int
    form: str
    activation: QuantSpec | None = None
    sparsity: str | None = None
    shared_with: str | None = None
    max_difference: float | None = None
    notes: tuple[str, ...] = ()
    axis: int = 0
    stack: str | None = None

    @property
    def bits(self) -> float | None:
        """Width of the weight's codes; None for a weight that is pruned only, or a site without a weight."""
        return None if self.spec is None else self.spec.bits

    @property
    def numel(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count if self.shape else 0


def site_of(layer: LayerReport) -> str:
    """The name of its parameter, or of its operand."""
    return f"{layer.path}.{layer.operand}" if layer.path else layer.operand


@dataclass(frozen=True, slots=True)
class Leftover:
    """A float tensor that the file holds as it is."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What `qgraph.export` wrote and checked; `print` it.

    `ideal_bytes` are codes, scales, zero points and float leftovers alone; `file_bytes` is what the file takes.
    `packed_bytes` is None but for a file with ``preunpacked=True``: what its weights would take packed, where the other
    figures are of what is stored. `max_difference` is relative to the largest output; `flips` counts activation codes
    on a rounding tie that onnxruntime and torch round apart.
    """

    path: str
    target: str
    config: str
    layers: tuple[LayerReport, ...]
    leftovers: tuple[Leftover, ...]
    dynamic: tuple[str, ...]
    file_bytes: int
    ideal_bytes: int
    bits_per_weight: float
    packed_bytes: int | None = None
    max_difference: float | None = None
    flips: int = 0
    verified: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = dataclasses.asdict(self)
        for layer, source in zip(data["layers"], self.layers, strict=True):
            layer["bits"] = source.bits
        return data

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield self._table()
        yield from self._lines()

    def __str__(self) -> str:
        return as_text(self, 150)

    def _table(self) -> Table:
        table = Table(title=f"{self.path} ({self.target}, {self.config})", title_justify="left", expand=False)
        for heading in ("layer", "op", "weight", "groups", "activation", "bytes", "form in the file", "max diff"):
            number = heading in ("bytes", "max diff")
            table.add_column(heading, justify="right" if number else "left", overflow="fold")
        for layer in self.layers:
            table.add_row(*_cells(layer))
        return table

    def _lines(self) -> list[str]:
        lines = [
            f"file {self.file_bytes:,} bytes, of which codes, scales and float tensors {self.ideal_bytes:,}; "
            f"{self.bits_per_weight:.3f} bits per quantized weight",
            "dynamic sizes: " + ("; ".join(self.dynamic) or "none, the file takes the example's sizes alone"),
        ]
        if self.packed_bytes is not None:
            stored = sum(layer.bytes for layer in self.layers)
            lines.append(f"weights unpacked, as a runtime holds them: {stored:,} bytes; packed {self.packed_bytes:,}")
        if self.max_difference is None:
            lines.append("not verified")
        else:
            ties = f"; {self.flips} activation codes on a rounding tie went the other way" if self.flips else ""
            lines.append(f"largest difference from torch {self.max_difference:.1e} ({', '.join(self.verified)}){ties}")
        if self.leftovers:
            total = sum(item.bytes for item in self.leftovers)
            lines.append(f"left float: {len(self.leftovers)} tensors, {total:,} bytes")
            lines += [f"  {item.name}: {item.bytes:,} bytes, {item.reason}" for item in _largest(self.leftovers)]
        if self.dropped:
            lines.append("outputs that are no tensors, left out: " + ", ".join(self.dropped))
        lines += [f"note: {note}" for note in self.notes]
        return lines


def metadata(
    report: ExportReport,
    version: str,
    merged: Mapping[str, Sequence[str]] | None = None,
    nodes: Sequence[str | None] = (),
) -> dict[str, str]:
    """What the file says about itself, for `metadata_props`.

    Parameters
    ----------
    merged : mapping, optional
        Of a file that is small for its many layers: initializers that hold several float vectors -> their names. What
        it says of its tensors is compressed then, and
    nodes : sequence of str or None
        The names of its nodes, which have none in the graph.
    """
    specs: list[dict[str, Any]] = []

    def index(spec: QuantSpec | None) -> int | None:
        if spec is None:
            return None
        data = {
            field.name: getattr(spec, field.name)
            for field in dataclasses.fields(spec)
            if getattr(spec, field.name) != field.default
        }
        if data not in specs:
            specs.append(data)
        return specs.index(data)

    kinds: list[dict[str, Any]] = []
    rows = []
    for layer in report.layers:  # what layers have in common is said once: in a small file the metadata counts
        kind = {
            "operand": layer.operand,
            "op": layer.op,
            "weight": index(layer.spec),
            "activation": index(layer.activation),
            "groups": layer.groups,
            "axis": layer.axis or None,
            "format": layer.format,
            "form": layer.form,
            "sparsity": layer.sparsity,
            "shared_with": layer.shared_with,
            "stack": layer.stack,
        }
        kind = {key: value for key, value in kind.items() if value not in (None, "")}
        if kind not in kinds:
            kinds.append(kind)
        rows.append([layer.path, kinds.index(kind), *layer.shape])
    leftovers: dict[str, list[str]] = {}
    for item in report.leftovers:
        leftovers.setdefault(item.reason, []).append(item.name)
    content = {"specs": specs, "kinds": kinds, "layers": rows}
    if merged is None:
        tensors = {LAYERS: _json(content), LEFTOVERS: _json(leftovers)}
    else:
        everywhere = list(itertools.chain(*leftovers.values()))
        places = {whole: list(map(everywhere.index, names)) for whole, names in merged.items()}
        steps = {whole: [b - a for a, b in itertools.pairwise([0, *found])] for whole, found in places.items()}
        content |= {"leftovers": leftovers, "merged": steps, "nodes": [name or "" for name in nodes]}
        tensors = {LAYERS: _compressed(_json(_names_of(content, relative)))}
    unpacked = {} if report.packed_bytes is None else {PREUNPACKED: str(report.packed_bytes)}
    return {
        **unpacked,
        VERSION: version,
        CONFIG: report.config,
        TARGET: report.target,
        BITS: f"{report.bits_per_weight:.4f}",
        DYNAMIC: _json(report.dynamic),
        **tensors,
    }


def content_of(model: onnx.ModelProto) -> dict[str, Any]:
    """What a file of ours says of its tensors: "specs", "kinds", "layers" and "leftovers".

    And "merged" and "nodes" where short vectors are together and nodes have their names here alone.
    """
    found = {item.key: item.value for item in model.metadata_props}
    if LAYERS not in found:
        return {}
    if LEFTOVERS in found:
        return {**json.loads(found[LAYERS]), "leftovers": json.loads(found[LEFTOVERS])}
    content = _names_of(json.loads(_decompressed(found[LAYERS])), absolute)
    everywhere = list(itertools.chain(*content["leftovers"].values()))
    merged = content["merged"].items()
    content["merged"] = {whole: [everywhere[i] for i in itertools.accumulate(steps)] for whole, steps in merged}
    return content


def _names_of(content: dict[str, Any], convert: Callable[[Sequence[str]], list[str]]) -> dict[str, Any]:
    """The content with each list of names converted."""
    paths = convert([path for path, *_ in content["layers"]])
    return {
        **content,
        "layers": [[path, *rest] for path, (_, *rest) in zip(paths, content["layers"], strict=True)],
        "leftovers": {why: convert(names) for why, names in content["leftovers"].items()},
        "nodes": convert(content["nodes"]),
    }


def relative(names: Sequence[str]) -> list[str]:
    """Names, each as how many parts it begins with of the last one that is not empty, and the rest of its parts.

    What then is said of one layer of a model is said of the next in the same words, which compresses well.

    Example
    -------
    >>> relative(["a.0.fc.weight", "a.0.fc.bias", "a.1.fc.weight"])
    ['0.a.0.fc.weight', '3.bias', '1.1.fc.weight']
    """
    found, before = [], list[str]()
    for name in names:
        parts = name.split(".")
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(parts, before, strict=False)))
        found.append(".".join([str(same), *parts[same:]]) if name else "")
        before = parts if name else before
    return found


def absolute(names: Sequence[str]) -> list[str]:
    """The inverse of `relative`."""
    found, before = [], list[str]()
    for name in names:
        same, *parts = name.split(".")
        before = before[: int(same)] + parts if name else before
        found.append(".".join(before) if name else "")
    return found


def _json(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))


def _compressed(text: str) -> str:
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def _decompressed(text: str) -> bytes:
    return zlib.decompressobj().decompress(base64.b85decode(text), LONGEST)


def read_report(path: str | Path) -> ExportReport:
    """What a file written by `qgraph.export` says about itself; needs no runtime.

    Raises
    ------
    InspectError
        When it is no ONNX file, or not one of ours.
    """
    path = Path(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise InspectError(f"{path}: not an ONNX file ({error}); expected one written by qgraph.export") from error
    found = {item.key: item.value for item in model.metadata_props}
    if LAYERS not in found:
        raise InspectError(
            f"{path}: found no {LAYERS!r} in its metadata; expected a file written by qgraph.export; export it again"
        )
    try:
        return _read(path, model, found)
    except Exception as error:  # whatever damaged text makes of itself
        raise InspectError(
            f"{path}: its metadata cannot be read ({type(error).__name__}: {error}); expected what qgraph.export "
            "wrote; the file is damaged: export it again"
        ) from error


def _read(path: Path, model: onnx.ModelProto, found: Mapping[str, str]) -> ExportReport:
    content = content_of(model)
    specs = [QuantSpec(**spec) for spec in content["specs"]]
    sizes = {item.name: _nbytes(item) for item in model.graph.initializer}
    for whole, names in content.get("merged", {}).items():
        sizes |= dict.fromkeys(names, sizes.get(whole, 0) // len(names))
    leftovers = tuple(
        Leftover(name, sizes.get(name, 0), why) for why, names in content["leftovers"].items() for name in names
    )
    layers = _with_shares(
        [_layer(path, shape, content["kinds"][kind], specs, sizes) for path, kind, *shape in content["layers"]], sizes
    )
    data = path.with_name(f"{path.name}.data")
    return ExportReport(
        path=str(path),
        target=found[TARGET],
        config=found[CONFIG],
        layers=layers,
        leftovers=leftovers,
        dynamic=tuple(json.loads(found[DYNAMIC])),
        file_bytes=path.stat().st_size + (data.stat().st_size if data.exists() else 0),
        ideal_bytes=sum(layer.bytes for layer in layers) + sum(item.bytes for item in leftovers),
        bits_per_weight=float(found[BITS]),
        packed_bytes=int(found[PREUNPACKED]) if PREUNPACKED in found else None,
        inputs=tuple(value.name for value in model.graph.input),
        outputs=tuple(value.name for value in model.graph.output),
    )


def _layer(
    path: str, shape: list[int], kind: Mapping[str, Any], specs: Sequence[QuantSpec], sizes: Mapping[str, int]
) -> LayerReport:
    def spec(key: str) -> QuantSpec | None:
        return None if key not in kind else specs[kind[key]]

    if any(not isinstance(size, int) or size < 0 for size in shape):
        raise ValueError(f"found shape {shape}")
    site = f"{path}.{kind['operand']}" if path else kind["operand"]
    return LayerReport(
        path=path,
        operand=kind["operand"],
        op=kind.get("op", ""),
        shape=tuple(shape),
        spec=spec("weight"),
        groups=kind.get("groups", ""),
        axis=kind.get("axis", 0),
        format=kind.get("format", ""),
        bytes=stored_bytes(site, sizes),
        form=kind.get("form", ""),
        activation=spec("activation"),
        sparsity=kind.get("sparsity"),
        shared_with=kind.get("shared_with"),
        stack=kind.get("stack"),
    )


def stacks(layers: Iterable[LayerReport]) -> dict[str, list[LayerReport]]:
    """Name of a stack -> its layers, in the order of their rows."""
    found: dict[str, list[LayerReport]] = {}
    for layer in layers:
        if layer.stack is not None:
            found.setdefault(layer.stack, []).append(layer)
    return found


def stacked_sites(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Name of a stack in a file -> its weights, in the order of their rows; empty for a file that is not ours."""
    content = content_of(model)
    found: dict[str, list[str]] = {}
    for path, number, *_ in content.get("layers", ()):
        kind = content["kinds"][number]
        if "stack" in kind:
            found.setdefault(kind["stack"], []).append(f"{path}.{kind['operand']}" if path else kind["operand"])
    return found


def _with_shares(layers: Sequence[LayerReport], sizes: Mapping[str, int]) -> tuple[LayerReport, ...]:
    """Layers of a stack with their part of its bytes."""
    own: dict[str, int] = {}
    for name, members in stacks(layers).items():
        parts = shares(stored_bytes(name, sizes), [layer.shape[0] for layer in members])
        own |= dict(zip(map(site_of, members), parts, strict=True))
    return tuple(dataclasses.replace(layer, bytes=own[site_of(layer)]) if layer.stack else layer for layer in layers)


def stored_bytes(site: str, sizes: Mapping[str, int]) -> int:
    """The bytes of a weight, of the bytes of all initializers by name."""
    unpacked = itertools.chain([f"{site}.{UNPACKED}"], (f"{site}.{UNPACKED}_{i}" for i in itertools.count(1)))
    own = itertools.takewhile(sizes.__contains__, unpacked)
    return sum(sizes.get(f"{site}.{part}", 0) for part in PARTS) + sum(sizes[name] for name in own)


def _nbytes(tensor: onnx.TensorProto) -> int:
    """As stored: two values of 4 bits are a byte."""
    return -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)


def _cells(layer: LayerReport) -> list[str]:
    weight = "" if not layer.shape else (_short(layer.spec) if layer.spec else "float")
    if layer.sparsity:
        weight = f"{weight} {layer.sparsity}"
    form = layer.form if not layer.notes else f"{layer.form} ({'; '.join(layer.notes)})"
    stored = f"as {layer.shared_with}" if layer.shared_with else f"{layer.bytes:,}"
    difference = "" if layer.max_difference is None else f"{layer.max_difference:.0e}"
    return [site_of(layer), layer.op, weight, layer.groups, _short(layer.activation), stored, form, difference]


def _short(spec: QuantSpec | None) -> str:
    return "" if spec is None else f"{spec.bits:g} bit {spec.scheme} {spec.method}"


def _largest(items: Sequence[Leftover], count: int = 5) -> list[Leftover]:
    return sorted(items, key=lambda item: -item.bytes)[:count]
