"""How to fine-tune it: end-to-end distillation of the assembled student."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ndonnx.config.panel import Panel
from ndonnx.config.setting import Flag, Section
from ndonnx.config.values import Augmentations, Tasks

FINETUNE_FACTOR = 3
"""Number of fine-tuning steps for each step of a neighbourhood, where the recipe does not set `finetune_steps`."""


class Finetuning(Section):
    """Settings of the end-to-end distillation of the assembled student: steps, samples, augmentation, loss."""

    finetune_steps: Annotated[int | None, Flag("N", Panel.TRAIN)] = Field(None, ge=0)
    """Number of fine-tuning steps of the whole student against the teacher's outputs (equation 3 of the paper).
    Default: three times the steps per neighbourhood."""
    finetune_samples: Annotated[int, Flag("N", Panel.TRAIN)] = Field(50_000, ge=2)
    """Maximum number of fine-tuning samples, of which only inputs and outputs are stored."""
    augment: Annotated[Augmentations, Flag("KINDS", Panel.TRAIN)] = ("auto",)
    """Augmentation of images in fine-tuning: `flip`, `shift` and `mixup`, separated by commas, `none`, or `auto`: those
    of `flip` and `shift` that hardly change the teacher's answers. The teacher labels every augmented image."""
    finetune_lr: Annotated[float | None, Flag("RATE", Panel.TRAIN)] = Field(None, gt=0)
    """Peak learning rate of fine-tuning, relative to the root mean square of each weight. Default: found by short
    trials, the first at 0.01; trainings of fewer than 1,000 steps begin at that and go down where it leads nowhere."""
    task: Annotated[Tasks, Flag("KIND", Panel.TRAIN, repeatable=True)] = ()
    """What the outputs mean, which decides the loss of fine-tuning and what is told of the student: `classification`
    (of whole samples or of each position), `multilabel` (probabilities that do not exclude each other, maps of a
    detector), `embedding`, `regression` or `auto`; `NAME=KIND` for one output;
    `module:function` for a loss of one's own, of the student's and the teacher's tensors. Default: auto, which goes by
    the teacher's answers, the labels and the output's name."""
    temperature: Annotated[float | None, Flag("T", Panel.TRAIN)] = Field(None, gt=0)
    """Softmax temperature of the distillation loss in fine-tuning. Default: 4, or as much less as the teacher needs to
    know its first class still."""
    label_weight: Annotated[float, Flag("FRACTION", Panel.TRAIN)] = Field(0.0, ge=0, le=1)
    """Weight of the labels' cross-entropy in the fine-tuning loss; the distillation loss has the rest."""
