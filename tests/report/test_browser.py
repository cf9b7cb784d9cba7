"""The page of a run in a real browser: no error, nothing cut off, light and dark, narrow and wide."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ndonnx.report.receipt import page, read_run
from tests.helpers.models import residual_cnn
from tests.helpers.runs import Bench

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell", "chromium-headless-shell")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is on the PATH"),
]
WIDTHS = (390, 1200)
"""Pixels of a telephone and of a desk."""
DARK, LIGHT = 0, 1
"""As the browser's own setting has them."""
FRAME = """<!DOCTYPE html><body style="margin:0">
<iframe src="report.html" style="border:0;width:{width}px;height:900px"></iframe><script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement
  const colours = getComputedStyle(page.body)
  document.title = JSON.stringify({{
    over: root.scrollWidth - root.clientWidth, height: root.scrollHeight, sections: page.querySelectorAll("h2").length,
    ink: colours.color, ground: colours.backgroundColor
  }})
}}</script>"""
"""A page that looks at the report in so narrow a frame, and says in its title what it saw."""


def browse(folder: Path, address: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a file in a headless browser of its own."""
    assert BROWSER is not None
    own = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    own += ["--hide-scrollbars", "--no-first-run", f"--user-data-dir={folder / 'profile'}"]
    command = [BROWSER, *own, *options, address.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)


def complaints(folder: Path, address: Path) -> list[str]:
    """What the console says while a file is opened."""
    told = browse(folder, address, "--dump-dom").stderr
    return [line for line in told.splitlines() if "CONSOLE" in line]


def seen(folder: Path, width: int, theme: int) -> dict[str, Any]:
    """What a reader sees of the report at this width."""
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    options = [f"--blink-settings=preferredColorScheme={theme}", "--virtual-time-budget=5000", "--dump-dom"]
    told = re.search(r"<title>(.*?)</title>", browse(folder, frame, *options).stdout)
    assert told is not None
    return dict(json.loads(told[1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the report of a small real run, one value of which has a name that is too long for a telephone."""
    bench = Bench(tmp_path_factory.mktemp("browser"))
    model = residual_cnn()
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["/stage1/block1/activation/LeakyRelu_output_0" if n == "unit1" else n for n in names]
    bench.put(model).compress("run", finetune_steps=4)
    (bench.folder / "report.html").write_text(page([read_run(bench.folder / "run")]), encoding="utf-8")
    return bench.folder


def test_it_opens_without_an_error(folder: Path) -> None:
    assert (folder / "report.html").stat().st_size < 2_000_000
    assert complaints(folder, folder / "report.html") == []


def test_an_error_would_be_seen(folder: Path) -> None:
    broken = folder / "broken.html"
    broken.write_text("<!DOCTYPE html><script>missing()</script>", encoding="utf-8")
    assert len(complaints(folder, broken)) == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_whole_at_every_width_in_both_themes(folder: Path, width: int) -> None:
    light, dark = (seen(folder, width, theme) for theme in (LIGHT, DARK))
    for found in (light, dark):
        assert found["over"] == 0, "wider than the screen"
        assert found["sections"] >= 7 and found["height"] > 1000
        assert _difference(found["ink"], found["ground"]) > 100
    assert _brightness(light["ground"]) > 240 and _brightness(dark["ground"]) < 40


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_its_charts_are_drawn_in_the_ink_of_the_theme(folder: Path, theme: int) -> None:
    picture = folder / f"page-{theme}.png"
    options = [f"--blink-settings=preferredColorScheme={theme}", "--window-size=1200,3000", f"--screenshot={picture}"]
    browse(folder, folder / "report.html", *options)
    with Image.open(picture) as shot:
        grey = shot.convert("L").histogram()
    bright, shady = sum(grey[200:]), sum(grey[:80])
    assert (bright > 10 * shady) if theme == LIGHT else (shady > 10 * bright)
    assert min(bright, shady) > 5000, "an empty page"


def _rgb(colour: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", colour)[:3]]


def _brightness(colour: str) -> float:
    return sum(_rgb(colour)) / 3


def _difference(one: str, other: str) -> float:
    return abs(_brightness(one) - _brightness(other))
