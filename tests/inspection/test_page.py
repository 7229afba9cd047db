"""The HTML file: one file, nothing from outside, nothing that a name in it can break."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import qgraph
from qgraph.inspection import page as module
from qgraph.inspection.page import LIBRARIES, SCRIPTS, embedded, page

FOLDER = Path(module.__file__).parent / "html"
SCRIPT = re.compile(r"<script>(.*?)</script>", re.S)
EVIL = "</script><script>alert(1)</script><!--"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module(EVIL, nn.Linear(4, 4))
    net.add_module("{{title}}&amp;\u2028", nn.Linear(4, 2))
    return qgraph.prepare(net, "A8W2", (torch.ones(1, 4),))


def test_a_name_cannot_end_its_element(model, tmp_path):
    text = qgraph.inspect(model).to_html(tmp_path / "model.html").read_text()
    assert EVIL not in text and "alert(1)</script>" not in text
    assert text.count("<script>") == len(LIBRARIES) + len(SCRIPTS)
    (island,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert "<" not in island and ">" not in island
    assert EVIL in {box["name"] for box in json.loads(island)["boxes"]}


def test_the_title_is_escaped():
    data = {"boxes": [{"name": "<b>&\"'"}]}
    text = page(data)
    assert f"<title>{html.escape(data['boxes'][0]['name'])} - qgraph</title>" in text and "<b>" not in text


def test_embedded_json_is_what_it_was():
    value = {"a": [EVIL, "\u2028 & é", 1.5, None]}
    assert json.loads(embedded(value)) == value


def test_the_policy_allows_these_scripts_and_no_connection(model, tmp_path):
    text = qgraph.inspect(model).to_html(tmp_path / "model.html").read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; ") and "connect-src" not in policy
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    found = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in SCRIPT.findall(text)]
    assert found == allowed
    outside = re.sub(r"<!--.*?-->", "", SCRIPT.sub("", text), flags=re.S)
    assert not re.search(r"(?:src|href)=|url\(|@import|//\w+\.", outside)


def test_libraries_are_untouched_and_licensed():
    readme = (FOLDER / "vendor" / "README.md").read_text()
    for name in LIBRARIES:
        digest = hashlib.sha256((FOLDER / "vendor" / f"{name}.min.js").read_bytes()).hexdigest()
        assert f"| `{name}.min.js` | `{digest}` |" in readme
        assert "ermission" in (FOLDER / "vendor" / f"{name}.LICENSE").read_text()
    assert {path.name for path in FOLDER.glob("*.js")} == set(SCRIPTS)


def test_the_file_is_there_whole_or_not_at_all(model, tmp_path, monkeypatch):
    path = tmp_path / "model.html"
    path.write_text("before")
    found = qgraph.inspect(model)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        found.to_html(path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_an_error(model, tmp_path):
    found = qgraph.inspect(model)
    with pytest.raises(qgraph.InspectError, match=r"its folder does not exist\. Expected .*; make "):
        found.to_html(tmp_path / "missing" / "model.html")
    with pytest.raises(qgraph.InspectError, match="found a folder"):
        found.to_html(tmp_path)
