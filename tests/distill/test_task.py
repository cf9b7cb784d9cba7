"""What an output means: a top class is told of class scores only, whatever else has their shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ndonnx
from ndonnx.distill.tasks.base import OutputTask, TaskKind
from ndonnx.distill.tasks.fidelity import Fidelity
from ndonnx.distill.tasks.kinds.classification import Classification
from ndonnx.distill.tasks.kinds.embedding import Embedding
from ndonnx.distill.tasks.kinds.multilabel import Multilabel
from ndonnx.distill.tasks.kinds.regression import Regression
from ndonnx.distill.tasks.outputs import class_scores, doubt, task_of, tasks_of
from ndonnx.distill.tasks.scores import Form, fitting_temperature
from ndonnx.errors import RecipeError
from ndonnx.metrics.partial import Quality
from tests.helpers.models import Array, Net, inputs_of
from tests.helpers.runs import Bench, Recorder

pytestmark = pytest.mark.usefixtures("one_core")

ROWS = 40


def scores(classes: int = 4, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((ROWS, classes)) * 3


def softmax(values: Array) -> Array:
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def unit(values: Array) -> Array:
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


@given(
    classes=st.integers(2, 50),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    name=st.sampled_from(["y", "output", "467", "embedding", "logistics"]),
)
def test_values_speak_for_class_scores_and_against_them(classes: int, seed: int, dtype: Any, name: str) -> None:
    raw = scores(classes, seed)

    def task(values: Array, **labelled: bool) -> type[TaskKind]:
        return task_of(name, values.astype(dtype), ROWS, **labelled)

    assert task(softmax(raw)) is Classification
    assert task(np.log(softmax(raw))) is Classification
    assert task(unit(raw)) is task(unit(raw), labelled=True) is Embedding
    assert task(raw) is Regression
    assert task(raw, labelled=True) is Classification
    assert task_of("logits", raw.astype(dtype), ROWS) is Classification


@pytest.mark.parametrize(
    "values",
    [
        np.ones((ROWS, 1), np.float32),
        np.ones((ROWS, 5), np.int64),
        np.ones((3, 5), np.float32) / 5,
        np.ones(ROWS, np.float32),
        np.float32(1),
    ],
)
def test_other_shapes_are_no_class_scores(values: Array) -> None:
    assert task_of("logits", np.asarray(values), ROWS, labelled=True) is Regression


@pytest.mark.parametrize(
    ("shape", "axis", "found"),
    [
        ((ROWS, 7, 5), -1, OutputTask(Classification, -1, Form.PROBABILITIES)),
        ((ROWS, 5, 4, 6), 1, OutputTask(Classification, 1, Form.PROBABILITIES)),
        ((ROWS, 5, 4, 6), -1, OutputTask(Classification, -1, Form.PROBABILITIES)),
        ((ROWS, 5, 7), 1, OutputTask(Regression)),
        ((ROWS, 7, 1), -1, OutputTask(Regression)),
    ],
)
def test_positions_have_classes_of_their_own(shape: tuple[int, ...], axis: int, found: OutputTask) -> None:
    values = np.random.default_rng(0).dirichlet(np.ones(shape[axis]), int(np.prod(shape)) // shape[axis])
    last = [*shape[:axis], *shape[axis + 1 :], shape[axis]] if axis != -1 else list(shape)
    values = np.moveaxis(values.reshape(last), -1, axis).astype(np.float32)
    assert tasks_of({"y": values}, ROWS) == {"y": found}
    if found.form is Form.PROBABILITIES:
        logs = tasks_of({"y": np.log(values)}, ROWS)["y"]
        assert logs == OutputTask(Classification, axis, Form.LOG_PROBABILITIES)
    assert class_scores({"y": values}, ROWS) is None, "no one class for each sample"


def test_numbers_that_decide_are_answers_of_their_own() -> None:
    rng = np.random.default_rng(0)
    maps = 1 / (1 + np.exp(-8 * rng.standard_normal((ROWS, 1, 12, 12))))
    rare = np.where(rng.random((ROWS, 30)) < 0.03, 0.9, 0.004)
    for values in (maps, rare, maps[:, 0, 0, :1]):
        assert task_of("y", values.astype(np.float32), ROWS) is Multilabel
    boxes = rng.random((ROWS, 20, 4))
    for values in (boxes, maps * 1.01, maps - 0.01, np.zeros((ROWS, 5)), np.ones((ROWS, 5)), 0.3 * maps):
        assert task_of("y", values.astype(np.float32), ROWS) is Regression
    assert task_of("y", softmax(scores() * 5), ROWS) is Classification, "these exclude each other"


def test_answers_are_compared_by_their_side_of_a_half() -> None:
    measure = Multilabel.measure_of(OutputTask(Multilabel))
    teacher, student = np.array([[0.9, 0.2], [0.6, 0.1]]), np.array([[0.8, 0.2], [0.4, 0.1]])
    squares = Fidelity()
    squares.add(student, teacher)
    measure.add(student[:1], teacher[:1])
    measure.add(student[1:], teacher[1:])
    found = measure.result(squares)
    first = 0.9 * np.log(0.9 / 0.8) + 0.1 * np.log(0.1 / 0.2)
    second = 0.6 * np.log(0.6 / 0.4) + 0.4 * np.log(0.4 / 0.6)
    assert found.agreement == 0.75
    assert found.kl == found.loss == pytest.approx((first + second) / 4)


def test_the_user_has_the_last_word() -> None:
    outputs = {"a": softmax(scores()), "b": scores(), "c": unit(scores()), "ids": np.zeros((ROWS, 2), np.int64)}
    assert tasks_of(outputs, ROWS, told=("regression",)) == dict.fromkeys("abc", OutputTask(Regression))
    told = tasks_of(outputs, ROWS, told=("embedding", "b=classification", "c=auto", "a=mine:loss"))
    assert told == {
        "a": OutputTask(Regression, custom="mine:loss"),
        "b": OutputTask(Classification),
        "c": OutputTask(Embedding),
    }
    assert tasks_of(outputs, ROWS, told=("classification",))["a"].form is Form.PROBABILITIES
    with pytest.raises(RecipeError, match="no output 'boxes'; it has a, b, c, ids"):
        tasks_of(outputs, ROWS, told=("boxes=regression",))


def test_samples_that_are_not_finite_say_nothing() -> None:
    values = softmax(scores())
    values[3] = np.nan
    assert task_of("y", values, ROWS) is Classification
    assert task_of("y", np.full((ROWS, 4), np.nan), ROWS) is Regression


def test_of_several_outputs_the_first_with_class_scores_counts() -> None:
    outputs = {"boxes": scores(), "feature": unit(scores()), "p": softmax(scores()), "logits": scores()}
    assert class_scores(outputs, ROWS) == "p" and doubt(outputs, ROWS) is None
    del outputs["p"], outputs["logits"]
    assert class_scores(outputs, ROWS) is None
    assert (doubt(outputs, ROWS) or "").startswith("output 'boxes' is taken for numbers")
    assert doubt({"feature": unit(scores())}, ROWS) is None


# In whole runs


def tower(end: Callable[[Net, str], str]) -> onnx.ModelProto:
    net = Net()
    x = net.relu(net.gemm(net.input("x", "N", 6), 6, 16))
    return net.proto(end(net, net.gemm(x, 16, 5)))


ENDS: dict[str, Callable[[Net, str], str]] = {
    "numbers": lambda net, x: net.op("Identity", x, out="y"),
    "embedding": lambda net, x: net.op("LpNormalization", x, out="y", axis=1, p=2),
    "softmax": lambda net, x: net.op("Softmax", x, out="y", axis=1),
    "logsoftmax": lambda net, x: net.op("LogSoftmax", x, out="y", axis=1),
    "logits": lambda net, x: net.op("Identity", x, out="logits"),
}
CLASSES = {"softmax", "logsoftmax", "logits"}


@pytest.mark.parametrize("end", ENDS)
def test_a_run_tells_agreement_of_class_scores_alone(end: str, tmp_path: Path) -> None:
    progress = Recorder()
    bench = Bench(tmp_path).put(tower(ENDS[end]), samples=80)
    metrics = bench.compress(keep=0.5, steps=2, progress=progress).report.metrics["student"]
    assert (metrics.agreement is not None, metrics.kl is not None) == (end in CLASSES,) * 2
    assert metrics.nmse is not None and metrics.accuracy is None
    told = [note for note in progress.notes if "taken for numbers" in note]
    assert len(told) == (end == "numbers")


@pytest.mark.parametrize("end", ENDS)
def test_searches_and_comparisons_take_an_output_for_the_same(end: str, tmp_path: Path) -> None:
    proto = tower(ENDS[end])
    bench = Bench(tmp_path).put(proto, samples=80)
    found = ndonnx.evaluate(bench.model, str(bench.data), teacher=bench.model)
    outputs = {proto.graph.output[0].name: _answers(bench.model, inputs_of(proto, 80))}
    assert (Quality(outputs).kind == "agreement") == (found.agreement is not None)


def test_labels_make_class_scores_of_numbers_but_not_of_an_embedding(tmp_path: Path) -> None:
    for end in ("numbers", "embedding"):
        proto = tower(ENDS[end])
        onnx.save(proto, tmp_path / "model.onnx")
        inputs: dict[str, Any] = inputs_of(proto, ROWS)
        np.savez(tmp_path / "data.npz", **inputs, label=np.arange(ROWS) % 5)
        found = ndonnx.evaluate(tmp_path / "model.onnx", str(tmp_path / "data.npz"), teacher=tmp_path / "model.onnx")
        assert (found.accuracy is None, found.agreement) == ((False, 1.0) if end == "numbers" else (True, None))


def _answers(model: Path, feeds: dict[str, Array]) -> Array:
    import onnxruntime as ort  # noqa: PLC0415

    (found,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)
    return np.asarray(found)


@pytest.mark.parametrize(("classes", "expected"), [(10, 4.0), (5000, 1.5)])
def test_the_temperature_leaves_the_teacher_its_first_class(classes: int, expected: float) -> None:
    scores = np.zeros((20, classes), np.float32)
    scores[np.arange(20), np.arange(20) % classes] = 14.0
    found = fitting_temperature(scores, -1, Form.LOGITS)
    assert found == expected
    assert fitting_temperature(softmax(scores), -1, Form.PROBABILITIES) == expected
    assert softmax(scores / found).max(axis=1).mean() >= 0.5 * softmax(scores).max(axis=1).mean()
    assert fitting_temperature(np.full((3, 4), np.nan), -1, Form.LOGITS) == 1.0
