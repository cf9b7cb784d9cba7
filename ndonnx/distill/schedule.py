"""How long what is trained: by steps as the recipe says, or by a time budget for everything."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

from ndonnx.config.recipe import FINETUNE_FACTOR, Recipe
from ndonnx.distill.plan import Plan
from ndonnx.runtime.machine import computes_in_bf16, pick_device

_DISTIL_PART = 0.1
"""Part of a time budget for the neighbourhoods, where the whole student is fine-tuned after them."""
_ALONE_PART = 0.75
"""The same where it is not."""
_WORTH = 60
"""Steps for which that has to be time, where a fine-tuning follows. What a closed form has fitted gets little better in
fewer: of a reader of text trained for 23 to 33 steps each, in a sixth of the budget, no neighbourhood did."""
_RESERVE = 0.05
"""Part of a time budget left for the last checks."""
_ANSWERS_PART = 0.1
"""Part of a time budget for reading data and sending it through the teacher: before the neighbourhoods, and again
before fine-tuning."""
_REFIT_PART, _REFIT_TIMES, _LEAST_REFITTED = 0.04, 20, 64
"""Part of a time budget for the reconstruction down the chain; how many times longer than the teacher's own answer it
takes for a sample, about (8 times on a reader of text, 15 on a ResNet-20); and its fewest samples."""
_REFIT_SECONDS = 0.7
"""Seconds that it takes for a neighbourhood however few the samples are, about: its slices are opened for each."""
_STAGE_PART = 0.005
"""Part of a time budget for measuring the whole student, after each of three stages at most."""
_QUANTISE_PART = 0.15
"""Part of a time budget for choosing how the student is quantised, where it is."""
_IN_BITS_PART = 0.25
"""Part of a time budget for training it so, where all else is trained in float."""
_LEAST_SAMPLES = 256
"""Drawn in any case: where they take too long, the budget was too small."""
_SEEN = 2
"""Times that fine-tuning sees the same answer, where the images can be changed."""
_MOST_COPIES = 64
"""Of one image."""
_ENDLESS = 10**7
FIRST_LR, FIRST_FINETUNE_LR = 0.1, 0.01
"""Learning rates that are tried first, of a neighbourhood and of the whole: the best on a ResNet-20."""


@dataclass(frozen=True)
class Schedule:
    """Plans of training; the clock of a time budget runs from its making."""

    recipe: Recipe
    finetunable: bool
    """Whether the whole student can be fine-tuned, as far as is known beforehand."""
    rate: float = 0.0
    """Samples that are read and answered by the teacher in a second; needed with a time budget only."""
    _began: float = field(default_factory=time.perf_counter)

    @property
    def finetunes(self) -> bool:
        """Whether there is to be a fine-tuning."""
        return self.recipe.finetune_steps != 0 and (self.recipe.time_budget is not None or self.finetune_steps > 0)

    @property
    def alone(self) -> bool:
        """Whether the neighbourhoods are all that is trained, as far as is known beforehand."""
        return not (self.finetunable and self.finetunes)

    @property
    def finetune_steps(self) -> int:
        """Number of fine-tuning steps, without a time budget."""
        recipe = self.recipe
        return FINETUNE_FACTOR * recipe.steps if recipe.finetune_steps is None else recipe.finetune_steps

    def distil(self, jobs: int, workers: int) -> Plan:
        """Training plan of one neighbourhood, when `jobs` of them are trained by so many workers at a time."""
        recipe, seconds = self.recipe, None
        if recipe.time_budget is not None:
            part = _ALONE_PART if self.alone else _DISTIL_PART
            seconds = part * recipe.time_budget * min(workers, jobs) / max(1, jobs)
        steps = recipe.steps if seconds is None else min(_ENDLESS, max(recipe.steps, 1) * 1000)
        worth = 0 if seconds is None or self.alone else _WORTH
        return replace(self.plan(steps, seconds), worth=worth)

    def distil_samples(self, samples: int) -> int:
        """Samples of the neighbourhoods, when there are so many."""
        return samples if self.recipe.time_budget is None else min(samples, max(_LEAST_SAMPLES, self._answers))

    def finetune_samples(self) -> int:
        """Most samples of fine-tuning."""
        most = self.recipe.finetune_samples
        return most if self.recipe.time_budget is None else min(most, max(_LEAST_SAMPLES, self._answers))

    def reconstructs(self, students: int) -> bool:
        """Whether there is time to reconstruct so many students down the chain before a fine-tuning."""
        budget = self.recipe.time_budget
        return budget is None or self.alone or _REFIT_SECONDS * students <= _REFIT_PART * budget

    def refit_samples(self, samples: int) -> int:
        """Samples of the reconstruction down the chain, when there are so many."""
        return self._in_part(samples, _REFIT_PART / _REFIT_TIMES, _LEAST_REFITTED)

    def stage_samples(self, samples: int) -> int:
        """Samples on which the whole student is measured after a stage, when there are so many."""
        return self._in_part(samples, _STAGE_PART, _LEAST_SAMPLES)

    def _in_part(self, samples: int, part: float, least: int) -> int:
        """As many as the teacher answers in a part of a time budget, where there is one."""
        budget = self.recipe.time_budget
        return samples if budget is None else min(samples, max(least, int(part * budget * self.rate)))

    def per_sample(self, samples: int) -> int:
        """How often each of so many images comes in fine-tuning, changed each time; 1 is as they are."""
        recipe = self.recipe
        seen = self.finetune_steps * recipe.batch_size / _SEEN
        answers = seen if recipe.time_budget is None else self._answers
        return max(1, min(_MOST_COPIES, round(answers / samples)))

    @property
    def _answers(self) -> int:
        """Number of samples that the teacher answers in their part of a time budget."""
        return int(_ANSWERS_PART * (self.recipe.time_budget or 0.0) * self.rate)

    def finetune(self) -> Plan:
        """Training plan of the whole student; with a time budget, in what is left of it."""
        if self.recipe.time_budget is None:
            return self.plan(self.finetune_steps, whole=True)
        kept = _QUANTISE_PART + _IN_BITS_PART if self.recipe.quantises else 0.0
        return self.plan(_ENDLESS, max(1.0, self._left(kept)), whole=True)

    def finetune_in_bits(self) -> Plan:
        """Training plan of the whole student that rounds; with a time budget, in all that is left of it."""
        if self.recipe.time_budget is None:
            return self.plan(-(-self.finetune_steps // FINETUNE_FACTOR), whole=True)
        return self.plan(_ENDLESS, max(1.0, self._left(0.0)), whole=True)

    def _left(self, kept: float) -> float:
        """Seconds that are left of a time budget, but for a part of it and what the last checks take."""
        return (1 - _RESERVE - kept) * (self.recipe.time_budget or 0.0) - (time.perf_counter() - self._began)

    def chosen(self) -> float | None:
        """Reading of `time.perf_counter` by which is chosen how the student is quantised; None without a time budget.

        From now on, as what comes before may have ended early: the rest is for training it so.
        """
        budget = self.recipe.time_budget
        if budget is None:
            return None
        return time.perf_counter() + min(self._left(0.0), _QUANTISE_PART * budget if self.finetunes else math.inf)

    def plan(self, steps: int, seconds: float | None = None, *, whole: bool = False) -> Plan:
        """Plan of any training, by the recipe: of a neighbourhood, or of the whole."""
        recipe = self.recipe
        told, first = (recipe.finetune_lr, FIRST_FINETUNE_LR) if whole else (recipe.lr, FIRST_LR)
        device = pick_device(recipe.device)
        measured = recipe.precision == "auto" and device == "cpu"
        bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and not measured and computes_in_bf16(device))
        return Plan(
            steps,
            recipe.batch_size,
            first if told is None else told,
            recipe.warmup,
            recipe.seed,
            device,
            bf16,
            seconds,
            optimiser=recipe.optimiser,
            tries=told is None,
            fastest=measured,
        )
