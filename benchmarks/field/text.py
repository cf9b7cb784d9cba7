"""Text that every Python brings along: sentences of docstrings, and pictures of them as lines and pages."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

_SENTENCE = re.compile(r"[A-Z][^.!?\n]{20,200}[.!?]")
_TOKEN = re.compile(r"\S+")


@cache
def sentences(most: int) -> tuple[str, ...]:
    """Sentences of the standard library's docstrings, each once, in the order of a fixed shuffle."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        for text in _docstrings(path):
            plain = " ".join(text.split())
            found.update(dict.fromkeys(_SENTENCE.findall(plain)))
    order = np.random.default_rng(0).permutation(len(found))
    listed = list(found)
    return tuple(listed[number] for number in order[:most])


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # test data of the library that is broken on purpose
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            yield text


@cache
def fonts() -> tuple[Path, ...]:
    """Letter fonts that matplotlib brings: serif, sans serif and mono, upright, bold and slanted."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return tuple(sorted(path for path in folder.glob("DejaVu*.ttf") if "Display" not in path.stem))


def words(rng: np.random.Generator, listed: Sequence[str], count: int) -> str:
    """Words as they stand in the listed sentences, or now and then numbers."""
    if rng.random() < 0.25:
        return " ".join(str(int(10 ** rng.uniform(0, 6))) for _ in range(max(1, count - 1)))
    tokens = _TOKEN.findall(listed[int(rng.integers(0, len(listed)))])
    start = int(rng.integers(0, max(1, len(tokens) - count)))
    return " ".join(tokens[start : start + count])


def line(rng: np.random.Generator, text: str, height: int, width: int) -> NDArray[np.uint8]:
    """A line of text as a camera or a scanner sees it: (height, width, 3), padded with grey on the right."""
    ink, paper = _colours(rng)
    font = ImageFont.truetype(str(rng.choice(np.array(fonts()).astype(str))), int(rng.integers(26, 40)))
    left, top, right, bottom = font.getbbox(text)
    border = rng.integers(1, 9, 4)
    size = (int(right - left + border[0] + border[1]), int(bottom - top + border[2] + border[3]))
    image = Image.new("RGB", size, paper)
    ImageDraw.Draw(image).text((border[0] - left, border[2] - top), text, fill=ink, font=font)
    image = image.rotate(float(rng.normal(0, 0.7)), resample=Image.Resampling.BICUBIC, fillcolor=paper)
    shown = image.resize((max(8, min(width, round(size[0] * height / size[1]))), height), Image.Resampling.BILINEAR)
    padded = np.full((height, width, 3), 127, np.uint8)
    padded[:, : shown.width] = _worn(rng, shown)
    return padded


def page(rng: np.random.Generator, listed: Sequence[str], size: int) -> NDArray[np.uint8]:
    """A small page with lines and columns of text: (size, size, 3)."""
    ink, paper = _colours(rng)
    image = Image.new("RGB", (size, size), paper)
    draw = ImageDraw.Draw(image)
    top = int(rng.integers(4, 40))
    while top < size - 20:
        letters = int(rng.integers(11, 30))
        font = ImageFont.truetype(str(rng.choice(np.array(fonts()).astype(str))), letters)
        left = int(rng.integers(2, size // 3))
        draw.text((left, top), words(rng, listed, int(rng.integers(1, 7))), fill=ink, font=font)
        top += int(letters * rng.uniform(1.2, 2.4))
    if rng.random() < 0.5:
        corner, far = sorted(rng.integers(0, size, 2)), sorted(rng.integers(0, size, 2))
        draw.rectangle((corner[0], far[0], corner[1], far[1]), outline=ink)
    return _worn(rng, image.rotate(float(rng.normal(0, 1.5)), fillcolor=paper))


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ink and paper, in either order, far enough apart to be read."""
    dark, bright = rng.integers(0, 90, 3), rng.integers(160, 256, 3)
    pair = (tuple(map(int, dark)), tuple(map(int, bright)))
    return pair if rng.random() < 0.8 else pair[::-1]


def _worn(rng: np.random.Generator, image: Image.Image) -> NDArray[np.uint8]:
    """Blurred, unevenly lit and noisy."""
    blurred = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.9))))
    pixels = np.asarray(blurred, np.float32)
    light = np.linspace(rng.uniform(0.85, 1.0), rng.uniform(0.85, 1.0), pixels.shape[1], dtype=np.float32)
    noise = rng.normal(0, rng.uniform(0, 8), pixels.shape).astype(np.float32)
    return np.asarray(np.clip(pixels * light[None, :, None] + noise, 0, 255), dtype=np.uint8)


def images_first(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Pictures (height, width, 3) as one array (n, 3, height, width)."""
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))
