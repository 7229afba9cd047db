"""The pages of docs/: their code runs, and what they show as its output is what it prints."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)[^)]*\)")


def examples(page):
    """The Python blocks of a page, each with the text block right after it, or None."""
    blocks = list(BLOCK.finditer(page))
    for i, block in enumerate(blocks):
        if block[1] == "python":
            after = blocks[i + 1] if i + 1 < len(blocks) else None
            shown = after and after[1] == "text" and not page[block.end() : after.start()].strip()
            yield block[2], after[2] if shown else None


def run(page):
    """What each example prints beside what the page shows; one namespace a page, lines counted in each block."""
    names = {"__name__": "example"}
    for code, shown in examples(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, os.path.join("docs", "net.py"), "exec"), names)
        yield printed.getvalue(), shown or ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_code_of_a_page_prints_what_the_page_shows(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where its files go
    torch.manual_seed(0)
    found = list(run(path.read_text()))
    assert found
    for printed, shown in found:
        assert printed == shown


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_named_files_exist(path):
    text = path.read_text()
    for link in LINK.findall(text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:qgraph|passes|exporters|tests|benchmarks|examples)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name


def test_a_page_whose_output_is_not_what_is_printed_is_found():
    page = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n"
    assert list(run(page)) == [("2\n", "3\n")]
