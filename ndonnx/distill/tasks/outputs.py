"""What each output of a teacher means: the one place that decides it, by the user's word or by the kinds of tasks.

That an output has the shape of class scores says little: embeddings, boxes and regressions have it too. So something
else has to speak for it: answers that are probabilities, labels, the output's own name, or the user. Where nothing
does, an output is taken for numbers.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from ndonnx.data.user_code import import_function
from ndonnx.distill.tasks.base import Output, OutputTask, TaskKind
from ndonnx.distill.tasks.kinds.classification import SCORES_RANK, Classification
from ndonnx.distill.tasks.kinds.regression import Regression
from ndonnx.distill.tasks.registry import AUTO, all_kinds, kind_named
from ndonnx.errors import RecipeError

Array = NDArray[Any]


def tasks_of(
    outputs: Mapping[str, Array], samples: int, *, labelled: bool = False, told: Sequence[str] = ()
) -> dict[str, OutputTask]:
    """What each float output with samples along its first axis means.

    Args:
        outputs: the teacher's answers to some samples, by name.
        samples: how many.
        labelled: whether the data hold a class for each sample.
        told: what the user says, as `--task` takes it: `embedding` of all outputs, `boxes=regression` of one;
            `module:function` is a loss of the user's own.

    Raises:
        RecipeError: the user speaks of an output, or of a kind, that there is not.
    """
    given = _told(told, outputs)
    found = {}
    for name, values in outputs.items():
        if values.dtype.kind != "f" or not values.ndim or len(values) != samples:
            continue
        output, said = Output(name, values, labelled), given.get(name, given.get(None, AUTO))
        found[name] = _as_told(said, output) if said != AUTO else _recognised(output)
    return found


def check_told(told: Sequence[str], outputs: Sequence[str]) -> None:
    """Refuse what the user says of outputs, before anything is run.

    Args:
        told: as `--task` takes it.
        outputs: names of the model's.

    Raises:
        RecipeError: there is no such output, kind or loss.
    """
    for kind in _told(told, outputs).values():
        if ":" in kind:
            import_function(kind, os.getcwd(), RecipeError)
        elif kind != AUTO:
            kind_named(kind)


def _told(told: Sequence[str], outputs: Collection[str]) -> dict[str | None, str]:
    found: dict[str | None, str] = {}
    for each in told:
        name, _, kind = each.rpartition("=")
        if name and name not in outputs:
            raise RecipeError(f"--task {each}: the model has no output '{name}'; it has {', '.join(outputs)}")
        found[name or None] = kind
    return found


def _as_told(said: str, output: Output) -> OutputTask:
    return OutputTask(Regression, custom=said) if ":" in said else kind_named(said).told(output)


def _recognised(output: Output) -> OutputTask:
    """The first kind for which the values speak, else the first that is likely, else numbers."""
    found = [each for kind in all_kinds() if (each := kind.recognise(output)) is not None]
    likely = sorted(found, key=lambda each: not each.by_values)
    return likely[0].task if likely else OutputTask(Regression)


def task_of(name: str, values: Array, samples: int, *, labelled: bool = False) -> type[TaskKind]:
    """The kind of an output, as far as can be known without the user's word; see `tasks_of`."""
    found = tasks_of({name: values}, samples, labelled=labelled).get(name)
    return Regression if found is None else found.kind


def class_scores(
    outputs: Mapping[str, Array], samples: int, *, labelled: bool = False, told: Sequence[str] = ()
) -> str | None:
    """The name of the first output that holds class scores of whole samples; None where none is known to.

    Args:
        outputs: the teacher's answers to some samples, by name.
        samples: how many.
        labelled: whether the data hold a class for each sample.
        told: what the user says of them, see `tasks_of`.
    """
    tasks = tasks_of(outputs, samples, labelled=labelled, told=told)
    scores = (name for name, found in tasks.items() if found.kind is Classification)
    return next((name for name in scores if has_shape_of_scores(outputs[name], samples)), None)


def doubt(
    outputs: Mapping[str, Array], samples: int, *, labelled: bool = False, told: Sequence[str] = ()
) -> str | None:
    """One line where an output might hold class scores and is taken for numbers; None where there is no such output,
    or the user says what they are."""
    if told or class_scores(outputs, samples, labelled=labelled) is not None:
        return None
    for name, values in outputs.items():
        if has_shape_of_scores(values, samples) and task_of(name, values, samples) is Regression:
            return (
                f"output '{name}' is taken for numbers and compared by its error; if it holds class scores, say "
                f"--task {name}=classification, give data with labels, or export the model with a softmax at its end"
            )
    return None


def has_shape_of_scores(values: Array, samples: int) -> bool:
    """Whether answers to so many samples are floats of shape (samples, classes), with at least 2 classes."""
    return values.dtype.kind == "f" and values.ndim == SCORES_RANK and len(values) == samples and values.shape[1] > 1
