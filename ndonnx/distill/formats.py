"""Number format and memory layout of a training step on a CPU: which is fastest differs by module and by machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_STEPS = 100
"""Of a training, from which formats are timed: at most eight gradients go to that."""
_ROUNDS = 2
"""Gradients in each format; the first is there to warm up, the last one counts."""
_ROUNDED = 0.01
"""Part of the error at the start that rounding to bfloat16 may add. A training takes off most of that error, and what
is left has to be larger than what the format itself puts in."""
_GAIN = 0.9
"""Of float32's time, which bfloat16 has to take less than: it is the coarser one."""
_IMAGE_RANK = 4


@dataclass(frozen=True)
class Format:
    """How the values of a step are held."""

    bf16: bool = False
    """Whether the forward pass computes in bfloat16."""
    channels_last: bool = False
    """Whether images (N, C, H, W) lie in memory channel by channel at each place; convolutions hand that on."""

    def __str__(self) -> str:
        """In words, for reports."""
        number = "bf16" if self.bf16 else "fp32"
        return f"{number}, channels last" if self.channels_last else number

    def held(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A stored tensor on a device as a module reads it in this format; integers keep their type."""
        if not tensor.is_floating_point():
            return tensor.to(device)
        found = tensor.to(device, torch.bfloat16 if self.bf16 else torch.float32)
        return found.contiguous(memory_format=torch.channels_last) if self.lays_out(found) else found

    def lays_out(self, tensor: Tensor) -> bool:
        """Whether a tensor's layout is another one in this format."""
        return self.channels_last and tensor.ndim == _IMAGE_RANK


def usual(*, bf16: bool, device: str) -> Format:
    """The format where nothing is measured, so that the same steps give the same student on every machine.

    Convolutions in float32 are faster with channels last on every CPU tried; in bfloat16 it depends.
    """
    return Format(bf16, channels_last=device == "cpu" and not bf16)


def rivals(ranks: Sequence[int], *, bf16: bool) -> list[Format]:
    """Formats worth timing for inputs of these ranks, the first in float32.

    Args:
        ranks: number of axes of each input, samples included.
        bf16: whether the machine computes in bfloat16.
    """
    layouts = (False, True) if _IMAGE_RANK in ranks else (False,)
    return [Format(number, layout) for number in ((False, True) if bf16 else (False,)) for layout in layouts]


def fastest(formats: Sequence[Format], seconds: Callable[[Format], float], rounds_off: Callable[[], bool]) -> Format:
    """The format in which a gradient takes least time.

    Args:
        formats: at least one in float32 among them.
        seconds: computes one gradient in a format, and tells its time.
        rounds_off: whether bfloat16 is too coarse for the module; asked only where it is the fastest.
    """
    times: dict[Format, float] = {}
    for _ in range(_ROUNDS):
        for each in formats:
            times[each] = seconds(each)
    best = min(times, key=lambda each: times[each])
    full = min((each for each in times if not each.bf16), key=lambda each: times[each])
    return best if times[best] < _GAIN * times[full] and not rounds_off() else full


def is_too_coarse(rounding: float, error: float) -> bool:
    """Whether rounding to bfloat16 is too much beside the error of the start, both as NMSE."""
    return not rounding <= _ROUNDED * error
