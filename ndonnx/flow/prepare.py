"""What a run starts from: the teacher, the data, the partition, all checked before any work is done."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.config.recipe import Recipe
from ndonnx.data import DATA_FREE, Data, DataSource, input_specs, open_source
from ndonnx.data.augmentation import image_axes
from ndonnx.data.inputs import interface_of
from ndonnx.data.source import RowSource
from ndonnx.data.split import Split, compared_of, draw
from ndonnx.data.subset import Joined, Subset
from ndonnx.distill.finetune import why_not_converted, why_not_finetuned
from ndonnx.distill.schedule import Schedule
from ndonnx.distill.tasks.outputs import check_told
from ndonnx.errors import DataError, ModelError, RecipeError
from ndonnx.flow.fast_enough import with_fast_keep
from ndonnx.flow.run import Run, Teacher
from ndonnx.flow.simplification import simplified
from ndonnx.graph import load
from ndonnx.graph.bound import one_sample
from ndonnx.graph.dataflow import draws_random, float_outputs
from ndonnx.graph.interface import Interface
from ndonnx.graph.passes.branches import open_branches
from ndonnx.graph.save import check_writable
from ndonnx.graph.working_copy import working_copy
from ndonnx.metrics.registry import check_metric
from ndonnx.metrics.sensitivity import study_of
from ndonnx.partition import Partition, partition
from ndonnx.runtime.clock import Clock
from ndonnx.runtime.executor import check_executor
from ndonnx.runtime.fingerprints import fingerprint, fingerprint_file
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.progress import Progress
from ndonnx.runtime.run_directory import RunDir
from ndonnx.select import DEFAULT_CANDIDATES, Candidate, parse_candidates
from ndonnx.students.registry import check_method, method_of, operators_around
from ndonnx.teacher import make_session
from ndonnx.teacher.augmentations import AUTO, TRIED, suiting
from ndonnx.teacher.balance import POOL, balanced
from ndonnx.teacher.outputs import outputs_a_second
from ndonnx.teacher.synthetic_inputs import settings_for
from ndonnx.teacher.trying import held, hold_if_mixed


@dataclass(frozen=True)
class Request:
    """What a user gives to a run beside the recipe."""

    model: Path
    """The teacher's file."""
    data: Data | None
    """Data to distil on; None: made up."""
    eval_data: Data | None = None
    """Data of the final comparison; None: rows of `data` that nothing else reads."""
    output: Path | None = None
    """Where the student goes; None: nowhere."""
    run_dir: Path | None = None
    """Where the run keeps its state; None: beside the output (or the model), with the suffix `.run`."""

    @property
    def folder(self) -> Path:
        """Where the run keeps its state."""
        return self.run_dir or (self.output or self.model).with_suffix(".run")


@dataclass(frozen=True)
class Opened:
    """A teacher and its data, before the teacher is partitioned."""

    teacher: Teacher
    split: Split
    comparison_data: DataSource
    """Data of the final comparison: those given for it, else rows that nothing else reads."""
    samples: int
    """Maximum number of training samples."""
    remarks: tuple[str, ...] = ()
    """One line for each thing that so few rows cannot tell."""


@dataclass(frozen=True)
class HeldOut:
    """How many samples a run wants to hold out beside those that are compared on at the end."""

    choosing: int = 0
    """To choose candidates and students by."""
    confirming: int = 0
    """To test a promised drop on."""


NOTHING_MORE = HeldOut()


