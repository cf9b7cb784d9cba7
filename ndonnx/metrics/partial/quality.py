"""How much worse answers are than the teacher's: in the user's terms, smoothly, and with a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ndonnx.distill.tasks.fidelity import Fidelity
from ndonnx.distill.tasks.outputs import class_scores
from ndonnx.distill.tasks.scores import are_probabilities, nats, top_class
from ndonnx.errors import DataError, ModelError

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float64]
Kind = Literal["accuracy", "agreement", "nmse"]
Outputs = Mapping[str, Array]
"""TeacherOutputs by the name of the model's output, all samples."""


class Quality:
    """How much worse answers are than the teacher's on the same samples.

    Attributes:
        kind: `accuracy` where there are class scores and labels, `agreement` with the teacher's top class where
            there are class scores only, else `nmse`, the outputs' pooled normalised squared error.
        samples: how many.
    """

    def __init__(
        self,
        outputs: Outputs,
        labels: npt.NDArray[np.integer[Any]] | None = None,
        samples: int | None = None,
        like: Quality | None = None,
    ) -> None:
        """Take the teacher's answers as the measure.

        Args:
            outputs: the teacher's, all samples; `ndonnx.distill.tasks.outputs` says which of them holds class scores.
            labels: whole numbers (samples,), the classes; None where they are not known.
            samples: how many; None takes the length of the first float output.
            like: of other samples of the same data, which says already what the outputs hold.

        Raises:
            DataError: labels do not fit the answers.
            ModelError: there is no output that could be compared.
        """
        self._teacher = {name: value for name, value in outputs.items() if value.dtype.kind == "f" and value.size}
        if not self._teacher:
            raise ModelError("the model has no float output to compare answers by")
        self.samples = samples or next(len(value) if value.ndim else 1 for value in self._teacher.values())
        labelled = labels is not None
        self._scores: str | None = (
            like._scores if like else class_scores(self._teacher, self.samples, labelled=labelled)
        )
        self.kind: Kind = "nmse"
        if self._scores is None:
            return
        scores = self._teacher[self._scores]
        self._top = top_class(scores)
        self._probabilities: bool = like._probabilities if like else are_probabilities(scores)
        self.kind = "agreement" if labels is None else "accuracy"
        if labels is not None:
            self._labels = check_labels(labels, self.samples)
            wrong = np.flatnonzero((self._labels < 0) | (self._labels >= scores.shape[1]))
            if len(wrong):
                raise DataError(
                    f"sample {wrong[0]}: label {self._labels[wrong[0]]} is no class of the model, "
                    f"expected 0 to {scores.shape[1] - 1}; mend the labels"
                )

    def losses(self, outputs: Outputs) -> Losses:
        """What these answers lose; those to other samples can be added."""
        found = Losses(self.kind)
        found.add(self, outputs)
        return found

    def metric(self, outputs: Outputs) -> float:
        """The answers' own figure: accuracy, agreement (both 0 to 1, more is better), or NMSE (less is better)."""
        return self.losses(outputs).metric

    def drop(self, outputs: Outputs) -> float:
        """How much worse the answers are than the teacher's; 0 means as good (see `Losses.drop`)."""
        return self.losses(outputs).drop

    def divergence(self, outputs: Outputs) -> float:
        """A smooth measure: mean Kullback-Leibler divergence from the teacher in nats; NMSE without class scores."""
        return self.losses(outputs).divergence

    def bound(self, outputs: Outputs, confidence: float = 0.95, samples: int | None = None) -> float:
        """One-sided upper confidence bound of the drop (see `Losses.bound`)."""
        return self.losses(outputs).bound(confidence, samples)

    def drops(self, outputs: Outputs) -> tuple[Float, int]:
        """Where there are class scores: the drop of every sample, and how many of the answers are right.

        A drop is 1 where the answer is wrong and the teacher's right, -1 the other way round.
        """
        found, right = top_class(outputs[self._scores or ""]), self._labels if self.kind == "accuracy" else self._top
        return np.asarray((self._top == right).astype(np.float64) - (found == right)), int(np.sum(found == right))

    def nats(self, outputs: Outputs) -> float:
        """Sum over the samples of the divergence from the teacher's class scores."""
        ours, theirs = (values[self._scores or ""] for values in (outputs, self._teacher))
        total = nats(ours, theirs, probabilities=self._probabilities)
        return math.inf if math.isnan(total) else total

    def errors(self, outputs: Outputs, sums: dict[str, Fidelity]) -> Float:
        """Squared error of every sample, over all outputs; sums of errors and spreads are added to, by the output.

        Where the teacher itself is not finite (masks), the answer may be anything.
        """
        total = np.zeros(self.samples)
        for name, wanted in self._teacher.items():
            squared = sums.setdefault(name, Fidelity()).add(outputs[name], wanted)
            if wanted.ndim and len(wanted) == self.samples:
                total += squared
            else:  # no sample axis: every sample has the same part in it
                total += squared.sum() / self.samples
        return total


