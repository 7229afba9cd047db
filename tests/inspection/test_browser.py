"""The page in a real browser: headless Chromium and its driver, where both are installed."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from torch import nn

import qgraph
from qgraph.inspection.page import page
from qgraph.inspection.view import view
from tests.models import CASES

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
Wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="Chromium and chromedriver are not installed (apt-get install chromium-driver)"
)

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1400,900"
)
EVIL = "</script><script>broken = 1</script>"


class Browser:
    """A page, and what a person does with it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path):
        self.driver.get(path.as_uri())
        Wait(self.driver, 30).until(lambda d: d.find_element(By.TAG_NAME, "body").get_attribute("data-ready"))

    def js(self, text, *arguments):
        return self.driver.execute_script(f"return {text}", *arguments)

    def find(self, css):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, css):
        return self.find(css).text

    def press(self, *keys):
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def search(self, text, *keys):
        self.press("/")
        self.press(text, *keys)

    @property
    def picked(self):
        key = self.js("qgraphPage.picked()")
        return key and self.js("(({data}) => data.id || data.path)(qgraphPage.model.byKey.get(arguments[0]))", key)

    def is_open(self, path):
        return self.js("qgraphPage.model.boxes.find((box) => box.data.path === arguments[0]).expanded", path)

    def at(self, path):
        """Point at the middle of the box or node of this path or id."""
        x, y = self.js(
            "((m) => { const each = [...m.boxes, ...m.nodes].find(({data}) => (data.id || data.path) === arguments[0]);"
            " const p = qgraphPage.position(each.key), r = document.getElementById('graph').getBoundingClientRect();"
            " return [Math.round(r.left + p.x), Math.round(r.top + p.y)]; })(qgraphPage.model)",
            path,
        )
        actions = webdriver.ActionChains(self.driver)
        actions.w3c_actions.pointer_action.move_to_location(x, y)
        return actions

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    torch.manual_seed(0)
    case = CASES["gpt"]
    model = qgraph.prepare(case.make(), "A4W1-2:4@16", case.inputs(0))
    return qgraph.inspect(model).to_html(tmp_path_factory.mktemp("page") / "gpt.html")


@pytest.fixture
def browser(driver, gpt):
    found = Browser(driver)
    found.open(gpt)
    yield found
    assert found.complaints() == []


def test_it_opens_without_a_network(browser, gpt):
    assert browser.driver.title == "GPT - qgraph"
    assert "11 of 11 quantized" in browser.text("#panel")
    assert browser.js("qgraphPage.shown()") > 5 and len(browser.driver.find_elements(By.CSS_SELECTOR, ".row")) > 5
    browser.requests()  # those of the browser's own first page
    browser.open(gpt)
    assert {url for url in browser.requests() if not url.startswith(("data:", "blob:"))} == {gpt.as_uri()}