@contextmanager
def prepare(request: Request, recipe: Recipe, progress: Progress, *, searched: bool = False) -> Iterator[Run]:
    """Open, split and partition; holds the run directory until the end of the `with` block.

    Args:
        request: the files.
        recipe: what to build and how.
        progress: told what goes on.
        searched: whether candidates are trained and chosen among, instead of one student for each neighbourhood.

    Raises:
        UsageError: bad input; one line that names the file, node or value and the way out.
    """
    check_method(recipe.method)
    clock, candidates = Clock(), candidates_of(recipe) if searched else ()
    with clock.measure("load"):
        progress.stage("load")
        held_out = (
            held_out_for(recipe, request.data, promised=recipe.max_drop is not None) if searched else NOTHING_MORE
        )
        opened = open_all(request, recipe, held_out=held_out)
        teacher = opened.teacher
        for remark in opened.remarks:
            progress.note(remark)
        check_metric(recipe.metric)
        check_told(recipe.task, [value.name or "" for value in teacher.model.graph.outputs])
        reason = _why_not_finetuned(opened, recipe)
        if reason is not None:
            progress.note(f"the whole student will not be fine-tuned, which leaves the time to its parts: {reason}")
        schedule = Schedule(recipe, finetunable=reason is None)
        recipe = learning_on(recipe, teacher.model, alone=schedule.alone and not searched)
        schedule = replace(schedule, recipe=recipe)
        study = study_of(recipe)
    with RunDir(request.folder) as directory:
        with clock.measure("partition"):
            progress.stage("partition")
            teacher = simplified(opened.teacher, opened.split.source, recipe, progress, directory)
            methods = {candidate.method for candidate in candidates if candidate.method} or None
            parts = partition_model(teacher.model, recipe, teacher.interface, methods)
            parts = priced_for(opened.split.source, parts)
        if recipe.time_budget is not None and not recipe.trains_nothing:
            schedule = replace(schedule, rate=_rate(directory, opened))
        if not searched:
            recipe = with_fast_keep(teacher, parts, opened.split.source, recipe, directory, progress)
            schedule = replace(schedule, recipe=recipe)
        if AUTO in recipe.augment:
            recipe = _augmented(recipe, schedule, opened, parts, progress)
            schedule = replace(schedule, recipe=recipe)
        samples, split, compared = schedule.distil_samples(opened.samples), opened.split, opened.comparison_data
        shared = directory, recipe, progress, clock, teacher, parts, split, compared, samples, schedule, study
        yield Run(*shared, candidates)


def _why_not_finetuned(opened: Opened, recipe: Recipe) -> str | None:
    """Why there will be no fine-tuning, where that is known before any time is shared out; None where it is not."""
    teacher = opened.teacher
    if not Schedule(recipe, finetunable=True).finetunes or recipe.trains_nothing:
        return None
    if (reason := why_not_finetuned(teacher.model)) is not None:
        return reason
    few = next(iter(opened.split.source.batches(_TRIED_ON, samples=_TRIED_ON)), None)
    if recipe.time_budget is None or few is None or opened.split.source.fixed_batch is not None:
        return None
    return why_not_converted(teacher.model, teacher.interface, sorted(float_outputs(teacher.model)), few.inputs)


_TRIED_ON = 2
"""Samples by whose sizes the conversion of a whole teacher is tried."""


def _augmented(recipe: Recipe, schedule: Schedule, opened: Opened, parts: Partition, progress: Progress) -> Recipe:
    """The recipe with the changes of images that suit the data, where there is a fine-tuning to use them."""
    if schedule.alone or recipe.trains_nothing:
        return recipe.model_copy(update={"augment": ()})
    source = opened.split.to_fit(opened.samples)
    kinds = suiting(parts.model, source, float_outputs(opened.teacher.model), recipe.seed)
    unlike = [kind for kind in TRIED if kind not in kinds]
    if unlike and image_axes(source.inputs, source.recipe):
        progress.note(f"--augment auto leaves out {' and '.join(unlike)}: the teacher answers such images otherwise")
    return recipe.model_copy(update={"augment": kinds})


def candidates_of(recipe: Recipe) -> tuple[Candidate, ...]:
    """The candidates of a search.

    Raises:
        RecipeError: one is none, or the recipe says a way to learn that candidates cannot share.
    """
    if recipe.inputs in ("student", "noise"):
        raise RecipeError(
            f"inputs = '{recipe.inputs}': a search trains its candidates apart from each other, on the teacher's "
            "activations; use refit or teacher"
        )
    if recipe.time_budget is not None:
        raise RecipeError("time_budget: a search has steps, not a time to fit into; give --steps instead")
    candidates = parse_candidates(recipe.search.candidates or DEFAULT_CANDIDATES, recipe.bits)
    for candidate in candidates:
        if candidate.method:
            method_of(candidate.recipe(recipe))  # what is wrong with one is told before the first is trained
    return candidates


