"""How to train it: distillation of the neighbourhoods."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ndonnx.config.panel import Panel
from ndonnx.config.setting import Flag, Section
from ndonnx.config.values import Duration


class Training(Section):
    """Settings of the distillation of the neighbourhoods: data, loss, optimizer, steps."""

    data_free: Annotated[bool, Flag("", Panel.TRAIN)] = False
    """Train on synthetic inputs where no data are given."""
    inputs: Annotated[Literal["teacher", "student", "refit", "noise"] | None, Flag("WHOSE", Panel.TRAIN)] = None
    """Training inputs of a neighbourhood: the teacher's activations (`teacher`, the paper's parallel method), those of
    the students before it (`student`, sequential), the teacher's and then a closed-form fit on the students' (`refit`),
    or Gaussian noise (`noise`). Default: `refit` before a fine-tuning and in a search, else `student`."""
    steps: Annotated[int, Flag("N", Panel.TRAIN)] = Field(1000, ge=0)
    """Number of optimizer steps per neighbourhood."""
    batch_size: Annotated[int, Flag("N", Panel.TRAIN)] = Field(64, ge=1)
    """Maximum number of samples per optimizer step; as few as 16 where they have more than 65,536 positions
    together."""
    lr: Annotated[float | None, Flag("RATE", Panel.TRAIN)] = Field(None, gt=0)
    """Peak learning rate, relative to the root mean square of each weight. Default: found for each neighbourhood by
    short trials, the first at 0.1; trainings of fewer than 1,000 steps begin at that and go down where it leads
    nowhere."""
    optimiser: Annotated[Literal["muon", "adam"], Flag("muon|adam", Panel.TRAIN)] = "muon"
    """Optimizer for weight matrices: Muon where its orthogonalisation is cheap, otherwise Adam; all else has Adam."""
    warmup: Annotated[float, Flag("FRACTION", Panel.TRAIN)] = Field(0.05, ge=0, le=1)
    """Fraction of the steps over which the learning rate rises linearly."""
    look_ahead: Annotated[int, Flag("N", Panel.TRAIN)] = Field(0, ge=0)
    """Number of teacher slices after a neighbourhood through which its error is measured too (equations 4 and 5 of the
    paper)."""
    look_ahead_weights: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...], Flag("WEIGHT", Panel.TRAIN, repeatable=True)
    ] = ()
    """Weight of the look-ahead loss after each of these slices, the nearest first. Default: 1 for each."""
    time_budget: Annotated[Duration | None, Flag("TIME", Panel.TRAIN)] = None
    """Time until the student is written (`90s`, `3m`, `1h`), to which the numbers of steps are fitted. Default: as long
    as the steps take."""
    holdout: Annotated[float, Flag("FRACTION", Panel.TRAIN)] = Field(0.05, gt=0, lt=1)
    """Fraction of the training samples held out to choose the best state of a training."""
    samples: Annotated[int, Flag("N", Panel.TRAIN)] = Field(16_000, ge=2)
    """Maximum number of training samples of a neighbourhood, drawn at random."""
    parity: Annotated[float, Flag("ERROR", Panel.TRAIN)] = Field(1e-4, gt=0)
    """Largest error of a slice converted to torch against onnxruntime, relative to the scale of its output. One that is
    small everywhere and next to nothing beside the output's spread passes too, as rounding of long sums is."""
    seed: Annotated[int, Flag("N", Panel.TRAIN)] = Field(0, ge=0, lt=2**31)
    """Seed of all random draws."""
