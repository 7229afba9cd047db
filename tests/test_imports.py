"""Imports point one way, and `import qgraph` stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"qgraph": "qgraph", "qgraph.passes": "passes", "qgraph.exporters": "exporters"}

# From the bottom up: a module imports from its own layer or from one below. A new module needs a place here.
LAYERS = (
    {"version", "errors", "terminal", "copying"},
    {"notation", "rules"},
    {"specs"},
    {"config"},
    {"ops"},
    {"ranges"},
    {"modules", "sites"},
    {"placement", "frozen"},
    {"graph", "capture"},
    {"dump"},
    {"pipeline"},
    {"passes"},
    {"prepare", "calibrate", "freeze", "caching", "schedules"},
    {"distillation"},
    {"exporters"},
    {"inspection", "checkpoint", "runtime", "workers"},
    {"analysis"},
    {"demo"},
    {"cli"},
)
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# Upwards, inside a function, on purpose: a config shows the passes that it stands for, a dump is readable text.
DEFERRED = {("config", "passes"), ("dump", "inspection")}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module but the root `qgraph` itself, which gathers the public names."""
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*package.split("."), *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if name != "qgraph":
                yield name, path


def imported(name: str, path: Path) -> Iterator[tuple[str, bool, int]]:
    """The qgraph modules that a file imports, whether inside a function, and the line."""
    tree = ast.parse(path.read_text())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    typing_only = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for n in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found = [f"{base}.{alias.name}" for alias in node.names] if base == "qgraph" else [base]
        else:
            continue
        for target in found:
            if target.split(".")[0] == "qgraph":
                yield target, id(node) in inside, node.lineno


def layer_of(name: str) -> str:
    return name.split(".")[1] if "." in name else name


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=n) for n, p in modules()])
def test_imports_point_down(name: str, path: Path) -> None:
    layer = layer_of(name)
    assert layer in RANKS, f"{name}: give it a place in LAYERS"
    for target, deferred, line in imported(name, path):
        below = layer_of(target)
        if below == "qgraph" and layer not in ("demo", "cli"):
            pytest.fail(f"{path}:{line}: `import qgraph` from inside it makes a circle; import the module")
        if deferred and (layer, below) in DEFERRED:
            continue
        if below in RANKS:
            assert RANKS[below] <= RANKS[layer], f"{path}:{line}: {layer} imports {below}, which stands above it"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    return set(done.stdout.split())


def test_import_qgraph_is_light() -> None:
    loaded = loaded_by("import qgraph")
    heavy = {
        "onnx",
        "onnxruntime",
        "onnxscript",
        "onnx_ir",
        "transformers",
        "sklearn",
        "rich",
        "yaml",
        "networkx",
    }
    # torch itself imports networkx in some releases; what counts is what qgraph adds to it.
    assert not (loaded - loaded_by("import torch")) & heavy


def test_the_command_line_adds_nothing_to_load() -> None:
    # `qgraph --help` must answer at once; importing the package costs torch, the command line adds nothing.
    assert not (loaded_by("import qgraph.cli") - loaded_by("import qgraph")) & {
        "onnxruntime",
        "rich",
        "sklearn",
    }
