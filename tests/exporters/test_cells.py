"""The runner of the table of cells: what it chooses, that it names what fails, and that it goes on."""

import itertools
import json

from rich.console import Console

from tests.exporters import cells
from tests.exporters.cells_table import markdown

SPACE = cells.cells_of("embedding", "ort")


def test_every_pair_of_values_is_chosen():
    assert len(SPACE) == len(cells.BITS) * len(cells.GRANULARITIES) * len(cells.SPARSITIES)
    chosen = cells.covering(SPACE)
    assert len(chosen) < len(SPACE) / 4
    pairs = [{pair for key in keys for pair in itertools.combinations(enumerate(key), 2)} for keys in (SPACE, chosen)]
    assert pairs[0] == pairs[1]
    for batch in cells.batches(SPACE):
        assert len(batch) <= cells.TOGETHER and len({cells._model(key) for key in batch}) == 1
    assert sorted(itertools.chain.from_iterable(cells.batches(SPACE)), key=str) == sorted(SPACE, key=str)


def test_the_cells_that_fail_are_named(monkeypatch):
    bad = {SPACE[3], SPACE[17]}

    def export(keys):
        if bad & set(keys):
            raise ValueError("too wide")
        return [cells._result(key, form="Gather", difference=0.0) for key in keys]

    monkeypatch.setattr(cells, "_export", export)
    results = cells.run(SPACE[:24])
    assert [tuple(found["cell"]) for found in results] == SPACE[:24]
    assert {tuple(found["cell"]) for found in results if "failure" in found} == bad

    bad = set()
    monkeypatch.setattr(cells, "_export", lambda keys: export(keys) if len(keys) < 4 else 1 / 0)
    assert all("in one model with others" in found["failure"] for found in cells.run(SPACE[:6]))


def test_a_run_goes_on_and_becomes_a_page(tmp_path):
    file = tmp_path / "cells.jsonl"
    passed = cells._result(SPACE[0], form="Gather unpacked bits1", difference=1e-7)
    file.write_text(json.dumps(passed) + "\n" + json.dumps(passed)[:20])
    known = cells.run_all(SPACE[:1], 1, file, Console(quiet=True))
    assert known == {SPACE[0]: passed} and file.read_text().endswith("\n")
    failed = cells._result(SPACE[1], failure="ValueError: a | b")
    page = markdown([*known.values(), failed], {("embedding", "ort"): len(SPACE)})
    assert "| embedding | ort | 2 | 504 | 1 | 1e-07 |" in page
    assert "| embedding | ort | Gather unpacked | 1 | tensor | dense | float | 1 |" in page
    assert "| embedding, 1, tensor, 2:4, none, ort | ValueError: a \\| b |" in page and "9 bits" in page
