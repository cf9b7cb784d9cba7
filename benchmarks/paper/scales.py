"""How long the tables take: which settings are tried, and how many steps each gets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Settings of all tables."""

    keeps: tuple[float, ...]
    """Multipliers k of table 1."""
    hardened_keeps: tuple[float, ...]
    """Multipliers of table 5."""
    free_keeps: tuple[float, ...]
    """Multipliers of table 4."""
    sparsities: tuple[float, ...]
    look_aheads: tuple[int, ...]
    """Of table 6; the first one is 0."""
    ordered_look_aheads: tuple[int, ...]
    """The same of neighbourhoods in order; a number beyond the chain looks as far as the output."""
    equal_times: tuple[int, ...]
    """Look-aheads whose time is also given to none."""
    middle: float
    """The multiplier of tables 6 and 7."""
    samples: int | None
    """Training images; None for all."""
    steps: int
    """Of a neighbourhood."""
    layer_steps: int
    """Of a layer, in table 3, where there are more of them."""
    look_ahead_steps: int
    """Of a neighbourhood in table 6."""
    finetune_steps: int
    harden_steps: int
    noise: float
    """Of the hardening: a part of each activation's deviation."""
    sweep_seconds: float
    """Of every learning rate that a baseline tries."""
    sweep_once: bool
    """Whether a baseline's learning rate is chosen once, at the first k, and not anew for every k."""
    learning_rates: tuple[float, ...]
    baseline_factors: tuple[float, ...]
    """Budgets of KD from scratch in units of what ND and its fine-tuning took; the other baselines get the last one."""
    baseline_seconds: float | None = None
    """A budget to put in place of ND's time."""
    checkpoints: int = 6
    """Times that KD from scratch is judged in each of its budgets."""
    study_samples: int = 300
    """By which noise and searched students are judged, in figures 1, 4, 6 and 7."""
    study_repeats: int = 3
    """Draws of the noise."""
    searched: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Widths among which figure 7 searches."""
    search_steps: int = 50
    """Of a candidate there."""
    front: int = 5
    """Students on its curve."""


SMALL = Scale(
    keeps=(0.75, 0.5, 0.4),
    hardened_keeps=(0.75, 0.5),
    free_keeps=(0.9, 0.75, 0.5),
    sparsities=(0.5, 0.7, 0.8),
    look_aheads=(0, 2),
    ordered_look_aheads=(0, 10),
    equal_times=(2,),
    middle=0.5,
    samples=8000,
    steps=500,
    layer_steps=200,
    look_ahead_steps=300,
    finetune_steps=500,
    harden_steps=400,
    noise=0.3,
    sweep_seconds=8.0,
    sweep_once=True,
    learning_rates=(1e-3, 3e-3, 1e-2),
    baseline_factors=(1.25,),
)
"""All tables in under an hour on two cores, for a ResNet-20 on 32x32 images."""

FULL = Scale(
    keeps=(1.0, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4),
    hardened_keeps=(0.75, 0.5),
    free_keeps=(0.9, 0.75, 0.5),
    sparsities=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    look_aheads=(0, 1, 2, 4),
    ordered_look_aheads=(0, 2, 4, 10),
    equal_times=(1, 2, 4),
    middle=0.5,
    samples=None,
    steps=5000,
    layer_steps=2000,
    look_ahead_steps=3000,
    finetune_steps=5000,
    harden_steps=5000,
    noise=0.3,
    sweep_seconds=60.0,
    sweep_once=False,
    learning_rates=(3e-4, 1e-3, 3e-3, 1e-2),
    baseline_factors=(0.5, 1.0, 2.0),
    study_samples=2000,
    searched=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    search_steps=500,
    front=9,
)
"""The paper's settings, ten times the steps, and all images."""

SCALES = {"small": SMALL, "full": FULL}
