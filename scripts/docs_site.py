"""What mkdocs runs while it builds the site of `mkdocs.yml`: pages from outside `docs/`, and formulas without a script.

README, the results and the log stay where a reader of the repository looks for them; the site has copies, and links
that lead to a file of the repository lead to its page. Formulas become MathML, which browsers draw by themselves.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "reference.md": "README.md",
    "results.md": "benchmarks/RESULTS.md",
    "log.md": "benchmarks/LOG.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Pages of the site that are files outside `docs/`."""
PICTURES = {f"pictures/{path.name}": f"benchmarks/{path.name}" for path in sorted((ROOT / "benchmarks").glob("*.png"))}
_HOMES = {origin: page for page, origin in {**PAGES, **PICTURES}.items()}
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_ELSEWHERE = re.compile(r"[a-z]+:|#")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that lie outside `docs/`."""
    for page, origin in {**PAGES, **PICTURES}.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / origin)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their pages; what has no page is named without a link."""
    home = page.file.src_uri

    def led(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        there = site_link(home, target)
        return text if there is None else f"{picture}[{text}]({there})"

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(led, markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, _LINK.sub(led, markdown[end:])])


def site_link(page: str, target: str) -> str | None:
    """Where a link on a page leads on the site; None where the site does not have it.

    Args:
        page: the page's place on the site, as `guides/ocr.md`.
        target: the link as it stands in the repository's file.
    """
    if _ELSEWHERE.match(target):
        return target
    path, mark, anchor = target.partition("#")
    folder = posixpath.dirname(PAGES.get(page, f"docs/{page}"))
    origin = posixpath.normpath(posixpath.join(folder, path))
    there = _HOMES.get(origin, origin.removeprefix("docs/") if origin.startswith("docs/") else None)
    return None if there is None else posixpath.relpath(there, posixpath.dirname(page) or ".") + mark + anchor


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw formulas as MathML."""
    return _FORMULA.sub(_drawn, content)


def _drawn(found: re.Match[str]) -> str:
    display = "block" if found[2] == "[" else "inline"
    return str(convert(html.unescape(found[3]).strip(), display=display))
