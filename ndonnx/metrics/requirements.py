"""What a model has to fulfil, as `agreement>=99%`, and whether it does."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from ndonnx.distill.tasks.intervals import Interval, of_part
from ndonnx.distill.tasks.registry import all_kinds
from ndonnx.errors import UsageError
from ndonnx.metrics.evaluation import Evaluation
from ndonnx.metrics.verdict import Verdict

_SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"\s*(?P<measure>[A-Za-z-]+)(?::(?P<output>.+?))?\s*(?P<sign>>=|<=|>|<)\s*(?P<value>[^<>=]+?)\s*")
_INF = math.inf


@dataclass(frozen=True)
class Measure:
    """A number that can be required."""

    low: float
    """Least value that it can have."""
    high: float
    """Largest value that it can have."""
    field: str = ""
    """Its name in `Evaluation` and `OutputFidelity`; empty where it is neither's."""
    of_output: bool = False
    """Whether each output has one of its own."""
    beside_teacher: bool = True
    """Whether it takes a teacher to tell."""


MEASURES: Mapping[str, Measure] = {
    "accuracy": Measure(0, 1, "accuracy", beside_teacher=False),
    "agreement": Measure(0, 1, "agreement", of_output=True),
    "cosine": Measure(-1, 1, "cosine", of_output=True),
    "divergence": Measure(0, _INF, "kl", of_output=True),
    "error": Measure(0, _INF, "nmse", of_output=True),
    "max-error": Measure(0, _INF, "max_error"),
    "metric": Measure(-_INF, _INF, "metric", beside_teacher=False),
    "drop": Measure(-1, _INF),
    "latency": Measure(0, _INF),
    "size": Measure(0, _INF),
}
"""All that can be required of any model, by the name that is written."""
_LEAST_OF = ("agreement", "cosine")
"""Measures of which the worst of several outputs is the least one."""


def measures() -> Mapping[str, Measure]:
    """All that can be required, by the name that is written: the distances that kinds of tasks declare among them."""
    declared = {kind.measure: Measure(0, _INF, of_output=True) for kind in all_kinds() if kind.measure}
    return {**declared, **MEASURES}


@dataclass(frozen=True)
class Requirement:
    """One comparison that has to hold."""

    text: str
    """As it was written."""
    measure: str
    """One of `measures`."""
    output: str | None
    """The output that it is of. None: all, of which the worst counts."""
    sign: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Read `METRIC OP VALUE`, or `METRIC:OUTPUT OP VALUE`; the value is a number, or a percentage.

        Raises:
            UsageError: it is no comparison, the metric is unknown, or no value of the metric could fulfil it.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise UsageError(f"--require {text!r}: expected METRIC>=VALUE (or <=, >, <), as agreement>=99%")
        name, output = found["measure"].lower(), found["output"]
        known = measures()
        if name not in known:
            raise UsageError(f"--require {text!r}: unknown metric '{found['measure']}'; known: {', '.join(known)}")
        if output is not None and not known[name].of_output:
            of_outputs = ", ".join(name for name, each in known.items() if each.of_output)
            raise UsageError(f"--require {text!r}: {name} is not told of a single output; those are {of_outputs}")
        requirement = cls(text, name, output, found["sign"], _number(text, found["value"]))
        requirement._refuse_impossible()
        return requirement

    def holds(self, found: float) -> bool:
        """Whether a measured value fulfils it."""
        return _SIGNS[self.sign](found, self.value)

    def _refuse_impossible(self) -> None:
        measure = measures()[self.measure]
        best = measure.high if self.sign[0] == ">" else measure.low
        if not self.holds(best):
            bound = f"at {'most' if self.sign[0] == '>' else 'least'} {best:g}"
            percent = f"; write {self.value:g}% for a part" if measure.high == 1 < self.value <= 100 else ""
            raise UsageError(f"--require {self.text!r}: cannot hold, as {self.measure} is {bound}{percent}")


