"""The fenced blocks of a guide as steps that can be carried out: files to be saved, and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"(?P<fetched><!-- fetch -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)```\n", re.DOTALL)
_FILE = re.compile(r"`(\w+\.(?:py|toml))`")
FETCH = "fetch"
"""Kind of the block that needs the network; the last lines of it name the files that it leaves."""


@dataclass(frozen=True)
class Step:
    """One block of a guide.

    Attributes:
        kind: `python` or `toml`, a file to be saved; `sh`, commands; or `fetch`, commands that need the network.
        name: of the file, the one that was last named before the block; empty for commands.
        body: of the block, with the line break at its end.
    """

    kind: str
    name: str
    body: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, without comments."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def steps_of(guide: Path) -> Iterator[Step]:
    """Its steps in their order."""
    text = guide.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        names = _FILE.findall(text[: found.start()])
        kind = FETCH if found["fetched"] else found["kind"]
        yield Step(kind, names[-1] if kind in ("python", "toml") else "", found["body"])
