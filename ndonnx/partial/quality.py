"""How much worse answers are than the teacher's: in the user's terms, smoothly, and with a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ndonnx.errors import DataError, ModelError
from ndonnx.evaluate import log_probabilities, top_class
from ndonnx.task import are_probabilities, class_scores

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]
"""Answers by the name of the model's output, all samples."""


class Quality:
    """How much worse answers are than the teacher's on the same samples.

    Attributes:
        kind: `accuracy` where there are class scores and labels, `agreement` with the teacher's top class where
            there are class scores only, else `nmse`, the outputs' pooled normalised squared error.
        samples: how many.
    """

    def __init__(
        self, outputs: Outputs, labels: npt.NDArray[np.integer[Any]] | None = None, samples: int | None = None
    ) -> None:
        """Take the teacher's answers as the measure.

        Args:
            outputs: the teacher's, all samples; `ndonnx.task` says which of them holds class scores.
            labels: whole numbers (samples,), the classes; None where they are not known.
            samples: how many; None takes the length of the first float output.

        Raises:
            DataError: labels do not fit the answers.
            ModelError: there is no output that could be compared.
        """
        self._teacher = {name: value for name, value in outputs.items() if value.dtype.kind == "f" and value.size}
        if not self._teacher:
            raise ModelError("the model has no float output to compare answers by")
        self.samples = samples or next(len(value) if value.ndim else 1 for value in self._teacher.values())
        self._scores = class_scores(self._teacher, self.samples, labelled=labels is not None)
        self.kind: Literal["accuracy", "agreement", "nmse"] = "nmse"
        if self._scores is None:
            return
        scores = self._teacher[self._scores]
        self._top = top_class(scores)
        self._log_p = log_probabilities(scores, are_probabilities(scores))
        self.kind = "agreement" if labels is None else "accuracy"
        if labels is not None:
            self._labels = check_labels(labels, self.samples)
            wrong = np.flatnonzero((self._labels < 0) | (self._labels >= scores.shape[1]))
            if len(wrong):
                raise DataError(
                    f"sample {wrong[0]}: label {self._labels[wrong[0]]} is no class of the model, "
                    f"expected 0 to {scores.shape[1] - 1}; mend the labels"
                )

    def metric(self, outputs: Outputs) -> float:
        """The answers' own figure: accuracy, agreement (both 0 to 1, more is better), or NMSE (less is better)."""
        if self.kind == "nmse":
            return self.drop(outputs)
        return float(np.mean(top_class(outputs[self._scores or ""]) == self._right))

    def drop(self, outputs: Outputs) -> float:
        """How much worse the answers are than the teacher's; 0 means as good.

        Accuracy: the teacher's less theirs (negative where they are better). Agreement: the part of the samples
        whose top class differs. NMSE of the outputs otherwise; inf where an answer is not finite.
        """
        return float(np.mean(self._drops(outputs)))

    def divergence(self, outputs: Outputs) -> float:
        """A smooth measure: mean Kullback-Leibler divergence from the teacher in nats; NMSE without class scores."""
        if self._scores is None:
            return float(np.mean(self._errors(outputs)))
        scores = outputs[self._scores]
        log_q = log_probabilities(scores, are_probabilities(self._teacher[self._scores]))
        possible = np.exp(self._log_p) > 0  # a class that the teacher masks adds nothing
        total = float(np.sum(np.exp(self._log_p[possible]) * (self._log_p[possible] - log_q[possible])))
        return math.inf if math.isnan(total) else max(0.0, total) / self.samples

    def bound(self, outputs: Outputs, confidence: float = 0.95, samples: int | None = None) -> float:
        """One-sided upper confidence bound of the drop, over the drawing of the samples.

        With `samples`, the bound to expect of so many other samples on which the answers are as good as on these.

        Normal approximation for the mean of the paired differences, sample by sample. Where whole samples are
        counted, the variance is that of some more differing samples than were seen: so many that with none the
        bound is the exact binomial one, -ln(1 - confidence) / samples. No more than all can be lost.
        """
        drops = self._drops(outputs)
        mean, z = float(np.mean(drops)), NormalDist().inv_cdf(confidence)
        if not math.isfinite(mean):
            return math.inf
        count = samples or self.samples
        unseen = (math.log(1 - confidence) / z) ** 2 if self.kind != "nmse" else 0.0
        variance = float(np.mean(np.square(drops))) + unseen / count - mean * mean
        bound = mean + z * math.sqrt(max(0.0, variance) / count)
        return bound if self.kind == "nmse" else min(1.0, bound)

    @property
    def _right(self) -> npt.NDArray[np.int64]:
        return self._labels if self.kind == "accuracy" else self._top

    def _drops(self, outputs: Outputs) -> npt.NDArray[np.float64]:
        """Of every sample."""
        if self.kind == "nmse":
            return self._errors(outputs)
        found = top_class(outputs[self._scores or ""])
        return np.asarray((self._top == self._right).astype(np.float64) - (found == self._right))

    def _errors(self, outputs: Outputs) -> npt.NDArray[np.float64]:
        """Of every sample: its squared error over the teacher's variance, so that their mean is the pooled NMSE.

        Where the teacher itself is not finite (masks), the answer may be anything.
        """
        total, spread = np.zeros(self.samples), 0.0
        for name, wanted in self._teacher.items():
            finite = np.isfinite(wanted)
            teacher = np.where(finite, wanted, 0).astype(np.float64)
            difference = np.where(finite, outputs[name].astype(np.float64) - teacher, 0)
            difference[np.isnan(difference)] = np.inf
            squared = np.square(difference)
            if wanted.ndim and len(wanted) == self.samples:
                total += squared.reshape(self.samples, -1).sum(axis=1)
            else:  # no sample axis: every sample has the same part in it
                total += squared.sum() / self.samples
            if finite.any():
                spread += float(np.sum(np.square(teacher[finite] - teacher[finite].mean())))
        if not total.any():
            return total
        return np.asarray(total * self.samples / spread) if spread > 0 else np.where(total > 0, np.inf, 0.0)


def check_labels(labels: npt.NDArray[np.integer[Any]], samples: int) -> npt.NDArray[np.int64]:
    """The labels of the first samples as int64; `DataError` where there are not as many."""
    if labels.ndim != 1 or len(labels) < samples:
        raise DataError(f"expected a label for each of {samples} samples, found {list(labels.shape)}; mend the labels")
    return labels[:samples].astype(np.int64)
