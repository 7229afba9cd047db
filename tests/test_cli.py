"""The command line: what each command prints, its JSON, and errors of one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qgraph
from qgraph.checkpoint import save
from qgraph.cli import main
from qgraph.exporters.onnx import export

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net()


def with_example():
    return net(), (torch.randn(2, 1, 8, 8),)


def broken():
    raise ValueError("the factory's own error")


def number():
    return 4


def prepared():
    import qgraph
    model, example = with_example()
    return qgraph.prepare(model, "A4W2", example), example


def not_a_number():
    model = net()
    torch.nn.init.constant_(model.fc.bias, float("nan"))
    return model


def wider():
    model = Net()
    model.fc = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    model.conv = nn.Conv2d(1, 8, 5)
    return model


ready = net()
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an importable module, a checkpoint and a file of it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "zoo_of_cli.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    try:
        import zoo_of_cli
    finally:
        sys.path.remove(str(folder))
    model, example = zoo_of_cli.prepared()
    save(model, folder / "net.safetensors")
    export(model, folder / "net.onnx", example, progress=False)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_inspect_a_factory(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", "zoo_of_cli:net")
    assert code == 0
    assert "conv" in out and "fc" in out
    code, out, _ = run(capsys, "inspect", "zoo_of_cli:ready", "--json")
    assert json.loads(out)["kind"] == "eager"


def test_inspect_with_a_config(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("inspect", "zoo_of_cli:net", "--config", "A4W1-2:4", "--input", "2x1x8x8")
    code, out, _ = run(capsys, *command, "--json")
    data = json.loads(out)
    assert code == 0
    assert data["kind"] == "prepared"
    assert data["coverage"]["sites_quantized"] == 2
    code, out, _ = run(capsys, *command, "--graphs")
    assert "def forward" in out


def test_inspect_a_file(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", work / "net.onnx")
    assert code == 0 and "fc" in out
    code, out, _ = run(capsys, "inspect", work / "net.onnx", "--json")
    assert json.loads(out)["kind"] == "onnx"


def test_inspect_writes_a_page(work: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "net.html"
    code, out, _ = run(capsys, "inspect", "zoo_of_cli:net", "--html", page)
    assert code == 0 and out.endswith(f"{page}: open it in a browser\n")
    assert page.read_text().startswith("<!doctype html>")
    code, out, _ = run(capsys, "inspect", work / "net.onnx", "--html", page, "--json")
    assert json.loads(out)["html"] == str(page) and "net.onnx" in page.read_text()
    code, out, err = run(capsys, "inspect", work / "net.onnx", "--html", tmp_path / "no" / "net.html")
    assert code == 2 and err.count("\n") == 1 and "its folder does not exist" in err


def test_diff(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "diff", "zoo_of_cli:net", work / "net.onnx", "--json")
    data = json.loads(out)
    assert code == 1
    assert [(change["site"], change["kind"]) for change in data["changes"]] == [
        ("conv.weight", "spec"),
        ("fc.weight", "spec"),
    ]
    assert data["bytes"][1] < data["bytes"][0] == (8 * 9 + 4 * 8) * 4
    code, out, _ = run(capsys, "diff", "zoo_of_cli:net", work / "net.onnx")
    assert "A4W2" in out and "2 weights differ" in out
    code, out, _ = run(capsys, "diff", work / "net.onnx", work / "net.onnx")
    assert code == 0
    assert "0 weights differ, 2 are the same" in out
    code, out, _ = run(capsys, "diff", "zoo_of_cli:net", "zoo_of_cli:wider")
    assert code == 1
    assert "shape" in out and "added" in out


def test_compare(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = work / "net.onnx"
    code, out, _ = run(capsys, "compare", "zoo_of_cli:prepared", file, "--threshold", "90", "--json")
    data = json.loads(out)
    assert code == 0 and data["first_drop"] is None
    assert [layer["path"] for layer in data["layers"]] == ["conv", "fc", ""]
    code, out, _ = run(capsys, "compare", "zoo_of_cli:net", file, "--input", "3x1x8x8", "--threshold", "60")
    assert code == 1 and "first drop: conv" in out and "SNR dB" in out
    command = ("compare", "zoo_of_cli:net", "zoo_of_cli:with_example", "--config", "W1", "--json")
    code, out, _ = run(capsys, *command)
    assert code == 0 and json.loads(out)["b"] == "Net at W1"
    assert run(capsys, *command, "--threshold", "60")[0] == 1
    assert run(capsys, "compare", file, file, "--input", "2x1x8x8", "--threshold", "90")[0] == 0
    code, out, _ = run(capsys, "compare", "zoo_of_cli:with_example", "zoo_of_cli:not_a_number", "--json")
    data = json.loads(out)
    assert code == 1 and data["first_drop"]["path"] == "fc" and "NaN in b" in data["first_drop"]["problem"]


def test_export_then_verify(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, file = work / "net.safetensors", tmp_path / "out.onnx"
    code, out, _ = run(capsys, "export", checkpoint, "zoo_of_cli:with_example", file, "--json")
    assert code == 0 and file.exists()
    assert json.loads(out)["target"] == "ort"
    arguments = ("verify", file, "zoo_of_cli:net", "--checkpoint", checkpoint, "--input", "3x1x8x8", "--json")
    code, out, _ = run(capsys, *arguments)
    data = json.loads(out)
    assert code == 0 and data["good"]
    assert data["max_difference"] < 1e-5
    assert data["values"] == 3 * 4


def test_verify_finds_another_model(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    model, _ = sys.modules["zoo_of_cli"].prepared()
    torch.nn.init.normal_(model.fc.weight)
    save(model, tmp_path / "other")
    command = ("verify", work / "net.onnx", "zoo_of_cli:with_example", "--checkpoint", tmp_path / "other")
    code, out, _ = run(capsys, *command)
    assert code == 1
    assert "NOT the same" in out
    assert run(capsys, *command, "--allow", "1")[0] == 0


def test_bench(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "bench", work / "net.onnx", work / "net.onnx", "--runs", "3", "--json")
    files = json.loads(out)["files"]
    assert code == 0
    assert [entry["file_bytes"] for entry in files] == [(work / "net.onnx").stat().st_size] * 2
    assert all(entry["median_ms"] > 0 for entry in files)
    code, out, _ = run(capsys, "bench", work / "net.onnx", "--runs", "1")
    assert "1.00x" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "no_such_module:f"], "cannot be imported: No module named 'no_such_module'"),
        (["inspect", "zoo_of_cli:nothing"], "has no attribute 'nothing'"),
        (["inspect", "zoo_of_cli:number"], "gives a int; expected module:factory"),
        (["inspect", "missing.onnx"], "missing.onnx"),
        (["inspect", "zoo_of_cli:net", "--config", "W9"], "Did you mean 'W8'?"),
        (["inspect", "zoo_of_cli:net", "--input", "axb"], "expected SHAPE[:DTYPE]"),
        (["inspect", "missing.onnx", "--config", "W4"], "belong to a model, not to a file"),
        (["compare", "zoo_of_cli:net", "zoo_of_cli:net"], "found no example inputs; expected --input"),
        (["compare", "zoo_of_cli:with_example", "missing.onnx"], "missing.onnx: no such file"),
        (["compare", "zoo_of_cli:net", "a.onnx", "--config", "W4", "--input", "1"], "belongs to a model"),
        (["compare", "zoo_of_cli:with_example", "zoo_of_cli:wider"], "'conv' gives (2, 8, 6, 6) in a"),
        (["compare", "zoo_of_cli:net", "zoo_of_cli:net", "--input", "2x3x8x8"], "does not run on the inputs"),
        (["export", "missing", "zoo_of_cli:net", "x.onnx"], "gives no example inputs"),
        (["export", "missing", "zoo_of_cli:with_example", "x.onnx"], "cannot be read as a checkpoint"),
        (["verify", "x.onnx", "zoo_of_cli:with_example"], "gives a float model"),
        (["bench", "missing.onnx"], "missing.onnx: no such file"),
        (["bench", "missing.onnx", "--size", "batch"], "expected NAME=N"),
    ],
)
def test_errors_are_one_line(
    work: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith(f"qgraph {arguments[0]}: ")
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGRAPH_DEBUG", "1")
    with pytest.raises(qgraph.QGraphError):
        main(["bench", "missing.onnx"])


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main([])
    assert exit_code.value.code == 2
    assert "usage: qgraph" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "inspect", "diff", "compare", "export", "verify", "bench"])
def test_every_command_takes_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main([command, "--help"])
    assert exit_code.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_the_console_script_looks_for_modules_here(work: Path) -> None:
    script = Path(sys.executable).parent / "qgraph"
    done = subprocess.run(
        [script, "inspect", "zoo_of_cli:net", "--json"], cwd=work, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "eager"


def test_a_reader_that_stops_early_is_no_failure(work: Path) -> None:
    command = [sys.executable, "-m", "qgraph.cli", "inspect", "zoo_of_cli:net"]
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as head does
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) == 141
