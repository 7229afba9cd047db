"""Makes the pictures of docs/inspect.md: trains a small transformer at mixed bits, and opens its page in Chromium.

Needs chromium, chromedriver, selenium, pillow and scikit-learn: ``python docs/screenshots.py``, about a minute.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from sklearn.datasets import load_digits
from torch import Tensor, nn

import qgraph

IMAGES = Path(__file__).parent / "images"
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --window-size=1400,1100"
BATCH, EPOCHS, WIDTH, HEADS = 64, 6, 96, 4


class Layer(nn.Module):
    """Attention and a perceptron, each after a norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """The rows of a digit as tokens, two layers, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, WIDTH), nn.Parameter(torch.randn(8, WIDTH) / 50)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(8 * WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).flatten(1))


def trained() -> nn.Module:
    """The transformer with weights of 1, 2 and 4 bits."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    labels = torch.tensor(load_digits().target)
    config = qgraph.QConfig.parse("A8W4").with_rules(
        qgraph.Rule("layers.0.*", "A8W2"), qgraph.Rule("layers.1.*", "A4W1-2:4"), qgraph.Rule("head", None)
    )
    model = qgraph.prepare(Transformer(), config, (images[:BATCH],))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = qgraph.inspect(trained()).to_html(Path(folder) / "model.html")
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in [*FLAGS.split(), f"--user-data-dir={folder}/profile"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.get(page.as_uri())
            picture(driver, "graph.png")
            press(driver, "/", "layers.0.up:linear", Keys.ENTER)
            picture(driver, "weight.png")
            press(driver, "t", "d")
            picture(driver, "sizes.png")
            press(driver, "g", "/", "layers.1.down:linear", Keys.ENTER)
            picture(driver, "dark.png")
        finally:
            driver.quit()


def press(driver: webdriver.Chrome, *keys: str) -> None:
    """Type where the focus is; a search field is left first."""
    for key in keys:
        webdriver.ActionChains(driver).send_keys(key).perform()


def picture(driver: webdriver.Chrome, name: str) -> None:
    """Save what the window shows, once it is drawn, with 256 colours."""
    time.sleep(1)
    image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(IMAGES / name, optimize=True)
    print(f"{name}: {(IMAGES / name).stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
