"""Jobs of an executor, and what became of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from ndonnx.runtime.executor import Job, OnStep, Outcome


@dataclass(frozen=True)
class Double:
    name: str
    number: int

    def __call__(self, on_step: OnStep) -> int:
        on_step(1, 2, 0.5)
        on_step(2, 2, 0.25)
        return 2 * self.number


@dataclass(frozen=True)
class Fail:
    """Raises what it is given."""

    name: str
    error: BaseException

    def __call__(self, on_step: OnStep) -> NoReturn:
        raise self.error


def silent(name: str, step: int, steps: int, nmse: float) -> None:
    pass


def by_name(outcomes: Iterator[Outcome]) -> dict[str, Outcome]:
    return {outcome.name: outcome for outcome in outcomes}


def reason(outcome: Outcome) -> str:
    assert outcome.fault is not None and outcome.result is None
    return outcome.fault.reason


def doubles(count: int) -> list[Job]:
    return [Double(f"n{number}", number) for number in range(count)]