_TO_CHOOSE, _TO_CONFIRM = 2, 5
"""Times as many samples as candidates are measured on, by which whole students are chosen, and by which a promise is
tested: its margin is narrow only with many."""


def held_out_for(recipe: Recipe, data: Data | None, *, promised: bool) -> HeldOut:
    """What a search of this recipe holds out; of made-up data, whose samples cost time, less."""
    choosing, confirming = (1, 1) if data is None else (_TO_CHOOSE, _TO_CONFIRM)
    samples = recipe.search.samples
    return HeldOut(choosing * samples, confirming * samples if promised else 0)


def _rate(directory: RunDir, opened: Opened) -> float:
    """Samples that are answered in a second; measured once, so that a continued run draws the same ones."""
    teacher, source = opened.teacher, opened.split.source
    where = (platform.node(), str(usable_cores()))
    entry = directory.entry("rates", fingerprint(fingerprint_file(str(teacher.path)), source.fingerprint(), *where))
    if not entry.done:
        entry.begin()
        fed = teacher.path if teacher.interface.is_plain else teacher.interface.applied(teacher.model)
        entry.commit({"samples_a_second": min(outputs_a_second(fed, source), _FASTEST)})
    return float(entry.meta()["samples_a_second"])


_FASTEST = 1e9
"""Where there are too few samples to measure."""


def open_all(
    request: Request,
    recipe: Recipe,
    *,
    samples: int | None = None,
    held_out: HeldOut = NOTHING_MORE,
) -> Opened:
    """Open everything that may be missing or damaged, and draw which rows do what.

    Args:
        request: the files.
        recipe: how many samples are drawn, and how.
        samples: maximum number of training samples. None: the recipe's `samples`.
        held_out: what else is to be held out.

    Raises:
        UsageError: something is missing or damaged; the output is the teacher itself; or there is no such executor.
    """
    check_executor(recipe)
    model, output, data, eval_data = request.model, request.output, request.data, request.eval_data
    if output is not None:
        check_writable(output)
        if output.exists() and model.exists() and output.samefile(model):
            raise ModelError(f"{output}: is the teacher itself, which is never modified; choose another output")
    teacher = load(model)
    session = make_session(model)
    specs = input_specs(session)

    if data is None and not recipe.data_free and recipe.inputs != "noise":
        raise DataError("no data: give a data source, or set data_free to make inputs up")
    settings = settings_for(data, session, teacher.graph, recipe)

    def source_of(data: Data, seed: int = recipe.seed, fixed: Mapping[str, NDArray[Any]] | None = None) -> DataSource:
        return open_source(data, specs, recipe.data, seed=seed, graph=teacher.graph, settings=settings, fixed=fixed)

    wanted = recipe.samples if samples is None else samples
    if data is not None:
        source, trained = source_of(data), None
    else:
        source, trained = _made_up(source_of, teacher, wanted, held_out, recipe.seed)
    mixed = hold_if_mixed(session, source)
    choosing, confirming = held_out.choosing, held_out.confirming
    split = draw(
        source,
        wanted,
        seed=recipe.seed,
        holdout=recipe.holdout,
        choosing=choosing,
        confirming=confirming,
        made_up=trained,
    )
    comparison_data = source_of(eval_data, fixed=source.fixed) if eval_data is not None else split.to_compare()
    if mixed:
        comparison_data.inputs = held(comparison_data.inputs)
    few = _remarks(split, compared=eval_data is None, searched=choosing > 0)
    remarks = [*_remarks_on(teacher, recipe, source), *([ONE_AT_A_TIME] if mixed else []), *few]
    interface = interface_of(source.inputs, source.fixed)
    opened = open_branches(teacher, interface.fixed)
    found = Teacher(model, teacher, opened, interface)
    return Opened(found, split, comparison_data, min(wanted, split.available), tuple(remarks))


ONE_AT_A_TIME = (
    "the model mixes samples that are run at once, whatever its inputs say: it is run one sample at a time, which is "
    "slower; export it with a dynamic batch to make it faster"
)
"""What is told where the graph's own numbers hold the batch."""


