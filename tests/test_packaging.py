"""The wheel holds every module of the three folders, and the marker that says it is typed."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"qgraph": "qgraph", "qgraph.passes": "passes", "qgraph.exporters": "exporters"}


def source_files() -> dict[str, str]:
    """Every source file under its installed name."""
    files = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder).as_posix()
            files[f"{package.replace('.', '/')}/{inside}"] = path.as_posix()
    return files


def test_every_folder_is_a_listed_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {name.rsplit("/", 1)[0].replace("/", ".") for name in source_files()}
    assert found == set(listed)
    for package in found:
        assert f"{package.replace('.', '/')}/__init__.py" in source_files(), f"{package} has no __init__.py"


def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, tree], check=True, timeout=120)
    (wheel,) = tmp_path.glob("qgraph-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(source_files()) <= names
    kernels = {f"qgraph/ops/kernels/{path.name}" for path in (ROOT / "qgraph" / "ops" / "kernels").iterdir()}
    assert {"qgraph/py.typed", *kernels} <= names
    page = ROOT / "qgraph" / "inspection" / "html"
    assert {path.relative_to(ROOT).as_posix() for path in page.rglob("*") if path.is_file()} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
