"""The headings under which settings are told: in a file without pydantic, which a list of commands does not need."""

from __future__ import annotations

from enum import StrEnum


class Panel(StrEnum):
    """Heading under which a setting stands in `--help` and in README."""

    BUILD = "What to build"
    REACH = "What to reach"
    TRAIN = "How to train it"
    RUN = "How to run it"
