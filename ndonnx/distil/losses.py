"""What a neighbourhood is trained on, and how its error is reported."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbourhood_loss(answer: Tensor, target: Tensor) -> Tensor:
    """Mean squared error against the teacher's activations (section 3, equation 2), in float32."""
    return F.mse_loss(answer.float(), target.float())


def target_variance(target: Tensor) -> float:
    """Variance of the target over samples, mean over all other axes: the scale of the NMSE.

    A student that answered with the teacher's mean activation would have an NMSE of 1.
    """
    values = target.double()
    return float(values.var(dim=0, correction=0).mean())


def nmse(squared_error: float, variance: float) -> float:
    """Mean squared error over the target's variance; the plain error where the target is constant."""
    return squared_error / variance if variance > torch.finfo(torch.float32).tiny else squared_error
