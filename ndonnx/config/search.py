"""The `[search]` table of a recipe: how the candidates of a search are trained, measured and chosen."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ndonnx.config.panel import Panel
from ndonnx.config.setting import Flag, Section
from ndonnx.config.values import Names


class SearchRecipe(Section):
    """How the candidates of a search are trained, measured and chosen."""

    candidates: Annotated[Names, Flag("NAME", Panel.BUILD, repeatable=True)] = ()
    """Candidates tried in every neighbourhood, separated by commas: `width K`, `sparsity S`, `lowrank K`, `activation`,
    `removal`; with `+ int8` behind it one is in 8 bits, and `int8` is the teacher's own slice in 8 bits. Default:
    width 0.1 to 0.9, lowrank 0.3 to 0.75."""
    steps: Annotated[int | None, Flag("N", Panel.TRAIN)] = Field(None, ge=0)
    """Number of optimizer steps of a candidate in the search. Default: a fifth of the recipe's `steps`, 200."""
    quality: Annotated[Literal["divergence", "metric", "nmse"], Flag("NAME", Panel.REACH)] = "divergence"
    """Quality loss by which candidates are compared: divergence from the teacher of the model with it alone
    (`divergence`), drop of the metric (`metric`, the paper's), or its own NMSE times the sensitivity of its
    neighbourhood (`nmse`, cheap)."""
    solver: Annotated[Literal["milp", "greedy"], Flag("milp|greedy", Panel.REACH)] = "milp"
    """Solver that chooses a candidate for each neighbourhood: an exact 0/1 linear programme (`milp`), or the paper's
    threshold on each neighbourhood alone (`greedy`)."""
    samples: Annotated[int, Flag("N", Panel.TRAIN, name="--held-out")] = Field(2000, ge=2)
    """Number of held-out samples on which candidates are measured; whole students are chosen by twice as many, and
    a promised drop is tested on five times as many others."""
    attempts: int = Field(3, ge=0)
    """Number of corrections of the choice after a whole student was measured, or failed the test of a promise."""
    early_stop: bool = True
    """Skip candidates smaller than one that alone loses far more quality than `max_drop` allows. Default: `true`."""