class Losses:
    """What answers lose against the teacher's, over as many batches of samples as are added.

    Attributes:
        kind: what a drop is of, see `Quality`.
    """

    def __init__(self, kind: Kind) -> None:
        """Losses of no samples yet."""
        self.kind = kind
        self._drops: list[Float] = []
        self._right = 0
        self._nats = 0.0
        self._sums: dict[str, Fidelity] = {}

    def add(self, quality: Quality, outputs: Outputs) -> None:
        """Take in the answers to a batch, of which `quality` has the teacher's."""
        if self.kind == "nmse":
            self._drops.append(quality.errors(outputs, self._sums))
            return
        drops, right = quality.drops(outputs)
        self._drops.append(drops)
        self._right += right
        self._nats += quality.nats(outputs)

    @property
    def samples(self) -> int:
        """How many there are."""
        return sum(map(len, self._drops))

    @property
    def metric(self) -> float:
        """The answers' own figure: accuracy, agreement (both 0 to 1, more is better), or NMSE (less is better)."""
        return self.drop if self.kind == "nmse" else self._right / self.samples

    @property
    def drop(self) -> float:
        """How much worse the answers are than the teacher's; 0 means as good.

        Accuracy: the teacher's less theirs (negative where they are better). Agreement: the part of the samples
        whose top class differs. NMSE of the outputs otherwise; inf where an answer is not finite.
        """
        return float(np.mean(self._of_samples))

    @property
    def divergence(self) -> float:
        """A smooth measure: mean Kullback-Leibler divergence from the teacher in nats; NMSE without class scores."""
        return self.drop if self.kind == "nmse" else max(0.0, self._nats) / self.samples

    def bound(self, confidence: float, samples: int | None = None) -> float:
        """One-sided upper confidence bound of the drop, over the drawing of the samples.

        With `samples`, the bound to expect of so many other samples on which the answers are as good as on these.

        Normal approximation for the mean of the paired differences, sample by sample. Where whole samples are
        counted, the variance is that of some more differing samples than were seen: so many that with none the
        bound is the exact binomial one, -ln(1 - confidence) / samples. No more than all can be lost.
        """
        drops = self._of_samples
        mean, z = float(np.mean(drops)), NormalDist().inv_cdf(confidence)
        if not math.isfinite(mean):
            return math.inf
        count = samples or len(drops)
        unseen = (math.log(1 - confidence) / z) ** 2 if self.kind != "nmse" else 0.0
        variance = float(np.mean(np.square(drops))) + unseen / count - mean * mean
        bound = mean + z * math.sqrt(max(0.0, variance) / count)
        return bound if self.kind == "nmse" else min(1.0, bound)

    @property
    def _of_samples(self) -> Float:
        """The drop of every sample; squared errors over the teacher's variance, so that their mean is the NMSE."""
        drops = np.concatenate(self._drops)
        if self.kind != "nmse" or not drops.any():
            return drops
        spread = sum(one.spread for one in self._sums.values())
        return np.asarray(drops * len(drops) / spread) if spread > 0 else np.where(drops > 0, np.inf, 0.0)


def check_labels(labels: npt.NDArray[np.integer[Any]], samples: int) -> npt.NDArray[np.int64]:
    """The labels of the first samples as int64; `DataError` where there are not as many."""
    if labels.ndim != 1 or len(labels) < samples:
        raise DataError(f"expected a label for each of {samples} samples, found {list(labels.shape)}; mend the labels")
    return labels[:samples].astype(np.int64)