def _number(text: str, value: str) -> float:
    digits, percent = value.removesuffix("%").strip(), value.endswith("%")
    try:
        number = float(Decimal(digits) / 100 if percent else Decimal(digits))  # 99.9% is the float 0.999, not beside it
    except InvalidOperation as error:
        raise UsageError(f"--require {text!r}: expected a number or a percentage, found {value!r}") from error
    if not math.isfinite(number):
        raise UsageError(f"--require {text!r}: expected a finite number, found {value!r}")
    return number


def read_requirements(texts: Sequence[str], *, teacher: bool, metric: bool) -> list[Requirement]:
    """Read requirements, and refuse those that cannot be measured, before anything is run.

    Args:
        texts: as `Requirement.parse` takes them.
        teacher: whether there is a teacher to compare with.
        metric: whether there is a metric of the user's own.

    Raises:
        UsageError: one cannot be read, or needs what is not there.
    """
    found = [Requirement.parse(text) for text in texts]
    for each in found:
        if measures()[each.measure].beside_teacher and not teacher:
            raise UsageError(f"--require {each.text!r}: {each.measure} is measured beside a teacher; give --teacher")
        if each.measure == "metric" and not metric:
            raise UsageError(f"--require {each.text!r}: there is no metric of your own; give --metric MODULE:FUNCTION")
    return found


@dataclass(frozen=True)
class Measured:
    """A measured value, and the 95% confidence interval around it where there is one."""

    value: float
    interval: Interval | None = None


def verdicts_of(
    requirements: Sequence[Requirement], evaluation: Evaluation, beside: Mapping[str, Measured]
) -> tuple[Verdict, ...]:
    """Hold what was measured against the requirements.

    Args:
        requirements: in the order in which they are told.
        evaluation: of the model on the data.
        beside: measures that are no part of it, by name: `drop`, `latency`, `size`.

    Raises:
        UsageError: something that is required is not known of this model on these data.
    """
    return tuple(_verdict(each, evaluation, beside) for each in requirements)


def _verdict(requirement: Requirement, evaluation: Evaluation, beside: Mapping[str, Measured]) -> Verdict:
    output = requirement.output
    if requirement.measure in beside:
        found = beside[requirement.measure]
    else:
        found, output = _evaluated(requirement, evaluation)
    kept = requirement.holds(found.value)
    return Verdict(
        requirement.text, requirement.measure, output, requirement.sign, requirement.value, found.value,
        found.interval, kept,
    )  # fmt: skip


def _evaluated(requirement: Requirement, evaluation: Evaluation) -> tuple[Measured, str | None]:
    """What an evaluation tells of a requirement's measure, and the output that it is of."""
    name, field = requirement.measure, measures()[requirement.measure].field
    whole = None if requirement.output else getattr(evaluation, field, None)
    if whole is not None:
        interval = of_part(whole, evaluation.samples) if name in ("accuracy", "agreement") else None
        return Measured(float(whole), interval), None
    of_outputs = {key: getattr(each, field, each.distances.get(name)) for key, each in evaluation.outputs.items()}
    told = {key: float(value) for key, value in of_outputs.items() if value is not None}
    if requirement.output is not None:
        told = {key: value for key, value in told.items() if key == requirement.output}
    if not told:
        raise UsageError(f"--require {requirement.text!r}: {_why_unknown(requirement, evaluation)}")
    worst = (min if name in _LEAST_OF else max)(told, key=lambda key: told[key])
    return Measured(told[worst]), worst


def _why_unknown(requirement: Requirement, evaluation: Evaluation) -> str:
    if requirement.measure == "accuracy":
        return "the data have no labels, or no output holds class scores"
    outputs = ", ".join(f"'{name}' ({each.task})" for name, each in evaluation.outputs.items()) or "none"
    where = f"of output '{requirement.output}' " if requirement.output is not None else ""
    return f"no {requirement.measure} {where}is told; outputs and their tasks: {outputs}; --task says otherwise"
