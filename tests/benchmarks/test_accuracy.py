"""The accuracy studies at sizes of seconds: rows, resuming, exported scores, the plan of a sweep, tables."""

import json

import pytest

from benchmarks.accuracy import plan, tables
from benchmarks.accuracy.__main__ import load, main
from benchmarks.accuracy.methods import METHODS, SETTINGS, config
from benchmarks.accuracy.studies import STUDIES
from benchmarks.accuracy.training import diverged


def test_a_smoke_run_and_its_resumption(tmp_path, capsys):
    """Two tiny studies train; a second call finds everything done; scores in onnxruntime are torch's."""
    text = ["--study", "smoke-text", "--out", str(tmp_path), "--method", "float", "seq"]
    main(text)
    main(["--study", "smoke-images", "--out", str(tmp_path), "--method", "ddt-windowed", "--seeds", "2"])
    rows = load(tmp_path, ["smoke-text", "smoke-images"])
    assert [(r["setting"], r["method"], r["seed"]) for r in rows] == [
        ("float", "float", 0),
        ("A1W1", "seq", 0),
        ("A2W2", "ddt-windowed", 0),
        ("A2W2", "ddt-windowed", 1),
    ]
    exported = rows[3]
    assert exported["score_ort"] == pytest.approx(exported["score"], abs=1e-2)
    assert exported["score_standard"] == pytest.approx(exported["score"], abs=1e-2)
    assert all(len(r["curve"]) == r["steps"] for r in rows)  # four steps, a point each
    assert all(0 <= flip <= 1 for r in rows for flip in r["flips"]) and rows[2]["flips"]
    capsys.readouterr()
    main(text)
    assert load(tmp_path, ["smoke-text"]) == rows[:2]
    printed = capsys.readouterr().out
    assert "smoke-text, A1W1" in printed and "| seq |" in printed


@pytest.mark.parametrize(
    ("start", "curve", "reason"),
    [
        (4.0, [3.0, 2.5, 2.4], None),
        (4.0, [3.0, 2.0, 2.2], "worse than its best"),
        (4.0, [3.0, 5.0], "above the start"),
        (4.0, [3.0, float("nan")], "not finite"),
        (4.0, [], "not finite"),
    ],
)
def test_divergence(start, curve, reason):
    assert diverged(start, curve) == reason


def row(rate, loss, seed=0):
    return {"study": "shakespeare", "setting": "A1W1", "method": "ddt", "rate": rate, "seed": seed, "loss": loss}


def test_a_best_rate_at_an_edge_is_followed_and_the_best_repeated():
    study = STUDIES["shakespeare"]
    rows = [row(rate, loss) for rate, loss in zip(study.rates, (2.5, 2.6, "nan"), strict=True)]
    (further,) = plan.pending("shakespeare", study, "A1W1", ["ddt"], 1, rows)
    assert further.rate == pytest.approx(study.rates[0] * study.rates[0] / study.rates[1], rel=0.01)
    rows.append(row(further.rate, 2.7))
    (repeat,) = plan.pending("shakespeare", study, "A1W1", ["ddt"], 2, rows)
    assert (repeat.rate, repeat.seed, repeat.export) == (study.rates[0], 1, True)
    assert plan.pending("shakespeare", study, "A1W1", ["ddt"], 2, [*rows, row(repeat.rate, 2.5, 1)]) == []


def test_every_method_is_a_config_of_its_setting():
    for setting, what in SETTINGS.items():
        for method in what.methods:
            found = config(setting, method, ("head",))
            assert found.weight.bits == what.weight and found.weight.method == METHODS[method].method
            assert (found.sparsity is None) == (what.sparsity is None)
            json.dumps(found.to_dict())


def test_tables_order_by_loss_and_mark_divergence():
    base = {"score": 0.5, "steps": 4, "flips": [0.1, 0.01, 0.001], "curve": [2.0, 3.0]}
    rows = [
        {**row(1e-2, 2.5), **base, "diverged": None},
        {**row(1e-2, 2.4), **base, "method": "ddt-windowed", "diverged": "worse than its best"},
    ]
    lines = tables.markdown(rows).partition("### shakespeare, A1W1")[2].splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ddt")] == ["| ddt-windowed", "| ddt"]
    assert "2.400*" in lines[4] and "1 of 1 | 50 |" in lines[4] and "10 1" in lines[5]


def test_standings_compare_by_the_best_method_of_each_setting():
    base = {"score": 0.5, "steps": 4, "flips": [], "curve": [2.0], "diverged": None}
    losses = {
        ("A1W1", "ddt"): (2.5, 2.51, 3.0),
        ("A1W1", "ste"): (2.0, 2.2, 2.3),
        ("W1", "ddt"): (2.2, 2.4, 2.5),
        ("W1", "ste"): (2.31, 2.5, 2.5),
        ("W1", "seq"): (1.0,),  # not swept
        ("W4", "ddt"): (1.0, 1.1, 1.2),  # not so few bits
    }
    rows = [
        {**row(10.0 ** (i - 3), loss), **base, "setting": setting, "method": method}
        for (setting, method), sweep in losses.items()
        for i, loss in enumerate(sweep)
    ]
    rows[3]["diverged"] = "not finite"
    ste, ddt = tables.standings(rows).splitlines()[2:]
    assert ste == "| ste | 2 | 2.5 | 5.0 | 1 | 1 of 6 | 1.0 |"
    assert ddt == "| ddt | 2 | 12.5 | 25.0 | 1 | 0 of 6 | 1.5 |"
