"""What students are trained on: the paper's losses, each a function of the answer and of captured values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
    size of the gradients (Hinton et al. 2015). Without labels w is 0. Scores have their classes on the last axis.
    """

    def __init__(self, target: str, temperature: float, label_weight: float = 0.0) -> None:
        self.target = target
        self.temperature = temperature
        self.label_weight = label_weight
        self.values = (target, LABEL) if label_weight > 0 else (target,)

    def __call__(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        classes = answer.shape[-1]
        student = F.log_softmax(answer / self.temperature, dim=-1).reshape(-1, classes)
        teacher = F.log_softmax(captured[self.target] / self.temperature, dim=-1).reshape(-1, classes)
        soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature**2
        if self.label_weight == 0:
            return soft
        hard = F.cross_entropy(answer.reshape(-1, classes), captured[LABEL].reshape(-1).long())
        return (1 - self.label_weight) * soft + self.label_weight * hard


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
