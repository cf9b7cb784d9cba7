"""The documentation as a site: complete, whole, and without anything from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ndonnx

ROOT = Path(__file__).parents[2]
TOOLS = ("latex2mathml", "material", "mkdocs", "mkdocstrings", "mkdocstrings_handlers")
has_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(tool) is None for tool in TOOLS), reason="needs the extra `docs`: make docs"
)
LOADED = re.compile(r"<(?:script|img|iframe|link|source)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
"""What a browser fetches from elsewhere as soon as it opens a page."""


def test_every_public_name_is_in_the_reference() -> None:
    told = re.findall(r"^::: ndonnx\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(told) == sorted(ndonnx.__all__)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@has_tools
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not LOADED.findall(page.read_text(encoding="utf-8")), page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


@has_tools
def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    page = (site / "method.html").read_text(encoding="utf-8")
    assert page.count("<math") > 50 and "arithmatex" not in page
    assert "\\operatorname" not in re.sub(r"<annotation.*?</annotation>", "", page, flags=re.DOTALL)


@has_tools
def test_pages_of_the_repository_are_on_the_site(site: Path) -> None:
    page = (site / "reference.html").read_text(encoding="utf-8")
    assert 'href="method.html#promising-a-drop"' in page and 'href="report.schema.json"' in page
    assert "--finetune-steps" in page and (site / "report.schema.json").is_file()
    start = (site / "index.html").read_text(encoding="utf-8")
    assert 'src="pictures/time_to_quality.png"' in start and (site / "pictures" / "time_to_quality.png").is_file()
    reference = (site / "api.html").read_text(encoding="utf-8")
    assert all(f'id="ndonnx.{name}"' in reference for name in ndonnx.__all__)


@has_tools
@pytest.mark.parametrize(
    ("page", "target", "there"),
    [
        ("guides/ocr.md", "../../benchmarks/RESULTS.md#field-models", "../results.md#field-models"),
        ("guides/ocr.md", "../ci.md", "../ci.md"),
        ("results.md", "search.png", "pictures/search.png"),
        ("reference.md", "docs/method.md", "method.md"),
        ("reference.md", "LICENSE", None),
        ("reference.md", "#methods", "#methods"),
        ("method.md", "https://arxiv.org/abs/2010.01189", "https://arxiv.org/abs/2010.01189"),
    ],
)
def test_links_lead_to_the_pages_of_the_site(page: str, target: str, there: str | None) -> None:
    from scripts.docs_site import site_link  # noqa: PLC0415 - reads mkdocs

    assert site_link(page, target) == there
