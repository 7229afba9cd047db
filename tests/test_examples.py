"""Every example runs and does what it says; the README's own pass is the example's."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import qgraph

ROOT = Path(__file__).parent.parent


@pytest.fixture
def example(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_plain_loop(example, tmp_path):
    accuracy = example("plain_loop").main(str(tmp_path / "digits.onnx"), epochs=6)
    assert accuracy > 0.7
    assert (tmp_path / "digits.onnx").stat().st_size < 40_000


def test_recipe(example, tmp_path):
    module = example("recipe")
    accuracy = module.main(str(tmp_path / "recipe.onnx"), steps=100)
    assert accuracy > 0.6  # of ten classes, at one bit
    layers = qgraph.unpack(tmp_path / "recipe.onnx")
    assert {layer.spec.bits for layer in layers.values()} == {1}
    assert all(layer.mask.reshape(-1, 4).sum(1).max() == 2 for layer in layers.values())


def test_lightning(example, tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed: pip install 'qgraph[lightning]'")
    assert example("lightning_loop").main(str(tmp_path), epochs=4) > 0.7


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) < 60


def test_transformers_trainer(example):
    before, after = example("transformers_trainer").main(steps=40)
    assert after < 0.3 * before


def test_own_pass_is_honoured_in_eval_train_and_later_graphs(example):
    module = example("own_pass")
    prepared = module.main()
    x = torch.randn(3, 8)
    for training in (False, True):
        prepared.train(training)
        hidden = prepared.a(x).relu().square()
        assert torch.equal(prepared(x), prepared.b(hidden))
    again = qgraph.Pipeline((module.SquareRelu(),)).run(prepared)
    assert not again
    lazy = qgraph.prepare(module.Net(), "W4")
    qgraph.Pipeline((module.SquareRelu(),)).run(lazy)
    lazy(x)
    assert torch.equal(lazy(x), lazy.b(lazy.a(x).relu().square()))


def test_the_readme_shows_the_pass_that_runs():
    text = (ROOT / "examples" / "own_pass.py").read_text()
    shown = re.search(r"# \[pass\]\n(.*?)\n+# \[/pass\]", text, re.S).group(1)
    assert shown in (ROOT / "README.md").read_text()
    assert len(shown.splitlines()) <= 15