def test_the_panel_says_what_kind_of_scale_each_operand_has(driver, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    found = Browser(driver)
    found.open(
        qgraph.inspect(qgraph.prepare(model, "A4W2", (torch.ones(1, 3, 4, 4),))).to_html(tmp_path / "scales.html")
    )
    for weight, shared in (("0.weight", "sample"), ("2.weight", "token")):
        found.search(weight, Keys.ENTER)
        panel = found.text("#panel")
        assert "2 bit affine, ddt, a windowed scale per channel" in panel
        assert f"4 bit affine, ddt, a scale per {shared}" in panel
        found.press(Keys.ESCAPE, Keys.ESCAPE)
    assert found.complaints() == []


def test_search_opens_what_is_around_and_shows_the_weight(browser):
    browser.press("c")
    assert not browser.is_open("blocks.1.attn.qkv")
    browser.search("blocks.1.attn.qkv:linear", Keys.ENTER)
    assert browser.picked == "blocks.1.attn.qkv:linear" and browser.is_open("blocks.1.attn.qkv")
    panel = browser.text("#panel")
    for text in ("A4W1-2:4@16", "48 × 16 float32", "q, k, v = self.qkv(x).split(C, dim=2)", "tests/models.py:"):
        assert text in panel
    assert re.search(r"\d+\.\d dB", panel)
    assert len(browser.driver.find_elements(By.CSS_SELECTOR, "#panel .histogram .level")) == 2
    assert browser.text(".row.picked .name") == "linear"
    browser.search("no such thing", Keys.ENTER)
    assert browser.text("#results") == "nothing found"


def test_click_picks_and_double_click_opens(browser):
    browser.press("c", "0")
    browser.at("blocks").click().perform()
    assert browser.picked == "blocks" and browser.text("#panel h2") == "blocks"
    browser.at("blocks").double_click().perform()
    assert browser.is_open("blocks")
    browser.press(Keys.ENTER)
    assert not browser.is_open("blocks")


def test_keys_walk_along_the_data(browser):
    browser.search("blocks.0.attn:softmax", Keys.ENTER)
    browser.press(Keys.ARROW_DOWN)
    assert browser.picked == "blocks.0.attn:att_2"
    browser.press(Keys.ARROW_UP, Keys.ARROW_UP)
    assert browser.picked == "blocks.0.attn:att_1"
    browser.press(Keys.BACKSPACE)
    assert browser.picked == "blocks.0.attn" and "self.qkv(x)" in browser.js(
        "document.querySelector('#panel pre').textContent"
    )
    browser.press("?")
    assert browser.find("#help").is_displayed()
    browser.press(Keys.ESCAPE)
    browser.press(Keys.ESCAPE)
    assert not browser.find("#help").is_displayed() and browser.picked is None


def test_the_tree_opens_by_keys(browser):
    browser.js("document.querySelector('.row').focus()")
    before = browser.js("document.querySelectorAll('.row').length")
    while browser.js("document.activeElement.querySelector('.name').textContent") != "blocks.0":
        browser.press(Keys.ARROW_DOWN)
    browser.press(Keys.ARROW_RIGHT)
    assert browser.js("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert browser.js("document.querySelectorAll('.row').length") > before
    browser.press(Keys.ENTER)
    assert browser.picked == "blocks.0"


def test_the_treemap_has_a_cell_for_each_weight(browser):
    browser.press("t")
    cells = browser.js("[...document.querySelectorAll('.cell:not(.frame)')].map((cell) => cell.title.split('\\n')[0])")
    assert "blocks.0.mlp.0.weight" in cells and "ln.bias" in cells and "head.weight" not in cells
    widest = browser.find(".cell[title^='wpe.weight']")
    widest.click()
    assert "wpe.weight" in browser.text("#panel .card h3")
    size = widest.size
    browser.find("#sides [value=before]").click()
    assert browser.find(".cell[title^='wpe.weight']").size != size
    browser.press("g")
    assert browser.find("#graph").is_displayed() and not browser.find("#treemap").is_displayed()


def test_colours_follow_the_system_until_they_are_chosen(browser):
    def color():
        return browser.js("getComputedStyle(document.body).backgroundColor")

    def system(scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    system("light")
    light = color()
    system("dark")
    dark = color()
    assert dark != light
    browser.press("d")
    assert color() == light
    browser.find("#theme").click()
    assert color() == dark
    system("light")
    assert color() == dark


def test_what_is_hidden_can_be_shown(browser):
    before = browser.js("qgraphPage.shown()")
    browser.find("[data-roles='parameter buffer']").click()
    assert browser.js("qgraphPage.shown()") < before
    browser.search("size", Keys.ESCAPE)
    browser.find("[data-roles='number constant']").click()
    browser.press("e")
    assert browser.js("qgraphPage.model.hidden.size") == 2


def test_a_name_cannot_run_code(driver, tmp_path):
    net = nn.Sequential()
    net.add_module(EVIL, nn.Linear(4, 4))
    path = qgraph.inspect(qgraph.prepare(net, "A8W2", (torch.ones(1, 4),))).to_html(tmp_path / "evil.html")
    browser = Browser(driver)
    browser.open(path)
    browser.search("linear", Keys.ENTER)
    assert EVIL in browser.text("#tree") and browser.js("window.broken") is None and browser.complaints() == []


def test_three_thousand_nodes(driver, tmp_path):
    data = view(qgraph.inspect(nn.Linear(2, 2)))
    data["boxes"] = [{"name": "Net", "path": "", "parent": None}]
    data["boxes"] += [{"name": str(i), "path": str(i), "parent": 0} for i in range(40)]
    node = {"label": "relu", "role": "op", "op": "call_function", "target": "relu", "shape": [2, 8]}
    data["nodes"] = [{**node, "id": f"{i}:{j}", "box": i + 1, "path": str(i)} for i in range(40) for j in range(75)]
    data["edges"] = [[i - 1, i] for i in range(1, 3000)] + [[i - 9, i] for i in range(9, 3000, 7)]
    path = tmp_path / "big.html"
    path.write_text(page(data))
    browser = Browser(driver)
    browser.open(path)
    print(f"3,000 nodes: {browser.find('body').get_attribute('data-ready')} ms")
    assert browser.js("qgraphPage.shown()") == 40
    browser.search("17:33", Keys.ENTER)
    assert browser.picked == "17:33" and browser.js("qgraphPage.shown()") == 40 + 75
    browser.press("e")  # the canvas gets what is in view, and more where one goes
    assert browser.js("qgraphPage.shown()") == 3040 and browser.js("qgraphPage.core().nodes().length") < 500
    browser.search("39:74", Keys.ENTER)
    assert browser.js("qgraphPage.core().nodes('.picked').data('label')") == "relu\n2 × 8"
    browser.js("void qgraphPage.core().panBy({ x: 1e5, y: 0 })")
    Wait(driver, 10).until(lambda _: browser.js("qgraphPage.core().nodes().length") < 5)
    browser.press("f")
    Wait(driver, 10).until(lambda _: browser.js("qgraphPage.core().nodes().length") > 5)
    assert browser.complaints() == []
