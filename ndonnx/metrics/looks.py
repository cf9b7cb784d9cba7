"""What is told of data that were looked at; beside `first_look`, so that whoever tells it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ValueLook:
    """An input or an output in the samples that were looked at."""

    name: str
    dtype: str
    shape: list[int]
    """Of one sample; of a value that all samples share, its own."""
    low: float | None
    high: float | None
    """Least and largest finite number; None where there are none."""
    looks: str
    """What it seems to be, in words; of an output, the task that it is taken for."""


@dataclass(frozen=True)
class TimeLook:
    """How long a compression would take on this machine, about, from a gradient of the whole teacher that was timed."""

    neighbourhoods: int
    """That would be trained."""
    steps: int
    """Of each of them."""
    finetune_steps: int
    """Of the whole student behind them."""
    reading: float
    """Seconds in which the teacher answers all samples, once for the neighbourhoods and once for the whole."""
    training: float
    """Seconds of the neighbourhoods."""
    finetuning: float
    """Seconds of the whole student."""
    comparing: float
    """Seconds of measuring teacher and student at the end."""

    @property
    def seconds(self) -> float:
        """Of everything."""
        return self.reading + self.training + self.finetuning + self.comparing


@dataclass(frozen=True)
class DataLook:
    """The first samples of the data, and the teacher's answers to them."""

    samples: int
    """That were looked at."""
    length: int | None
    """Of the data; None where nobody knows before they are read."""
    inputs: list[ValueLook]
    outputs: list[ValueLook]
    samples_a_second: float | None
    """That the teacher reads and answers on this machine; None where there were too few to time."""
    time: TimeLook | None = None
    """How long `compress` would take by the same recipe; None with a time budget, which says it, and where it cannot
    be told."""
