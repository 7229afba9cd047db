"""The benchmark of `allocate`, on one small model in seconds."""

import json
import sys

from benchmarks import allocate


def test_mixed_bits_fit_the_bytes_of_uniform_ones(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    command = [
        "allocate",
        "--models",
        "cnn",
        "--bits",
        "2",
        "--epochs",
        "1",
        "--quantized-epochs",
        "1",
        "--json",
        str(file),
    ]
    monkeypatch.setattr(sys, "argv", command)
    allocate.main()
    data = json.loads(file.read_text())
    floating, uniform, *mixed = data["rows"]
    assert floating["bits"] == "float" and uniform["bits"] == "uniform W2"
    assert [row["bits"] for row in mixed] == [f"mixed, {by}, as W2" for by in allocate.HOWS]
    assert all(row["bytes"] <= uniform["bytes"] and row["trained_loss"] > 0 for row in mixed)
    assert {row["proxy"] for row in data["correlations"]} == set(allocate.HOWS[1:])
    assert "mixed, divergence, as W2" in capsys.readouterr().out