def _remarks_on(teacher: ir.Model, recipe: Recipe, source: DataSource) -> Iterator[str]:
    """What is to be said of inputs that the data fix, and of a teacher that answers differently each time."""
    for name in source.fixed:
        setting = recipe.model_inputs.get(name)
        if setting is None or setting.value is None:
            yield f"input '{name}' has one value for all samples: the student is made for it, and may not do for others"
    if draws_random(teacher.graph):
        yield "the teacher draws random numbers: part of every difference from it is what it differs from itself"


def learning_on(recipe: Recipe, teacher: ir.Model, *, alone: bool) -> Recipe:
    """The recipe with what students learn on, where it does not say.

    Args:
        recipe: of the run.
        teacher: one that draws random numbers gives others to what is captured and to what is run for it later, so
            that nothing can be learnt on values of the students' own.
        alone: whether nothing follows that makes up for the errors of all students together.
    """
    if recipe.inputs is not None:
        return recipe
    if draws_random(teacher.graph):
        return recipe.model_copy(update={"inputs": "teacher"})
    return recipe.model_copy(update={"inputs": "student"}) if alone else recipe


def _remarks(split: Split, *, compared: bool, searched: bool) -> Iterator[str]:
    """What so few samples cannot tell, a line each."""
    spec, chosen_by, compared_on = split.source.spec, len(split.validation), len(split.comparison)
    if compared and compared_on < _FEW:
        yield (
            f"{spec}: so few samples leave {compared_on} to compare teacher and student on, which says little; "
            "give --eval, or more data"
        )
    if searched and chosen_by < _FEW:
        yield (
            f"{spec}: so few samples leave {chosen_by} to choose candidates by, so that luck has a part in the choice; "
            "give more data"
        )


_FEW = 50
"""Samples under which a measurement says little: its standard error can be over seven points."""


_OTHER_SEED = 2**31
"""Beyond all seeds of recipes."""


def _made_up(
    source_of: Callable[[str, int], DataSource], teacher: ir.Model, samples: int, held_out: HeldOut, seed: int
) -> tuple[Joined, int]:
    """Samples that nobody collected, and how many of them are for training: the others are of another seed."""
    trained = _all_classes(source_of, teacher, samples, seed)
    further = held_out.choosing + held_out.confirming + compared_of(trained.length)
    more = _all_classes(source_of, teacher, further, seed + _OTHER_SEED)
    return Joined(trained, Subset(more, np.arange(further, dtype=np.int64))), trained.length


def _all_classes(
    source_of: Callable[[str, int], DataSource], teacher: ir.Model, samples: int, seed: int
) -> RowSource | Subset:
    """At least so many samples, of all that the teacher can tell apart."""
    pool = source_of(f"{DATA_FREE}:{POOL * samples}", seed)
    assert isinstance(pool, RowSource)
    # One thread: another last bit could choose other samples, and nothing of an earlier run would be found again.
    fed = interface_of(pool.inputs, pool.fixed).applied(teacher)
    return balanced(pool, fed, samples, threads=1)


def partition_model(
    teacher: ir.Model, recipe: Recipe, interface: Interface | None = None, methods: Collection[str] | None = None
) -> Partition:
    """Partition a loaded teacher as a recipe says; the teacher is not changed.

    Args:
        teacher: with the branches that are always taken open (`open_branches`).
        recipe: granularity, cuts, and what is frozen.
        interface: how the teacher is fed. None: samples along the first axis of every input.
        methods: student methods that will be tried. None: the recipe's own.
    """
    working = working_copy(teacher, interface)
    methods = (recipe.method,) if methods is None else methods
    around = operators_around(methods)
    return partition(working, granularity=recipe.granularity, cut=recipe.cut, freeze=recipe.freeze, around=around)


def priced_for(source: DataSource, parts: Partition) -> Partition:
    """A partition with MACs told for the shapes that a sample of the data has."""
    first = next(iter(source.batches(1, samples=1)), None)
    arrays = {} if first is None else {name: array.shape for name, array in first.inputs.items()}
    return replace(parts, stated=one_sample(parts.model, arrays, parts.interface))
