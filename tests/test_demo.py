"""The demo, shortened: real data, real training, real files."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from rich.console import Console

from qgraph import demo
from qgraph.cli import main
from qgraph.errors import ConfigError, QGraphError

SHORT = demo.Recipe(epochs=3, latency_runs=5)


@pytest.mark.parametrize(("model", "config", "floor"), [("cnn", "A4W1-2:4", 0.85), ("transformer", "W1.58", 0.85)])
def test_a_row_is_what_it_says(model: str, config: str, floor: float, tmp_path: Path) -> None:
    shares = []
    result = demo.run(tmp_path, SHORT, (config,), (model,), lambda what, share: shares.append(share))
    full, low = result.rows
    assert (full.config, low.config) == ("FP32", config)
    assert sum(shares) == pytest.approx(1.0)
    for row in result.rows:
        assert row.accuracy_torch > floor  # three epochs; chance is 0.1
        # one flipped code may change one image's outputs; the files compute the same otherwise
        assert abs(row.accuracy_torch - row.accuracy_onnxruntime) <= 2 / 450
        assert row.flipped <= 0.05 * row.outputs
        assert row.file_bytes == Path(row.file).stat().st_size
        assert row.latency_ms > 0
    assert full.max_difference < 1e-5 and full.flipped == 0
    assert low.file_bytes < full.file_bytes / 6
    assert low.bits_per_weight < 3
    onnx.checker.check_model(low.file)
    assert json.loads(json.dumps(result.to_dict()))["rows"][1]["config"] == config
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.table())
    assert config in console.export_text()


@pytest.mark.parametrize("name", list(demo.MODELS))
def test_models_are_of_the_size_that_the_demo_is_about(name: str) -> None:
    model = demo.MODELS[name]()
    assert 100_000 < sum(parameter.numel() for parameter in model.parameters()) < 400_000
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    recipe = demo.Recipe(epochs=1, latency_runs=1)
    here, spread = (demo.run(tmp_path, recipe, ("W4",), ("cnn",), workers=workers) for workers in (1, 2))
    assert [row.config for row in spread.rows] == ["FP32", "W4"]
    assert [row.accuracy_torch for row in here.rows] == [row.accuracy_torch for row in spread.rows]
    assert [row.max_difference for row in here.rows] == [row.max_difference for row in spread.rows]


def test_an_error_in_a_worker_is_an_error_here(tmp_path: Path) -> None:
    (tmp_path / "cnn-W4.onnx").mkdir()
    recipe = demo.Recipe(epochs=1, latency_runs=1)
    with pytest.raises(QGraphError, match=r"cnn-W4\.onnx"):
        demo.run(tmp_path, recipe, ("W4",), ("cnn",), workers=2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "demo",
        "--out",
        str(tmp_path / "made"),
        "--epochs",
        "1",
        "--models",
        "cnn",
        "--configs",
        "A1W1",
    ]
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["config"] for row in data["rows"]] == ["FP32", "A1W1"]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["cnn-A1W1.onnx", "cnn-FP32.onnx"]


def test_a_config_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean"):
        demo.run(tmp_path, SHORT, ("W9",), ("cnn",))
    assert not list(tmp_path.iterdir())
