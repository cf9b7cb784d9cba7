"""What a neighbourhood is trained on, and how its error is reported."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""Answer and target, float32 with the sample axis first, to a scalar: the mean over samples."""


def neighbourhood_loss(answer: Tensor, target: Tensor) -> Tensor:
    """Mean squared error against the teacher's activations (section 3, equation 2), in float32."""
    return F.mse_loss(answer.float(), target.float())


def distillation_loss(temperature: float) -> Loss:
    """Softened cross-entropy between class scores, without labels (equation 3 with a label weight of 0).

    The Kullback-Leibler divergence of the student's class distribution from the teacher's, both
    softened by the temperature T, times T^2 so that gradients keep their size (Hinton et al. 2015).
    """

    def loss(answer: Tensor, target: Tensor) -> Tensor:
        student = F.log_softmax(answer / temperature, dim=-1)
        teacher = F.log_softmax(target / temperature, dim=-1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2

    return loss


def target_variance(target: Tensor) -> float:
    """Variance of the target over samples, mean over all other axes: the scale of the NMSE.

    A student that answered with the teacher's mean activation would have an NMSE of 1.
    """
    values = target.double()
    return float(values.var(dim=0, correction=0).mean())


def nmse(squared_error: float, variance: float) -> float:
    """Mean squared error over the target's variance; the plain error where the target is constant."""
    return squared_error / variance if variance > torch.finfo(torch.float32).tiny else squared_error
