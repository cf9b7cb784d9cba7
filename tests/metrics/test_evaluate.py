"""Evaluation: the measures against direct computation, and models that do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ndonnx.config.recipe import DataRecipe
from ndonnx.data import DataSource, InputSpec, input_specs, open_source
from ndonnx.distill.tasks.base import OutputTask
from ndonnx.distill.tasks.fidelity import Fidelity
from ndonnx.distill.tasks.kinds.classification import Classification
from ndonnx.distill.tasks.kinds.embedding import Embedding
from ndonnx.distill.tasks.kinds.regression import Regression
from ndonnx.distill.tasks.outputs import tasks_of
from ndonnx.errors import DataError, ModelError, RecipeError, UsageError
from ndonnx.metrics.evaluation import Batching, Evaluation
from ndonnx.metrics.evaluation import evaluate as measure
from ndonnx.runtime.progress import Silent
from ndonnx.teacher.sessions import make_session


def evaluate(
    model: Any, data: DataSource, *, batch_size: int = 256, threads: int = 1, samples: int | None = None, **options: Any
) -> Evaluation:
    return measure(model, data, batching=Batching(batch_size, threads, samples), **options)


X = InputSpec("x", np.dtype(np.float32), ("N", 4))
EYE = np.eye(4, dtype=np.float32)


def linear(weight: NDArray[np.generic], batch: int | str = "N", tail: str | None = None) -> ir.Model:
    """`logits = x @ weight`, and `tail(logits)` as a further output."""
    weight = np.asarray(weight, np.float32)
    shape = [batch, weight.shape[1]]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["logits"])]
    if tail is not None:
        nodes.append(helper.make_node(tail, ["logits"], ["tail"]))
        outputs.append(helper.make_tensor_value_info("tail", TensorProto.FLOAT, None))
    graph = helper.make_graph(
        nodes,
        "linear",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, weight.shape[0]]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, weight.shape),
        ],
        outputs,
        [numpy_helper.from_array(weight, "w")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def source(path: Path, x: NDArray[np.generic], label: NDArray[np.int64] | None = None) -> DataSource:
    labels: dict[str, Any] = {} if label is None else {"label": label}
    np.savez(path / "d.npz", x=x, **labels)
    return open_source(str(path / "d.npz"), [X], DataRecipe())


def normal(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, 4), np.float32)


@pytest.mark.parametrize("batch_size", [1, 7, 256])
@pytest.mark.parametrize("batch", ["N", 5])
def test_measures_equal_direct_computation(tmp_path: Path, batch_size: int, batch: int | str) -> None:
    x, weight = normal(23), normal(4, seed=1)
    label = np.random.default_rng(2).integers(0, 4, 23)
    result = evaluate(
        linear(weight, batch), source(tmp_path, x, label), teacher=linear(EYE), batch_size=batch_size, threads=1
    )
    wanted, found = x.astype(np.float64), (x @ weight).astype(np.float64)
    p, q = (np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in (wanted, found))
    assert result.samples == 23
    assert result.accuracy == np.mean(found.argmax(1) == label)
    assert result.agreement == np.mean(found.argmax(1) == wanted.argmax(1))
    assert result.nmse == pytest.approx(np.mean((found - wanted) ** 2) / wanted.var(), rel=1e-5)
    assert result.max_error == pytest.approx(np.abs(found - wanted).max(), rel=1e-5)
    assert result.kl == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)), rel=1e-5)
    errors = np.mean((found - wanted) ** 2, axis=1) / wanted.var()
    assert result.worst_sample == errors.argmax()
    assert result.worst_nmse == pytest.approx(errors.max(), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-1e4, 1e4), size=st.integers(1, 9))
def test_a_shifted_output_keeps_its_variance(tmp_path_factory: pytest.TempPathFactory, shift: float, size: int) -> None:
    x = (normal(20) + shift).astype(np.float32)
    data = source(tmp_path_factory.mktemp("shift"), x)
    result = evaluate(linear(EYE * 2), data, teacher=linear(EYE), batch_size=size, threads=1)
    wanted = x.astype(np.float64)
    assert result.nmse == pytest.approx(np.mean(wanted**2) / wanted.var(), rel=1e-6)


def test_a_model_against_itself_from_a_file(tmp_path: Path) -> None:
    model = linear(normal(4))
    onnx.save(ir.to_proto(model), tmp_path / "m.onnx")
    result = evaluate(tmp_path / "m.onnx", source(tmp_path, normal(9)), teacher=model, threads=1)
    assert (result.accuracy, result.agreement, result.nmse, result.max_error) == (None, 1.0, 0.0, 0.0)
    assert result.kl == pytest.approx(0, abs=1e-12)


def test_without_labels_or_teacher_there_are_only_samples(tmp_path: Path) -> None:
    result = evaluate(linear(EYE), source(tmp_path, normal(3)), threads=1)
    assert json.loads(json.dumps(result.to_json())) == {
        "samples": 3, "accuracy": None, "agreement": None, "nmse": None, "max_error": None, "kl": None,
        "worst_sample": None, "worst_nmse": None, "outputs": {}, "metric": None,
    }  # fmt: skip


def test_a_single_score_is_no_class(tmp_path: Path) -> None:
    result = evaluate(linear(EYE[:, :1]), source(tmp_path, normal(3), np.zeros(3, np.int64)), threads=1)
    assert result.accuracy is None


def test_error_is_pooled_over_all_outputs_each_around_its_own_mean(tmp_path: Path) -> None:
    x = normal(12)
    result = evaluate(linear(EYE * 2, tail="Exp"), source(tmp_path, x), teacher=linear(EYE, tail="Exp"), threads=1)
    pairs = [(x, 2 * x), (np.exp(x), np.exp(2 * x))]
    error = sum(np.sum((found - wanted) ** 2) for wanted, found in pairs)
    assert result.nmse == pytest.approx(error / sum(wanted.size * wanted.var() for wanted, _ in pairs), rel=1e-4)


def test_probabilities_are_not_put_through_a_softmax_again(tmp_path: Path) -> None:
    x = np.full((6, 4), 0.25, np.float32)
    mixing = np.array([[0.7, 0.1, 0.1, 0.1]] * 4)
    result = evaluate(linear(mixing), source(tmp_path, x), teacher=linear(np.full((4, 4), 0.25)), threads=1)
    assert result.kl == pytest.approx(0.25 * np.log(0.25 / np.array([0.7, 0.1, 0.1, 0.1])).sum(), rel=1e-5)


def test_a_broken_student_is_infinitely_wrong_and_never_right(tmp_path: Path) -> None:
    data = source(tmp_path, normal(5), np.zeros(5, np.int64))
    result = evaluate(linear(EYE * np.nan), data, teacher=linear(EYE), threads=1)
    assert (result.accuracy, result.agreement) == (0.0, 0.0)
    assert (result.nmse, result.max_error, result.kl) == (math.inf, math.inf, math.inf)
    assert (result.worst_sample, result.worst_nmse) == (0, math.inf)
    assert result.to_json()["nmse"] is None


def test_a_constant_teacher_output(tmp_path: Path) -> None:
    data, constant = source(tmp_path, normal(5)), linear(EYE * 0)
    assert evaluate(constant, data, teacher=constant, threads=1).nmse == 0
    assert evaluate(linear(EYE), data, teacher=constant, threads=1).nmse == math.inf


def test_values_that_the_teacher_masks_are_not_compared(tmp_path: Path) -> None:
    x = np.abs(normal(6))
    x[:, 3] = 0  # Log gives -inf here, in teacher and student alike
    result = evaluate(linear(EYE, tail="Log"), source(tmp_path, x), teacher=linear(EYE, tail="Log"), threads=1)
    assert (result.nmse, result.max_error) == (0, 0)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_that_are_no_class_are_named(tmp_path: Path, label: int) -> None:
    labels = np.zeros(7, np.int64)
    labels[5] = label
    with pytest.raises(DataError, match=f"sample 5: label {label} is no class .* expected 0 to 3"):
        evaluate(linear(EYE), source(tmp_path, normal(7), labels), batch_size=2, threads=1)


def test_broken_models_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    for path in (tmp_path / "m.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(ModelError, match=path.name) as caught:
            evaluate(path, source(tmp_path, normal(2)), threads=1)
        assert "\n" not in str(caught.value)


def test_models_that_do_not_match(tmp_path: Path) -> None:
    data = source(tmp_path, normal(4))
    with pytest.raises(ModelError, match=r"expected the outputs of .*\['logits', 'tail'\], found \['logits'\]"):
        evaluate(linear(EYE), data, teacher=linear(EYE, tail="Exp"), threads=1)
    with pytest.raises(ModelError, match=r"expected the teacher's shape \[4, 3\], found \[4, 4\]"):
        evaluate(linear(EYE), data, teacher=linear(EYE[:, :3]), threads=1)
    with pytest.raises(ModelError, match="expected the batch size 3"):
        evaluate(linear(EYE, 2), data, teacher=linear(EYE, 3), threads=1)


def test_specs_leave_initializers_out_and_mark_unknown_dimensions() -> None:
    specs = input_specs(make_session(linear(EYE), threads=1))
    assert specs == [InputSpec("x", np.dtype(np.float32), ("N", 4))]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "strings",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [None])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(ModelError, match=r"input 'x': tensor\(string\) cannot be fed"):
        input_specs(make_session(model.SerializeToString(), threads=1))


class Counting(Silent):
    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.done = 0

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.stages.append((name, total))

    def advance(self, amount: int = 1) -> None:
        self.done += amount


def test_progress_counts_samples(tmp_path: Path) -> None:
    progress = Counting()
    evaluate(linear(EYE, 2), source(tmp_path, normal(7)), batch_size=3, threads=1, progress=progress)
    assert (progress.stages, progress.done) == ([("evaluate", 7)], 7)


# A metric of one's own


Outputs = dict[str, NDArray[np.generic]]


def spearman(student: Outputs, teacher: Outputs, labels: NDArray[np.int64] | None) -> float:
    """Correlation of the ranks of the first column over all samples: no mean over batches."""
    ours, theirs = (answers["logits"][:, 0].argsort().argsort() for answers in (student, teacher))
    return float(np.corrcoef(ours, theirs)[0, 1])


def hits(student: Outputs, teacher: Outputs, labels: NDArray[np.int64] | None) -> np.float32:
    assert labels is not None, "these data have labels"
    return np.float32(np.mean(student["logits"].argmax(axis=1) == labels))


def sees(student: Outputs, teacher: Outputs, labels: NDArray[np.int64] | None) -> int:
    """How many samples there are of each thing, if of each as many."""
    counts = {len(value) for answers in (student, teacher) for value in answers.values()}
    return counts.pop() if len(counts) == 1 and labels is None else -1


def raises(student: Outputs, teacher: Outputs, labels: NDArray[np.int64] | None) -> float:
    raise KeyError("boxes\nand more")


def gives_nothing(student: Outputs, teacher: Outputs, labels: NDArray[np.int64] | None) -> None:
    return None


def gives_nan(student: Outputs, teacher: Outputs, labels: NDArray[np.int64] | None) -> float:
    return math.nan


def gives_a_column(student: Outputs, teacher: Outputs, labels: NDArray[np.int64] | None) -> NDArray[np.generic]:
    return student["logits"][:, 0]


def gives_a_truth(student: Outputs, teacher: Outputs, labels: NDArray[np.int64] | None) -> bool:
    return True


HERE = __name__


@pytest.mark.parametrize("batch_size", [1, 7, 256])
@pytest.mark.parametrize("batch", ["N", 5])
def test_a_metric_of_ones_own_sees_all_samples_together(tmp_path: Path, batch_size: int, batch: int | str) -> None:
    x, weight = normal(23), normal(4, seed=1)
    data, student = source(tmp_path, x), linear(weight, batch, tail="Exp")
    options: dict[str, Any] = {"teacher": linear(EYE, tail="Exp"), "batch_size": batch_size, "threads": 1}
    found = evaluate(student, data, metric=f"{HERE}:spearman", **options)
    wanted = spearman({"logits": x @ weight}, {"logits": x}, None)
    assert found.metric == pytest.approx(wanted, rel=1e-6)
    assert found.to_json()["metric"] == found.metric
    assert evaluate(student, data, metric=f"{HERE}:sees", **options).metric == 23
    assert evaluate(student, data, metric=f"{HERE}:sees", samples=9, **options).metric == 9


def test_a_teacher_beside_itself_has_a_figure_of_its_own(tmp_path: Path) -> None:
    data = source(tmp_path, normal(12))
    assert evaluate(linear(normal(4)), data, metric=f"{HERE}:spearman", threads=1).metric == pytest.approx(1)


def test_a_metric_of_ones_own_has_the_labels(tmp_path: Path) -> None:
    data = source(tmp_path, normal(30), np.random.default_rng(2).integers(0, 4, 30))
    found = evaluate(linear(normal(4)), data, teacher=linear(EYE), metric=f"{HERE}:hits", batch_size=8, threads=1)
    assert found.metric == pytest.approx(found.accuracy)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("raises", "raised KeyError: 'boxes"),
        ("gives_nothing", "returned NoneType, expected a finite float"),
        ("gives_nan", "returned nan, expected a finite float"),
        ("gives_a_column", "returned ndarray, expected a finite float"),
        ("gives_a_truth", "returned bool, expected a finite float"),
    ],
)
def test_a_metric_that_fails_is_one_line(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        evaluate(linear(EYE), source(tmp_path, normal(3)), teacher=linear(EYE), metric=f"{HERE}:{name}", threads=1)
    assert str(caught.value).startswith(f"metric {HERE}:{name}: {told}") and "\n" not in str(caught.value)


def test_a_metric_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no function 'nothing'"):
        evaluate(linear(EYE), source(tmp_path, normal(3)), metric=f"{HERE}:nothing", threads=1)


def test_rows_of_several_shapes_make_no_array(tmp_path: Path) -> None:
    """How many rows there are depends on the sample, as behind a suppression of boxes."""
    positive = helper.make_node("NonZero", ["positive"], ["places"])
    nodes = [helper.make_node("Greater", ["x", "zero"], ["positive"]), positive]
    tensors = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4]),
        helper.make_tensor_value_info("places", TensorProto.INT64, None),
    ]
    graph = helper.make_graph(
        nodes, "places", tensors[:1], tensors[1:], [numpy_helper.from_array(np.float32([0]), "zero")]
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    data = source(tmp_path, np.float32([[1, 1, 1, 1], [1, -1, -1, -1]]))
    with pytest.raises(UsageError, match=r"output 'places' has rows of several shapes, as \[1\] and \[4\]"):
        evaluate(model, data, metric=f"{HERE}:sees", batch_size=1, threads=1)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (4, 3, 0), (0,), ()], ids=str)
def test_outputs_without_numbers_have_no_error(shape: tuple[int, ...]) -> None:
    values = np.zeros(shape, np.float32)
    found = Fidelity()
    rows = found.add(values, values)
    assert rows.shape == shape[:1] and not rows.any() and found.error == 0
    for task in (OutputTask(Classification), OutputTask(Embedding), OutputTask(Regression)):
        if shape:
            told = task.measure
            told.add(values.reshape(*shape, 1), values.reshape(*shape, 1))
            assert told.result(found).nmse == 0
    assert all(found.kind is Regression for found in tasks_of({"y": values}, len(values) if shape else 1).values())


def test_intervals_are_of_samples_not_of_positions() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((40, 6, 5)).astype(np.float32)
    student = teacher + rng.standard_normal((40, 1, 1)).astype(np.float32) * rng.standard_normal((40, 6, 5), np.float32)
    agreed = (student.argmax(2) == teacher.argmax(2)).mean(axis=1)
    reach = 1.959964 * agreed.std(ddof=1) / np.sqrt(40)
    tally, squares = OutputTask(Classification).measure, Fidelity()
    for rows in (slice(0, 15), slice(15, 40)):
        squares.add(student[rows], teacher[rows])
        tally.add(student[rows], teacher[rows])
    found = tally.result(squares)
    assert found.agreement == pytest.approx(agreed.mean())
    assert found.interval == (pytest.approx(agreed.mean() - reach), pytest.approx(agreed.mean() + reach))
    errors = np.square(student - teacher).sum(axis=(1, 2)) * 40 / np.square(teacher - teacher.mean()).sum()
    reach = 1.959964 * errors.std(ddof=1) / np.sqrt(40)
    low, high = OutputTask(Regression).measure.result(squares).interval or (0, 0)
    assert (low, high) == (
        pytest.approx(errors.mean() - reach, rel=1e-4),
        pytest.approx(errors.mean() + reach, rel=1e-4),
    )
