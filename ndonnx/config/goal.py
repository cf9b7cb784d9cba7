"""What to reach: the cost of the student, the quality that it may lose, and the errors that its parts may make."""

from __future__ import annotations

from typing import Annotated

from ndonnx.config.panel import Panel
from ndonnx.config.setting import Flag, Section
from ndonnx.config.values import BaselineNames, Drop, Names


class Goal(Section):
    """Settings of what is to be reached: cost of the student, loss of quality, error budgets."""

    target: Annotated[Names, Flag("COST=FRACTION", Panel.REACH, repeatable=True)] = ()
    """Fraction of the teacher's cost to reach, with `params`, `macs`, `size` or `latency` as the cost (`params=0.5`):
    each neighbourhood gets a candidate of its own, found by a search. Default: no search, one candidate for all."""
    max_drop: Annotated[Drop | None, Flag("DROP", Panel.REACH)] = None
    """Largest loss of quality, as `1%` or `0.01`, promised with 95% confidence by a test on held-out samples. Default:
    any loss."""
    metric: Annotated[str | None, Flag("METRIC", Panel.REACH)] = None
    """Further metric, higher is better: `top5`, another one by its name, or `MODULE:FUNCTION`, a function of the
    student's outputs and the teacher's (arrays by name) and of the labels (or `None`) that returns a float. It is
    reported, and chooses which stage of the student is written; `--target` and `--max-drop` do not go by it yet.
    Default: no such metric."""
    threshold: Annotated[str | None, Flag("FILE.json", Panel.REACH)] = None
    """Error budgets of the neighbourhoods, a file that `ndonnx threshold` wrote: none is trained further than its
    budget needs, and a student beyond its budget is reported. Default: the same training for all, no report."""
    baselines: Annotated[BaselineNames, Flag("NAMES", Panel.REACH)] = ()
    """What the student is compared with besides the teacher, by bytes, latency and fidelity in one run: onnxruntime's
    INT8 with calibrated ranges (`int8`, the best of three calibrations), INT8 with ranges found at every run
    (`dynamic`) and half precision (`fp16`), separated by commas."""
