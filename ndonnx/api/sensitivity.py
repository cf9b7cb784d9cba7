"""`threshold`: how much error a model tolerates, and where (the thresholding effect)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.api.models import Model, Placed, placed
from ndonnx.api.settings import RecipeLike, recipe_of
from ndonnx.config.recipe import Recipe
from ndonnx.data import Data, input_specs, open_source
from ndonnx.data.inputs import interface_of
from ndonnx.data.split import draw
from ndonnx.errors import ModelError
from ndonnx.flow.measure import Rows
from ndonnx.flow.prepare import held_out_for, partition_model
from ndonnx.flow.run import Teacher
from ndonnx.flow.simplification import simplified
from ndonnx.graph import load
from ndonnx.graph.passes.branches import open_branches
from ndonnx.metrics.partial import Judged, PartialModels
from ndonnx.metrics.sensitivity import (
    AMPLITUDES,
    KEEP,
    REPEATS,
    SHAPING_SAMPLES,
    STUDIED,
    StudyPlan,
    ThresholdReport,
    check_study,
    study,
)
from ndonnx.report.threshold import make_folder, write_threshold
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.progress import Listener, Progress, listening
from ndonnx.select import parse_drop
from ndonnx.teacher import make_session
from ndonnx.teacher.synthetic_inputs import settings_for
from ndonnx.teacher.trying import hold_if_mixed


def threshold(
    model: Model,
    *,
    data: Data,
    recipe: RecipeLike | None = None,
    samples: int = 2000,
    amplitudes: Sequence[float] | None = None,
    repeats: int | None = None,
    keep: Sequence[float] | None = None,
    max_drop: float | str = "1%",
    output: str | Path | None = None,
    progress: Listener | None = None,
    **settings: Any,
) -> ThresholdReport:
    """Measure how much error a model tolerates, and where: the thresholding effect (figures 1, 4 and 6).

    Noise goes in behind one, half and all neighbourhoods, and on the weights of one after the other; each
    neighbourhood is replaced, alone, by untrained students of several widths. All is compared by accuracy where the
    data has labels, else by agreement with the model, or by the NMSE of its outputs where it has no class scores.

    Args:
        model: teacher as a path, an `onnx.ModelProto` or an `onnx_ir.Model`; never modified.
        data: inputs to measure on, as `compress` takes them.
        recipe: the partition, `round_to`, `cache_budget`, `seed` and how the data become inputs, as a `Recipe`, its
            keys in a mapping, or the path of a TOML file.
        samples: most samples on which outputs are compared, three quarters of those at hand; students are shaped on
            others. Fewer where the activations would not fit into half of `cache_budget`.
        amplitudes: of the noise, as parts of each value's deviation. None: 0.05 to 1.6.
        repeats: draws of the noise at each amplitude. None: 3.
        keep: multipliers of the students, above 0 to 1. None: 0.25, 0.5 and 0.75.
        max_drop: what the tolerances are for, in the unit of the measure; `1%` is a point of accuracy.
        output: folder for the JSON document, the CSV files and the pictures. None: nothing is written.
        progress: who is told what goes on, as a `Progress` or a callable that takes an `Event`. None: the logger
            `ndonnx`.
        settings: further keys of the recipe, laid over it, as `granularity="layer"`.

    Raises:
        UsageError: the model or the data cannot be read, a number is out of range, or nothing can be distilled.
    """
    began = time.perf_counter()
    chosen, told = recipe_of(recipe, settings), listening(progress)
    wanted = _Wanted(
        samples,
        AMPLITUDES if amplitudes is None else amplitudes,
        REPEATS if repeats is None else repeats,
        KEEP if keep is None else keep,
        parse_drop(max_drop),
        None if output is None else Path(output),
    )
    check_study(samples, wanted.amplitudes, wanted.repeats, wanted.keep)
    with placed(model) as place:
        report = _studied(place, data, chosen, told, wanted)
    report = replace(report, seconds=time.perf_counter() - began)
    return report if wanted.folder is None else write_threshold(report, wanted.folder)


@dataclass(frozen=True)
class _Wanted:
    """What is measured."""

    samples: int
    amplitudes: Sequence[float]
    repeats: int
    keep: Sequence[float]
    drop: float
    folder: Path | None


def _studied(place: Placed, data: Data, recipe: Recipe, progress: Progress, wanted: _Wanted) -> ThresholdReport:
    progress.stage("load")
    path, teacher = place.path, load(place.path)
    session = make_session(path)
    inputs = settings_for(data, session, teacher.graph, recipe)
    specs = input_specs(session)
    source = open_source(data, specs, recipe.data, seed=recipe.seed, graph=teacher.graph, settings=inputs)
    hold_if_mixed(session, source)
    split = draw(
        source,
        round(wanted.samples / STUDIED),
        seed=recipe.seed,
        holdout=STUDIED,
        # What a run with `--max-drop` will test its promise on.
        confirming=held_out_for(recipe, data, promised=True).confirming,
    )
    progress.stage("partition")
    interface = interface_of(source.inputs, source.fixed)
    opened = Teacher(path, teacher, open_branches(teacher, interface.fixed), interface)
    parts = partition_model(simplified(opened, source, recipe, progress).model, recipe, interface)
    if not parts.distillable:
        raise ModelError(f"{place.name}: no neighbourhood can be distilled; `ndonnx inspect {place.name}` says why")
    if wanted.folder is not None:
        make_folder(wanted.folder)
    held, shaping = Rows(split.to_choose(), parts), Rows(split.to_fit(SHAPING_SAMPLES), parts)
    progress.stage("capture", held.count + shaping.count, "samples")

    def captured(rows: Rows, folder: Path, labels: NDArray[np.int64] | None) -> PartialModels:
        return PartialModels(
            parts,
            Judged(rows.batches, rows.count, labels),
            folder,
            threads=usable_cores(),
            budget=recipe.cache_budget // 2,
            on_batch=progress.advance,
        )

    with (
        tempfile.TemporaryDirectory(prefix=".ndonnx-", dir=wanted.folder, ignore_cleanup_errors=True) as scratch,
        captured(held, Path(scratch) / "held-out", held.labels) as partials,
        captured(shaping, Path(scratch) / "shaping", None) as shaped_on,
    ):
        if partials.samples < held.count:
            progress.note(
                f"{partials.samples} of {held.count} samples fit into half of the cache budget; "
                "--cache-budget raises it"
            )
        plan = StudyPlan(
            wanted.amplitudes,
            wanted.repeats,
            wanted.keep,
            wanted.drop,
            recipe.round_to,
            recipe.seed,
            usable_cores(),
        )
        report = study(partials, plan, shaping=shaped_on, progress=progress)
    return replace(report, model=place.name, data=source.spec)
