"""What a run tells of itself comes from rows that nothing in it has seen: other values there change no student."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import ndonnx
from ndonnx.api.compress import compress
from ndonnx.api.search import search
from ndonnx.config.recipe import DataRecipe, Recipe
from ndonnx.data import input_specs, open_source
from ndonnx.data.split import Split, draw
from ndonnx.flow.prepare import held_out_for
from ndonnx.report import CompressReport
from ndonnx.teacher import make_session
from tests.helpers.models import inputs_of, residual_cnn
from tests.helpers.runs import ALONE

ROWS, SAMPLES = 160, 64
SETTINGS: dict[str, Any] = ALONE | {"samples": SAMPLES, "steps": 3}
SEARCH: dict[str, Any] = {"candidates": ("width 0.25,0.5",), "steps": 3}

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    onnx.save(residual_cnn(), tmp_path / "teacher.onnx")
    return tmp_path / "teacher.onnx"


def written(teacher: Path, name: str, changed: list[int]) -> str:
    """Labelled data in which some rows have other values, and labels that no class has but the last."""
    data, labels = inputs_of(residual_cnn(), ROWS), np.arange(ROWS) % 4
    for array in data.values():
        array[changed] = -3 * array[changed] + 1
    labels[changed] = 4
    np.savez(teacher.parent / f"{name}.npz", label=labels, **data)  # type: ignore[arg-type]
    return str(teacher.parent / f"{name}.npz")


def split_of(teacher: Path, samples: int, **held: int) -> Split:
    source = open_source(written(teacher, "plain", []), input_specs(make_session(teacher)), DataRecipe())
    return draw(source, samples, seed=0, holdout=Recipe().holdout, **held)


def compressed(teacher: Path, name: str, changed: list[int], **recipe: Any) -> tuple[bytes, CompressReport]:
    student = teacher.parent / f"{name}.onnx"
    made = Recipe(**(SETTINGS | recipe))
    result = compress(teacher, data=written(teacher, name, changed), recipe=made, output=student)
    return student.read_bytes(), result.report


@pytest.mark.parametrize(
    "recipe",
    [{"inputs": "student"}, {"inputs": "refit", "finetune_steps": 3, "finetune_samples": 500}],
    ids=["in order", "fine-tuned"],
)
def test_no_training_sees_the_rows_of_the_comparison(teacher: Path, recipe: dict[str, Any]) -> None:
    unseen = split_of(teacher, SAMPLES).comparison.tolist()
    (one, told), (other, told_otherwise) = (
        compressed(teacher, name, rows, **recipe) for name, rows in (("one", []), ("other", unseen))
    )
    assert one == other
    assert told.metrics["student"].samples == len(unseen) == 16
    assert told.metrics["student"].nmse != told_otherwise.metrics["student"].nmse
    assert told.metrics["student"].worst_sample in unseen, "by its number in the data"


def test_other_rows_do_change_the_student(teacher: Path) -> None:
    trained = split_of(teacher, SAMPLES).to_train(SAMPLES).row_number(SAMPLES - 1)
    one, other = (compressed(teacher, name, rows, inputs="teacher")[0] for name, rows in (("a", []), ("b", [trained])))
    assert one != other


def test_no_choice_of_a_search_sees_the_rows_of_the_comparison(teacher: Path) -> None:
    unseen = split_of(teacher, SAMPLES, **asdict(held_out_for(Recipe(), "data", promised=False))).comparison.tolist()
    found = []
    for name, rows in (("one", []), ("other", unseen)):
        recipe = Recipe(**SETTINGS, search=SEARCH)
        out = teacher.parent / name
        report = search(teacher, data=written(teacher, name, rows), recipe=recipe, output=out, pareto=2).report
        found.append((report, [path.read_bytes() for path in sorted(out.glob("*.onnx"))]))
    (one, students), (other, same) = found
    assert students and students == same
    assert {student.name for student in one.students} == {student.name for student in other.students}
    assert one.samples == other.samples == len(unseen)
    assert any(a.metric != b.metric for a, b in zip(one.students, other.students, strict=True))


def test_nothing_but_the_promise_sees_the_rows_that_confirm_it(teacher: Path) -> None:
    unseen = split_of(teacher, SAMPLES, **asdict(held_out_for(Recipe(), "data", promised=True))).confirmation.tolist()
    settings = {"max_drop": "30%", "search": SEARCH}
    one, other = (compressed(teacher, name, rows, **settings) for name, rows in (("one", []), ("other", unseen)))
    for _, report in (one, other):
        assert report.target is not None and report.target.samples == len(unseen) and report.target.missed is None
    assert one[0] == other[0], "the promise holds with both, so that they are the same choice"


def test_hardening_tells_of_rows_that_it_was_not_trained_on(teacher: Path) -> None:
    unseen = split_of(teacher, 500).comparison.tolist()
    recipe = Recipe(**(SETTINGS | {"finetune_steps": 2}))
    found = {}
    for name, rows in (("one", []), ("other", unseen)):
        output = teacher.parent / f"{name}.onnx"
        report = ndonnx.harden(teacher, data=written(teacher, name, rows), recipe=recipe, output=output).report
        found[name] = output.read_bytes(), report.metrics["hardened"].nmse
    assert found["one"][0] == found["other"][0] and found["one"][1] != found["other"][1]


def test_a_study_leaves_alone_what_a_run_with_it_is_judged_by(teacher: Path) -> None:
    split = split_of(teacher, SAMPLES, **asdict(held_out_for(Recipe(), "data", promised=True)))
    unseen = [*split.comparison.tolist(), *split.confirmation.tolist()]
    one, other = (
        ndonnx.threshold(
            teacher,
            data=written(teacher, name, rows),
            recipe=Recipe(**SETTINGS),
            samples=40,
            amplitudes=(0.2,),
            repeats=1,
            keep=(0.5,),
        )
        for name, rows in (("one", []), ("other", unseen))
    )
    assert one.samples == 40
    assert one.student_tolerances == other.student_tolerances and one.tolerances == other.tolerances
