"""What students are trained on: losses, each a function of the answer and of captured values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 2**22
"""Numbers that are converted at a time."""
LABEL = "label"
"""Under this name an objective finds the class numbers of the samples, where there are any."""


class Objective(ABC):
    """A loss, with the names of the captured values that it compares the answer with."""

    target: str
    """The teacher's value that the answer stands for."""
    values: tuple[str, ...]
    """All that is read besides the module's inputs, the target among them."""

    @abstractmethod
    def __call__(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        """Mean over samples; `answer` is float32, `captured` holds `values`, floats as float32."""

    def reference(self, captured: Mapping[str, Tensor]) -> Tensor:
        """What the answer is compared with for its NMSE."""
        return captured[self.target]

    def compared(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        """The answer as it is compared with `reference`."""
        del captured
        return answer

    def to(self, device: torch.device) -> None:
        """Move what it computes with."""
        del device


class NeighbourhoodLoss(Objective):
    """Mean squared error against the teacher's activations (section 3, equation 2)."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.values = (target,)

    def __call__(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        return F.mse_loss(answer, captured[self.target])


@dataclass(frozen=True)
class Head:
    """A teacher slice after the neighbourhood: frozen, and looked through."""

    module: nn.Module
    context: tuple[str, ...]
    """Further inputs after the stream, captured from the teacher."""
    output: str
    """The teacher's value that it computes."""


class LookAheadLoss(Objective):
    """The neighbourhood's own error, and those that it leaves after the next teacher slices (appendix B.2).

    The student's answer y goes through the frozen teacher slices T1, T2, ... one after the other
    (equation 4); after each, the squared error against the teacher's activation there counts with
    its weight (equation 5): |y - t|^2 + w1 |T1(y) - t1|^2 + w2 |T2(T1(y)) - t2|^2 + ...
    Every term is the mean over samples and elements; those of the slices are brought to the size of the first by the
    ratio of `scales`, the variances of the values.
    """

    def __init__(self, target: str, heads: Sequence[Head], weights: Sequence[float]) -> None:
        if len(heads) != len(weights):
            raise ValueError(f"{len(heads)} slices to look through, but {len(weights)} weights")
        self.target = target
        self.heads = tuple(heads)
        self.weights = tuple(weights)
        further = (name for head in heads for name in (*head.context, head.output))
        self.values = tuple(dict.fromkeys((target, *further)))
        self.scales: dict[str, float] = {}
        for head in heads:
            head.module.requires_grad_(False)

    def __call__(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        total = F.mse_loss(answer, captured[self.target])
        value = answer
        for head, weight in zip(self.heads, self.weights, strict=True):
            value = head.module(value, *(captured[name] for name in head.context))
            error = F.mse_loss(value.float(), captured[head.output])
            total = total + weight * self._ratio(head) * error
        return total

    def _ratio(self, head: Head) -> float:
        """Brings an error at the head's output to the size of one at the target; 1 where scales are not known."""
        own, other = self.scales.get(self.target, 1.0), self.scales.get(head.output, 1.0)
        return own / other if other > 0 else 0.0

    def to(self, device: torch.device) -> None:
        for head in self.heads:
            head.module.to(device)


class DistillationLoss(Objective):
    """Cross-entropy of softened class scores, and that of labels where they are given (section 3, equation 3).

    (1 - w) T^2 KL(teacher at T || student at T) + w CE(label, student): the factor T^2 keeps the
    size of the gradients (Hinton et al. 2015). Without labels w is 0. Where there are positions, each has classes of
    its own, and the mean is over all of them. Probabilities are compared at the input of their softmax, which their
    logarithms are but for a constant.
    """

    def __init__(
        self,
        target: str,
        temperature: float,
        label_weight: float = 0.0,
        *,
        axis: int = -1,
        least_probability: float | None = None,
    ) -> None:
        """Compare class scores.

        Args:
            target: name of the teacher's value.
            temperature: T, above 0.
            label_weight: w, from 0 to 1.
            axis: along which the classes lie.
            least_probability: where the scores are probabilities, what is less is taken for this before its logarithm.
                None: they are logits, or logarithms already.
        """
        self.target = target
        self.temperature = temperature
        self.label_weight = label_weight
        self.axis = axis
        self.least_probability = least_probability
        self.values = (target, LABEL) if label_weight > 0 else (target,)

    def __call__(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        scores, wanted = self._logits(answer), self._logits(captured[self.target])
        student, teacher = (F.log_softmax(each / self.temperature, dim=-1) for each in (scores, wanted))
        soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature**2
        if self.label_weight == 0:
            return soft
        hard = F.cross_entropy(scores, captured[LABEL].reshape(-1).long())
        return (1 - self.label_weight) * soft + self.label_weight * hard

    def _logits(self, scores: Tensor) -> Tensor:
        """Float (positions, classes)."""
        last = scores.movedim(self.axis, -1).reshape(-1, scores.shape[self.axis])
        return last if self.least_probability is None else last.clamp(min=self.least_probability).log()


class MultilabelLoss(Objective):
    """For probabilities that do not exclude each other: the divergence of each number's two answers from the teacher's.

    t log(t / s) + (1 - t) log((1 - t) / (1 - s)), the mean over all numbers, over that of a constant answer, which
    therefore costs 1, as it does in squared errors.
    """

    def __init__(self, target: str, constant: float, least_probability: float) -> None:
        """Compare probabilities.

        Args:
            target: name of the teacher's value.
            constant: divergence of the teacher's mean answer, in nats, above 0.
            least_probability: what is less than this, or nearer to 1, is taken for this before its logarithm.
        """
        self.target = target
        self.constant = constant
        self.least_probability = least_probability
        self.values = (target,)

    def __call__(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        least = self.least_probability
        ours, theirs = (each.float().clamp(least, 1 - least) for each in (answer, captured[self.target]))
        entropy = F.binary_cross_entropy(theirs, theirs)
        return (F.binary_cross_entropy(ours, theirs) - entropy) / self.constant


class EmbeddingLoss(Objective):
    """For vectors: one minus the cosine with the teacher's, and the squared error over its variance."""

    def __init__(self, target: str, variance: float) -> None:
        self.target = target
        self.variance = variance
        self.values = (target,)

    def __call__(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        wanted = captured[self.target]
        turned = 1 - F.cosine_similarity(answer, wanted, dim=-1)
        return turned.mean() + F.mse_loss(answer, wanted) / self.variance


class RegressionLoss(Objective):
    """Squared error over the variance of the teacher's values: a mean answer costs 1, whatever their size."""

    def __init__(self, target: str, variance: float) -> None:
        self.target = target
        self.variance = variance
        self.values = (target,)

    def __call__(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        return F.mse_loss(answer, captured[self.target]) / self.variance


class FunctionLoss(Objective):
    """A function of the student's and the teacher's tensors, float32 (samples, ...), a scalar."""

    def __init__(self, target: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.target = target
        self.function = function
        self.values = (target,)

    def __call__(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        return self.function(answer, captured[self.target])


class SeveralLosses(Objective):
    """The losses of several outputs, added up; the answer holds all outputs side by side, (samples, numbers)."""

    def __init__(self, losses: Sequence[Objective], variances: Sequence[float]) -> None:
        """Add losses up.

        Args:
            losses: one an output, in the order of the outputs in the answer.
            variances: of the teacher's values, by which each output counts alike in the NMSE.
        """
        self.losses = tuple(losses)
        self.target = losses[0].target
        self.values = tuple(dict.fromkeys(value for loss in losses for value in loss.values))
        self._scales = [variance**-0.5 for variance in variances]

    def __call__(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        parts = self._apart(answer, [captured[loss.target] for loss in self.losses])
        losses = [loss(part, captured) for loss, part in zip(self.losses, parts, strict=True)]
        return torch.stack(losses).sum()

    def reference(self, captured: Mapping[str, Tensor]) -> Tensor:
        return self._beside([captured[loss.target] for loss in self.losses])

    def compared(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        return self._beside(self._apart(answer, [captured[loss.target] for loss in self.losses]))

    def _beside(self, outputs: Sequence[Tensor]) -> Tensor:
        scaled = (each.reshape(len(each), -1) * scale for each, scale in zip(outputs, self._scales, strict=True))
        return torch.cat(list(scaled), dim=1)

    def _apart(self, answer: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
        parts = torch.split(answer, [each[0].numel() for each in wanted], dim=1)
        return [part.reshape(each.shape) for part, each in zip(parts, wanted, strict=True)]


def target_variance(target: Tensor) -> float:
    """Variance of the target over samples, mean over all other axes: the scale of the NMSE.

    A student that answered with the teacher's mean activation would have an NMSE of 1.
    """
    columns = target.reshape(len(target), -1)
    step = max(1, _CHUNK // len(target))  # in double precision all of them would be twice as large again
    parts = [part.double().var(dim=0, correction=0).sum() for part in torch.split(columns, step, dim=1)]
    return float(sum(parts)) / max(1, columns.shape[1])


def nmse(squared_error: float, variance: float) -> float:
    """Mean squared error over the target's variance; the plain error where the target is constant."""
    return squared_error / variance if variance > torch.finfo(torch.float32).tiny else squared_error
