"""The library as Python users write it: data, models, recipes, methods and progress as objects they hold."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ndonnx
from ndonnx.api.settings import recipe_of
from ndonnx.config.recipe import DataRecipe
from ndonnx.data import InputSpec, open_source, registry
from ndonnx.data.sources import objects
from tests.helpers.models import Array, Net, inputs_of, residual_cnn
from tests.helpers.runs import SMALL, UNITS, Bench, Recorder

VECTOR = InputSpec("x", np.dtype(np.float32), ("N", 4))
MASK = InputSpec("mask", np.dtype(np.int64), ("N",))
ROWS = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
CLASSES = np.arange(10)
ROOT = Path(__file__).resolve().parents[2]


class ByNumber(Dataset[Any]):
    """Samples and labels by their number, without `__iter__`."""

    def __init__(self, rows: Array, classes: Array) -> None:
        self.rows, self.classes = rows, classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(self.rows)[index], int(self.classes[index])


class HuggingFace:
    """What is used of a `datasets.Dataset`: lists until another format is asked for."""

    def __init__(self, columns: dict[str, Array], numpy: bool = False) -> None:
        self.columns, self.numpy = columns, numpy

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: column[index] for name, column in self.columns.items()}
        return row if self.numpy else {name: value.tolist() for name, value in row.items()}

    def with_format(self, kind: str) -> HuggingFace:
        return HuggingFace(self.columns, kind == "numpy")


def pairs(rows: Array = ROWS, classes: Array = CLASSES) -> TensorDataset:
    return TensorDataset(torch.from_numpy(rows), torch.from_numpy(classes))


def opened(data: Any, *inputs: InputSpec) -> Any:
    return open_source(data, inputs or [VECTOR], DataRecipe())


def rows_of(data: Any, rows: list[int], *inputs: InputSpec) -> tuple[dict[str, Array], Array | None]:
    batches = list(opened(data, *inputs).take(np.array(rows), 2))
    labels = [batch.labels for batch in batches if batch.labels is not None]
    names = batches[0].inputs
    joined = {name: np.concatenate([batch.inputs[name] for batch in batches]) for name in names}
    return joined, np.concatenate(labels) if labels else None


def refused(data: Any, *inputs: InputSpec) -> str:
    with pytest.raises(ndonnx.DataError) as caught:
        opened(data, *inputs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Data

UNLABELLED = {
    "array": lambda: ROWS,
    "tensor": lambda: torch.from_numpy(ROWS).requires_grad_(),
    "not contiguous": lambda: np.asfortranarray(ROWS),
    "dict": lambda: {"x": ROWS, "unread": [1]},
    "samples": lambda: list(ROWS),
    "once": lambda: iter(ROWS),
    "batches": lambda: (ROWS[start : start + 3] for start in range(0, 10, 3)),
    "dicts": lambda: [{"x": row} for row in ROWS],
    "lists of numbers": lambda: ROWS.astype(np.float64).tolist(),
    "loader": lambda: DataLoader(ROWS, batch_size=4),  # type: ignore[arg-type]
    "loader of tuples": lambda: DataLoader(TensorDataset(torch.from_numpy(ROWS)), batch_size=4),
}
LABELLED = {
    "dict": lambda: {"x": ROWS, "label": CLASSES},
    "dict, plural": lambda: {"x": ROWS, "labels": CLASSES.tolist()},
    "loader": lambda: DataLoader(pairs(), batch_size=3),
    "data set": pairs,
    "by number": lambda: ByNumber(ROWS, CLASSES),
    "tuples": lambda: [(row, number) for number, row in enumerate(ROWS)],
    "dicts in tuples": lambda: [({"x": ROWS[:4]}, CLASSES[:4]), ({"x": ROWS[4:]}, CLASSES[4:])],
    "dicts": lambda: [{"x": row, "labels": number} for number, row in enumerate(ROWS)],
    "hugging face": lambda: HuggingFace({"text": CLASSES, "x": ROWS, "label": CLASSES}),
}


@pytest.mark.parametrize("form", UNLABELLED)
def test_every_form_gives_the_same_rows_by_number_and_is_known_by_its_contents(form: str) -> None:
    found, labels = rows_of(UNLABELLED[form](), [7, 0, 7, 3])
    assert labels is None and found["x"].dtype == np.float32
    np.testing.assert_array_equal(found["x"], ROWS[[7, 0, 7, 3]])
    prints = {opened(data).fingerprint() for data in (UNLABELLED[form](), UNLABELLED[form]())}
    assert len(prints) == 1 and opened(ROWS + 1).fingerprint() not in prints
    if form != "lists of numbers":
        assert prints == {opened(ROWS).fingerprint()}


@pytest.mark.parametrize("form", LABELLED)
def test_labels_come_with_their_rows(form: str) -> None:
    found, labels = rows_of(LABELLED[form](), [9, 2, 4])
    np.testing.assert_array_equal(found["x"], ROWS[[9, 2, 4]])
    assert labels is not None and labels.dtype == np.int64 and labels.tolist() == [9, 2, 4]
    other = {"x": ROWS, "label": CLASSES[::-1]}
    assert opened(LABELLED[form]()).fingerprint() == opened(LABELLED["dict"]()).fingerprint()
    assert opened(other).fingerprint() != opened(LABELLED["dict"]()).fingerprint()


@pytest.mark.parametrize(
    "data",
    [
        {"x": ROWS, "mask": CLASSES},
        [(ROWS, CLASSES)],
        [[ROWS, CLASSES, CLASSES]],
        [((ROWS, CLASSES), CLASSES)],
        [{"mask": number, "x": row} for number, row in enumerate(ROWS)],
        DataLoader(pairs(), batch_size=4),
    ],
    ids=["dict", "tuple", "and labels", "nested", "dicts", "loader"],
)
def test_several_inputs_come_by_name_or_in_the_order_of_the_model(data: Any) -> None:
    found, _ = rows_of(data, [5, 1], VECTOR, MASK)
    np.testing.assert_array_equal(found["x"], ROWS[[5, 1]])
    assert found["mask"].tolist() == [5, 1]


def raising() -> Iterator[Array]:
    yield ROWS
    raise RuntimeError("the disk is gone\nand more")


@pytest.mark.parametrize(
    ("data", "message"),
    {
        "nothing": ([], "gives no samples"),
        "no data": (object(), "unknown kind of data source; expected a .npz or .npy file"),
        "wrong shape": (ROWS[:, :3], "expected float32 [N, 4], found float32 [10, 3]"),
        "wrong type": ({"x": ROWS > 0}, "expected float32 [N, 4], found bool [10, 4]; convert the array"),
        "ragged": ({"x": [[1.0], [1.0, 2.0]]}, "'x': cannot be read as an array"),
        "wrong name": ({"y": ROWS}, "expected the keys 'x' (and 'label' if there are labels), found 'y'; missing 'x'"),
        "wrong names": ([{"y": ROWS}], "item 0: expected the inputs ['x'], found ['y']"),
        "too many": ([(ROWS, CLASSES, CLASSES)], "found 3; give a dict of arrays by input"),
        "unequal": ({"x": ROWS, "label": CLASSES[:3]}, "expected a label for each of 10 samples, found 3 labels"),
        "float labels": ([(ROWS, ROWS[:, 0])], "label: expected integer labels [n], found float32 [10]"),
        "some labels": ([{"x": ROWS, "label": CLASSES}, {"x": ROWS}], "some items have a label and some have none"),
        "broken off": (raising(), "raised RuntimeError: the disk is gone"),
        "not finite": ([ROWS, ROWS * np.nan], "item 1: 'x': sample 10: NaN or Inf"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_told_in_one_line(data: Any, message: str) -> None:
    assert message in refused(data)


def test_samples_of_unequal_shapes_are_refused_where_they_begin() -> None:
    tokens = InputSpec("ids", np.dtype(np.int64), ("N", "length"))
    message = refused([np.zeros((2, 5), np.int64), np.zeros((1, 7), np.int64)], tokens)
    assert "sample 2 is int64 [7], those before it are int64 [5]; pad them" in message


def test_one_array_does_not_feed_a_model_with_two_inputs() -> None:
    assert "the model has the inputs 'x', 'mask'; give a dict of arrays" in refused(ROWS, VECTOR, MASK)


def test_a_value_for_all_samples_is_fixed_wherever_it_comes_from() -> None:
    rate = InputSpec("rate", np.dtype(np.int64), ())
    for data in ({"x": ROWS, "rate": 16000}, [{"x": row, "rate": 16000} for row in ROWS]):
        source = opened(data, VECTOR, rate)
        assert source.fixed["rate"] == 16000 and [entry.name for entry in source.inputs] == ["x"]


def test_many_samples_are_set_aside_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "IN_MEMORY", 64)
    source = opened(iter(ROWS))
    assert isinstance(source._arrays["x"], np.memmap)
    np.testing.assert_array_equal(next(source.take(np.array([9, 0]), 2)).inputs["x"], ROWS[[9, 0]])
    assert source.fingerprint() == opened(ROWS).fingerprint()


def test_an_iterable_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "MOST_BYTES", 1000)
    assert "give fewer, as itertools.islice" in refused(repeat(ROWS))


# A source of one's own


@ndonnx.register_source("a toy of so many samples", opens=lambda given: isinstance(given, str) and given[:4] == "toy:")
def toy(opening: ndonnx.Opening) -> ndonnx.DataSource:
    count = int(opening.spec.partition(":")[2])
    return ndonnx.ArraySource(opening, inputs_of(residual_cnn(), count))


def test_a_source_of_ones_own_is_used_by_its_name(bench: Bench) -> None:
    result = ndonnx.compress(bench.model, data="toy:48", **SMALL)
    result.student.save(bench.folder / "toy.onnx")
    assert (bench.folder / "toy.onnx").read_bytes() == bench.bytes()
    with pytest.raises(ndonnx.DataError, match="a toy of so many samples"):
        ndonnx.compress(bench.model, data="things.csv", **SMALL)


# Models, and students as they come back


def test_students_of_the_same_rows_are_the_same_byte_for_byte(bench: Bench) -> None:
    ((name, rows),) = inputs_of(residual_cnn(), 48).items()
    model = onnx.load(bench.model)
    forms: dict[str, Any] = {
        "npz": bench.data,
        "array": rows,
        "dict": {name: rows},
        "loader": DataLoader(TensorDataset(torch.from_numpy(rows)), batch_size=5),
        "hugging face": HuggingFace({name: rows}),
    }
    students = {}
    for form, data in forms.items():
        result = ndonnx.compress(model, data=data, eval_data=bench.data, output=bench.student, **SMALL)
        students[form] = bench.student.read_bytes()
        assert {n.name for n in result.report.neighbourhoods if n.status == "distilled"} == UNITS
        assert result.student.proto().SerializeToString(deterministic=True) == students[form]
    assert set(students.values()) == {bench.bytes()}


def test_a_model_in_memory_leaves_nothing_behind_and_is_not_changed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    given = residual_cnn()
    before, held = given.SerializeToString(deterministic=True), ir.from_proto(given)
    proto, model = (ndonnx.compress(m, data=bench.data, **SMALL) for m in (given, held))
    assert list(empty.iterdir()) == []
    assert given.SerializeToString(deterministic=True) == before
    assert ir.to_proto(held).SerializeToString(deterministic=True) == ir.to_proto(
        ir.from_proto(given)
    ).SerializeToString(deterministic=True)
    assert proto.report.run_dir is None and proto.report.teacher.path is None
    onnx.checker.check_model(proto.student.proto())
    bodies = [result.student.proto().graph.SerializeToString(deterministic=True) for result in (proto, model)]
    assert bodies[0] == bodies[1]


def test_a_model_in_memory_continues_in_a_run_directory(bench: Bench) -> None:
    def statuses() -> set[str]:
        result = ndonnx.compress(residual_cnn(), data=np.load(bench.data)["x"], run_dir=bench.folder / "kept", **SMALL)
        return {n.status for n in result.report.neighbourhoods if n.name in UNITS}

    assert statuses() == {"distilled"}
    assert statuses() == {"reused"}


@pytest.mark.slow
def test_every_verb_takes_models_and_data_in_memory(bench: Bench) -> None:
    model, data = residual_cnn(), dict(np.load(bench.data))
    student = ndonnx.compress(model, data=data, **SMALL).student
    found = ndonnx.evaluate(student.model, data, teacher=model)
    assert found.samples == 48 and found.nmse is not None and found.nmse > 0
    assert ndonnx.evaluate(student.proto(), data, teacher=model).nmse == found.nmse
    inspection = ndonnx.inspect(model, check=True, data=data, keep=0.25)
    assert inspection.model == model.graph.name
    speed = ndonnx.benchmark(student.model, against=model, data=data, batch_sizes=[1], processes=2, rounds=3)
    assert speed.fidelity is not None and speed.fidelity["model"].nmse == found.nmse
    assert speed.against is not None and speed.against.path == model.graph.name


def test_search_gives_its_students_back(bench: Bench) -> None:
    result = ndonnx.search(
        residual_cnn(),
        data=dict(np.load(bench.data)),
        pareto=2,
        search={"candidates": [ndonnx.Width(0.5)], "steps": 2, "samples": 8},
        **SMALL,
    )
    points = {point.name: point for point in result.report.students}
    assert result.students and set(result.students) <= set(points)
    for name, student in result.students.items():
        assert student.path is None
        onnx.checker.check_model(student.proto())
        assert sum(np.prod(t.dims, dtype=int) for t in student.proto().graph.initializer) >= points[name].params


@pytest.mark.parametrize("verb", ["harden", "threshold"])
def test_verbs_that_only_measure_or_train_take_them_too(bench: Bench, verb: str) -> None:
    data = dict(np.load(bench.data))
    if verb == "harden":
        result = ndonnx.harden(residual_cnn(), data=data, **SMALL)
        onnx.checker.check_model(result.proto())
    else:
        report = ndonnx.threshold(residual_cnn(), data=data, samples=16, amplitudes=[0.1], repeats=1, keep=[0.5])
        assert report.data == "data of type dict"


@pytest.mark.parametrize("model", [3, None, b"bytes"])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ndonnx.ModelError, match=f"found {type(model).__name__}"):
        ndonnx.inspect(model)


def test_weights_in_files_that_nobody_names_are_refused(tmp_path: Path) -> None:
    onnx.save(residual_cnn(), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    with pytest.raises(ndonnx.ModelError, match="in another file"):
        ndonnx.inspect(onnx.load(tmp_path / "m.onnx", load_external_data=False))
    assert ndonnx.inspect(ir.load(tmp_path / "m.onnx")).to_json()["neighbourhoods"]


# Recipes and methods


@pytest.mark.parametrize(
    ("settings", "recipe"),
    [
        ({"method": ndonnx.Width(0.25)}, {"keep": 0.25}),
        ({"method": ndonnx.Width(0.5, round_to=8, init="random")}, {"keep": 0.5, "round_to": 8, "init": "random"}),
        ({"method": ndonnx.Sparsity("2:4")}, {"method": "sparsity", "sparsity": "2:4"}),
        ({"method": ndonnx.LowRank(0.3)}, {"method": "lowrank", "keep": 0.3}),
        ({"method": ndonnx.ActivationSwap(("Relu=HardSwish",))}, {"method": "activation", "swap": ("Relu=HardSwish",)}),
        ({"method": ndonnx.Removal()}, {"method": "removal"}),
        ({"inputs": {"sr": {"value": 16000}}}, {"model_inputs": {"sr": {"value": 16000}}}),
        (
            {"search": {"candidates": [ndonnx.Sparsity("0.5"), "width 0.5"]}},
            {"search": {"candidates": ("sparsity 0.5", "width 0.5")}},
        ),
    ],
)
def test_objects_stand_for_keys_of_the_recipe(settings: dict[str, Any], recipe: dict[str, Any]) -> None:
    made = recipe_of(None, settings)
    assert made == recipe_of(recipe, {}) == recipe_of(settings, {})
    assert made.model_copy(update={"init": "least-squares"}) == ndonnx.Recipe(**recipe).model_copy(
        update={"init": "least-squares"}
    )


def test_settings_go_over_a_recipe_of_any_form(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("keep = 0.25\nsteps = 7\n[search]\nsteps = 3\n")
    values = {"keep": 0.25, "steps": 7, "search": {"steps": 3}}
    for recipe in (tmp_path / "r.toml", str(tmp_path / "r.toml"), values, ndonnx.Recipe(**values)):  # type: ignore[arg-type]
        made = recipe_of(recipe, {"steps": 9, "search": {"samples": 5}, "keep": None})
        assert (made.keep, made.steps, made.search.steps, made.search.samples) == (0.25, 9, 3, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kep": 0.5}, "unknown key 'kep'; known keys: augment, baselines, batch_size"),
        ({"keep": 2}, "'keep' = 2"),
        ({"method": 3}, "method int: expected the name of a method, or a student method as ndonnx.Width(0.5)"),
        ({"method": ndonnx.Width(0.5), "keep": 0.3}, "'keep' is said twice"),
        ({"student": lambda inputs, output: None}, "define it as a function of a module of its own"),
        ({"search": {"candidates": [ndonnx.Width(0.5, init="random")]}}, "'init' is the same for all candidates"),
    ],
)
def test_settings_that_are_none_are_refused_with_the_known_ones(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ndonnx.RecipeError, match=re.escape(message)):
        ndonnx.compress("m.onnx", data=ROWS, **settings)


def test_a_method_as_an_object_makes_the_same_student(bench: Bench) -> None:
    ndonnx.compress(bench.model, data=bench.data, output=bench.student, method=ndonnx.Sparsity("0.7"), **SMALL)
    made = bench.student.read_bytes()
    assert made == bench.bytes("other", method="sparsity", sparsity="0.7")


# Progress


def test_a_callable_is_told_what_a_progress_is(bench: Bench) -> None:
    recorder, events = Recorder(), list[ndonnx.Event]()
    bench.compress("one", recorder)
    ndonnx.compress(
        bench.model,
        data=bench.data,
        output=bench.student,
        run_dir=bench.folder / "two",
        progress=events.append,
        **SMALL,
    )
    assert [event.name for event in events if event.kind == "stage"] == recorder.stages
    ends = {event.name: event for event in events if event.kind == "finished"}
    assert {name: (event.message or "").partition(":")[0] for name, event in ends.items()} == recorder.ends
    assert [event.message for event in events if event.kind == "note"] == recorder.notes
    assert all(ends[name].nmse is not None for name in UNITS)
    done = [event.done for event in events if event.kind == "advance" and event.name == "distil"]
    assert done == sorted(done) and done[-1] == len(UNITS)


def test_without_a_progress_stages_and_notes_are_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ndonnx")
    ndonnx.compress(bench.model, data=bench.data, output=bench.student, **SMALL)
    told = {record.getMessage(): record.levelname for record in caplog.records if record.name == "ndonnx"}
    assert told["load"] == told["n02 distilled"] == "INFO"
    assert [level for text, level in told.items() if text.startswith("activations of")] == ["INFO"]
    assert [level for text, level in told.items() if "says little; give --eval" in text] == ["WARNING"]


def test_what_cannot_be_told_is_refused(bench: Bench) -> None:
    with pytest.raises(ndonnx.UsageError, match="expected a callable or a Progress, found int"):
        ndonnx.compress(bench.model, data=bench.data, progress=3)  # type: ignore[arg-type]


# Names


def test_public_names_are_there_and_are_no_modules() -> None:
    assert set(ndonnx.__all__) < set(dir(ndonnx))
    assert not [name for name in ndonnx.__all__ if isinstance(getattr(ndonnx, name), ModuleType)]


# Documents


def python_block(document: str, heading: str) -> str:
    text = (ROOT / document).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    return text.partition("```python\n")[2].partition("```")[0]


def classifier() -> onnx.ModelProto:
    """A small classifier of images with class probabilities."""
    net = Net()
    x = net.input("image", "N", 3, 8, 8)
    for inner in ("first", "second"):
        x = net.relu(net.conv(net.relu(net.conv(x, 3, 8, out=inner)), 8, 3))
    return net.proto(net.op("Softmax", net.pooled_classifier(x, 3), axis=-1))


@pytest.mark.slow
def test_readme_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = classifier()
    onnx.save(model, "model.onnx")
    rows = inputs_of(model, 300)
    labels = np.random.default_rng(0).integers(0, 4, 300)
    for name in ("calib.npz", "test.npz"):
        np.savez(name, label=labels, **rows)  # type: ignore[arg-type]
    exec(compile(python_block("README.md", "## Python"), "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "student.onnx").is_file()


def test_the_page_on_sources_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "adding-a-source.md"
    assert len(page.read_text(encoding="utf-8").splitlines()) < 50
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", [*registry._registered])  # its kind is for this test alone
    net = Net()
    hidden = net.relu(net.op("MatMul", net.input("x", "N", 6), net.weight("a", 6, 8)))
    onnx.save(net.proto(net.op("MatMul", hidden, net.weight("b", 8, 2))), "model.onnx")
    np.savetxt("table.csv", np.random.default_rng(0).standard_normal((40, 6)), delimiter=",")
    exec(
        compile(python_block("docs/adding-a-source.md", "# Adding a data source"), page.name, "exec"),
        {"__name__": "page"},
    )
