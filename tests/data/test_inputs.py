"""Inputs as models have them: one value for all samples, samples on another axis, control flow that a value decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import ndonnx
from ndonnx.config.recipe import DataRecipe, InputRecipe, Recipe, load_recipe, parse_inputs
from ndonnx.data import InputSpec, open_source
from ndonnx.data.inputs import settle
from ndonnx.errors import DataError, RecipeError
from ndonnx.graph.passes.branches import open_branches
from ndonnx_cli.main import main
from tests.helpers.detectors import detector, speech
from tests.helpers.models import Array, Net, floats, loaded, run
from tests.helpers.runs import Bench, Recorder, statuses

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)


def scaled() -> onnx.ModelProto:
    """A network whose last input, three factors, is the same for all samples."""
    net = Net(3)
    x = net.relu(net.gemm(net.input("x", "N", 6), 6, 24, out="up"))
    x = net.gemm(x, 24, 6, out="down")
    first = net.op("Slice", net.input("scales", 3), net.ints(0), net.ints(1), out="first")
    return net.proto(net.op("Mul", x, first, out="y"))


def bench_of(folder: Path, model: onnx.ModelProto, data: dict[str, Array]) -> Bench:
    bench = Bench(folder)
    onnx.save(model, bench.model)
    np.savez(bench.data, **data)  # type: ignore[arg-type]
    return bench


# What the user says


def test_flags_say_what_the_table_says(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[inputs.state]\naxis = 1\nmax = 2.0\n[inputs.sr]\nvalue = 8000\n")
    flags = parse_inputs(["sr=16000", "input:0=0.6,1,0.8", "mask=true"], ["x=1,3,48,320"])

    found = load_recipe(recipe, model_inputs=flags).model_inputs

    assert found["sr"].value == 16000 and found["state"] == InputRecipe(axis=1, max=2.0)
    assert found["input:0"].value == [0.6, 1, 0.8] and found["mask"].value is True
    assert found["x"].shape == (1, 3, 48, 320)
    assert parse_inputs(["a:axis=1", "a:min=-1"]) == {"a": {"axis": "1", "min": "-1"}}
    both = Recipe.model_validate({"inputs": {"sr": {"value": 1}}})
    assert both.inputs is None and both.model_inputs["sr"].value == 1
    assert Recipe(inputs="refit", model_inputs={"sr": InputRecipe(value=1)}).inputs == "refit"


@pytest.mark.parametrize("text", ["sr", "=3", "sr=a", "sr:axis=x", "sr:axis=-1"])
def test_what_cannot_be_read_is_told_by_name(text: str) -> None:
    with pytest.raises(RecipeError, match=r"sr|NAME"):
        load_recipe(model_inputs=parse_inputs([text]))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"other": {"value": 1}}, "no such input; its inputs are 'x' float32"),
        ({"sr": {"value": 1.5}}, "expected a value of int64"),
        ({"scales": {"value": [1, 2]}}, r"float32 \[3\], found int64 \[2\]"),
        ({"x": {"axis": 2}}, "has 2 axes"),
        ({"x": {"shape": [1, 7]}}, "does not fit input 'x'"),
    ],
)
def test_settings_that_contradict_the_model_are_refused(setting: dict[str, Any], told: str) -> None:
    specs = [InputSpec("x", F32, ("N", 6)), InputSpec("scales", F32, (3,)), InputSpec("sr", I64, ())]
    recipe = load_recipe(model_inputs=setting)

    with pytest.raises(DataError, match=told):
        settle(specs, recipe.model_inputs)


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [
        ([("N", 16), (2, "N", 8)], [0, 1]),
        ([(2, "N", 8), ("N", 16)], [1, 0]),
        ([(None, None), (2, None, 8)], [0, 1]),
        ([(1, 576), (2, 1, 128)], [0, 1]),
        ([(2, 1, 128), (1, 576)], [1, 0]),
        ([("N", "T"), (1, "T", 8)], [0, 0]),
        ([(4, 3), (4, 8)], [0, 0]),
        ([("N", 3), (3,)], [0, 0]),
        # A name that says so is the batch wherever it stands, before any open size that stands first.
        ([("T", "batch", 12), (1, "batch", 16)], [1, 1]),
        ([("seq_len", "batch_size", 12)], [1]),
        ([("T", "N", 12), (2, "N", 8)], [1, 1]),
        ([("B", "N", 3)], [0]),
        # With a fixed batch of 1, heights, widths, lengths and numbers of points are none.
        ([(1, 3, "H", "W")], [0]),
        ([(1, 3, None, None), (1, 8)], [0, 0]),
        ([(1, "N", 3)], [0]),
        ([("T", 1, 80), (2, 1, 64)], [1, 1]),
        ([(None, 1, 80), (2, 1, 64)], [1, 1]),
        ([("frames", 1, 80)], [1]),
        # An image of one channel has its samples first.
        ([("N", 1, 28, 28)], [0]),
        ([("s0", 1, 28, 28), (1,)], [0, 0]),
        ([("T", 6)], [0]),
    ],
)
def test_where_the_samples_lie_is_read_off_the_shapes(shapes: list[tuple[Any, ...]], axes: list[int]) -> None:
    settled, _ = settle([InputSpec(f"i{i}", F32, shape) for i, shape in enumerate(shapes)], {})

    assert [spec.axis for spec in settled] == axes
    assert [spec.native for spec in settled] == shapes
    for spec, shape, axis in zip(settled, shapes, axes, strict=True):
        assert spec.shape[0] == shape[axis]


# What the data hold


def test_a_scalar_and_an_array_of_the_inputs_own_shape_are_one_value(tmp_path: Path) -> None:
    specs = [InputSpec("x", F32, ("N", 6)), InputSpec("state", F32, (2, "N", 4)), InputSpec("scales", F32, (3,))]
    specs.append(InputSpec("sr", I64, ()))
    x, state = np.ones((5, 6), np.float32), np.arange(40, dtype=np.float32).reshape(2, 5, 4)
    arrays = {"x": x, "state": state, "scales": np.array([1, 2, 3], np.float32), "sr": np.array(8000)}
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]

    source = open_source(str(tmp_path / "d.npz"), specs, DataRecipe())
    (batch,) = source.batches(8)

    assert source.length == 5 and set(batch.inputs) == {"x", "state"}
    np.testing.assert_array_equal(batch.inputs["state"], np.moveaxis(state, 1, 0))
    assert source.fixed["sr"].shape == () and source.fixed["sr"] == 8000
    np.testing.assert_array_equal(source.fixed["scales"], arrays["scales"])
    given = open_source(str(tmp_path / "d.npz"), specs, DataRecipe(), settings={"sr": InputRecipe(value=16000)})
    assert given.fixed["sr"] == 16000 and given.fingerprint() != source.fingerprint()
    # With three samples `scales` is still one value; samples that come first already are taken as they are.
    np.savez(tmp_path / "d.npz", **(arrays | {"x": x[:3], "state": np.moveaxis(state, 1, 0)[:3]}))  # type: ignore[arg-type]
    few = open_source(str(tmp_path / "d.npz"), specs, DataRecipe())
    assert few.length == 3 and "scales" in few.fixed
    np.testing.assert_array_equal(next(iter(few.batches(3))).inputs["state"], np.moveaxis(state, 1, 0)[:3])


def test_one_batch_of_a_model_with_a_fixed_batch_is_samples(tmp_path: Path) -> None:
    specs = [InputSpec("x", F32, (2, 6)), InputSpec("y", F32, (2, 3))]
    np.savez(tmp_path / "d.npz", x=np.ones((2, 6), np.float32), y=np.ones((2, 3), np.float32))

    source = open_source(str(tmp_path / "d.npz"), specs, DataRecipe())

    assert source.length == 2 and not source.fixed


def test_scalars_that_differ_and_scalars_that_are_missing_are_told_with_the_way_out(tmp_path: Path) -> None:
    specs = [InputSpec("x", F32, ("N", 2)), InputSpec("sr", I64, ())]
    x = np.ones((4, 2), np.float32)
    np.savez(tmp_path / "d.npz", x=x, sr=np.array([1, 2, 1, 1]))
    with pytest.raises(DataError, match=r"one value for all of them.*--input sr=VALUE"):
        open_source(str(tmp_path / "d.npz"), specs, DataRecipe())
    np.savez(tmp_path / "d.npz", x=x)
    with pytest.raises(DataError, match=r"missing 'sr'; .*--input sr=VALUE"):
        open_source(str(tmp_path / "d.npz"), specs, DataRecipe())
    np.savez(tmp_path / "d.npz", x=x, sr=np.array([7, 7, 7, 7]))
    assert open_source(str(tmp_path / "d.npz"), specs, DataRecipe()).fixed["sr"] == 7
    with pytest.raises(DataError, match="--input sr=VALUE"):
        open_source("gaussian:4", specs, DataRecipe())


@pytest.mark.parametrize("single", [True, False])
def test_functions_may_give_one_value_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool) -> None:
    (tmp_path / f"items{single:d}.py").write_text(
        "import numpy as np\n"
        "def batches():\n"
        "    yield {'x': np.ones((2, 6), 'f'), 'state': np.ones((2, 2, 4), 'f'), 'scales': np.ones(3, 'f'), 'sr': 8}\n"
        "    yield {'x': np.ones((1, 6), 'f'), 'state': np.ones((2, 1, 4), 'f'), 'scales': np.ones(3, 'f'), 'sr': 8}\n"
        "def singles():\n"
        "    for i in range(3):\n"
        "        yield {'x': np.ones(6, 'f'), 'state': np.ones((2, 4), 'f'), 'scales': np.ones(3, 'f'), 'sr': 8}\n"
        "def differing():\n"
        "    for i in range(3):\n"
        "        yield {'x': np.ones(6, 'f'), 'state': np.ones((2, 4), 'f'), 'scales': np.ones(3, 'f'), 'sr': i}\n"
    )
    monkeypatch.chdir(tmp_path)
    specs = [InputSpec("x", F32, ("N", 6)), InputSpec("state", F32, (2, "N", 4)), InputSpec("scales", F32, (3,))]
    specs.append(InputSpec("sr", I64, ()))
    name = f"items{single:d}:{'singles' if single else 'batches'}"

    source = open_source(name, specs, DataRecipe())

    assert sum(len(batch) for batch in source.batches(2)) == 3
    assert set(source.fixed) == {"scales", "sr"}
    assert next(iter(source.batches(2))).inputs["state"].shape == (2, 2, 4)
    if single:
        with pytest.raises(DataError, match=r"item 1.*'sr' has one value"):
            list(open_source("items1:differing", specs, DataRecipe()).batches(4))


# Control flow


def test_the_branch_that_a_value_decides_takes_the_place_of_the_if() -> None:
    model = detector(branches=True)
    teacher = loaded(model)

    for rate in (8000, 16000):
        opened = open_branches(teacher, {"sr": np.array(rate)})

        assert "If" not in [node.op_type for node in opened.graph]
        assert [value.name for value in opened.graph.inputs] == ["frames", "state", "sr"]
        feed = speech(3, rate=rate)
        for name, array in run(opened, feed).items():
            np.testing.assert_array_equal(array, run(model, feed)[name])
    assert open_branches(teacher) is teacher


def test_an_if_on_the_number_of_axes_opens_by_itself() -> None:
    net = Net(4)
    x = net.input("x", "N", 5)
    rank = net.op("Size", net.op("Shape", x))
    flat = net.op("Not", net.op("Equal", rank, net.constant("two", np.array(2))))
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["x"], [f"{name}/made"])], name, [], [floats(f"{name}/made", "N", 5)]
        )
        for name, op in (("then", "Neg"), ("else", "Tanh"))
    }
    model = net.proto(net.op("If", flat, out="y", **branches))

    opened = open_branches(loaded(model))

    assert "If" not in [node.op_type for node in opened.graph]
    feed = {"x": np.ones((2, 5), np.float32)}
    np.testing.assert_array_equal(run(opened, feed)["y"], run(model, feed)["y"])


# From end to end


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("said", ["by the data", "by the recipe"])
def test_a_state_a_scalar_and_control_flow_are_distilled(tmp_path: Path, branches: bool, said: str) -> None:
    data = speech()
    settings: dict[str, Any] = {}
    if said == "by the recipe":
        del data["sr"]
        settings = {"model_inputs": {"sr": InputRecipe(value=16000)}}
    bench = bench_of(tmp_path, detector(branches=branches), data)

    result = bench.compress(steps=10, **settings)

    assert list(statuses(result).values()).count("distilled") >= 1, [n.reason for n in result.report.neighbourhoods]
    assert result.report.student.parameters < result.report.teacher.parameters
    student, teacher = onnx.load(bench.student), onnx.load(bench.model)
    assert [i.name for i in student.graph.input] == ["frames", "state", "sr"]
    assert student.graph.output == teacher.graph.output
    ours, theirs = (run(model, speech(6)) for model in (student, teacher))
    assert ours["next"].shape == (2, 6, 8)
    assert all(np.abs(ours[name] - theirs[name]).max() < 1 for name in ours)


@pytest.mark.usefixtures("one_core")
def test_nothing_changed_is_the_teacher_with_its_branches(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, detector(branches=True), speech())

    bench.compress(keep=1.0, steps=0)

    student, teacher = onnx.load(bench.student), onnx.load(bench.model)
    assert [node.op_type for node in student.graph.node] == [node.op_type for node in teacher.graph.node]
    for rate in (8000, 16000):
        for name, array in run(student, speech(4, rate=rate)).items():
            np.testing.assert_array_equal(array, run(teacher, speech(4, rate=rate))[name])


@pytest.mark.usefixtures("one_core")
def test_factors_that_are_the_same_for_all_samples_are_no_samples(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((60, 6)).astype(np.float32)
    bench = bench_of(tmp_path, scaled(), {"x": x, "scales": np.array([2, 1, 1], np.float32)})

    result = bench.compress(finetune_steps=6, steps=10)

    assert "distilled" in statuses(result).values()
    assert result.report.finetune is not None and result.report.finetune.reason is None
    student = onnx.load(bench.student)
    assert {i.name for i in student.graph.input} == {"x", "scales"}
    assert run(student, {"x": x[:2], "scales": np.array([2, 1, 1], np.float32)})["y"].shape == (2, 6)


@pytest.mark.usefixtures("one_core")
def test_every_verb_takes_a_value_and_an_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = speech(80)
    del data["sr"]
    bench = bench_of(tmp_path, detector(branches=True), data)
    model, npz = str(bench.model), str(bench.data)
    rate = ["--input", "sr=16000", "--input", "state:axis=1"]

    def told(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*arguments, *rate, "--json", "-q"]) in (0, 3)
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    pieces = told("inspect", model)
    assert not any("If" in (piece["reason"] or "") for piece in pieces["neighbourhoods"])
    assert told("evaluate", model, "--data", npz, "--teacher", model)["metrics"]["nmse"] == 0
    timed = ndonnx.benchmark(
        model,
        data=npz,
        recipe=load_recipe(model_inputs=parse_inputs(rate[1::2])),
        batch_sizes=[2],
        processes=2,
        rounds=3,
    )
    assert timed.providers[0].batches[0].model.p50_ms > 0
    study = told("threshold", model, "--data", npz, "--samples", "40", "--repeats", "1", "-o", str(tmp_path / "t"))
    assert study["tolerances"]
    common = ["--data", npz, "--steps", "2", "--samples", "40", "--executor", "serial"]
    found = told("search", model, *common, "--candidates", "width 0.5", "--held-out", "20", "-o", str(tmp_path / "s"))
    assert found["students"]


@pytest.mark.usefixtures("one_core")
def test_a_model_with_a_fixed_value_is_hardened(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((60, 6)).astype(np.float32)
    bench = bench_of(tmp_path, scaled(), {"x": x, "scales": np.array([2, 1, 1], np.float32)})

    report = ndonnx.harden(bench.model, data=str(bench.data), steps=3, recipe=Recipe(executor="serial")).report

    assert report.metrics["hardened"].nmse is not None


@pytest.mark.usefixtures("one_core")
def test_a_teacher_that_draws_random_numbers_is_learnt_on_its_own_values(tmp_path: Path) -> None:
    """What is captured later has other noise: values of the students' own have nothing to be compared with."""
    net = Net(7)
    x = net.input("x", "N", 8)
    for i in range(2):
        up = net.relu(net.gemm(x, 8, 24, out=f"up{i}"))
        x = net.op("Add", x, net.gemm(up, 24, 8, out=f"down{i}"), out=f"unit{i}")
        if i == 0:
            drawn = net.op("RandomNormalLike", x, out="drawn")
            x = net.op("Add", x, drawn, out="noisy")
    data = np.random.default_rng(0).standard_normal((80, 8)).astype(np.float32)
    bench = bench_of(tmp_path, net.proto(x), {"x": data})
    progress = Recorder()

    result = bench.compress(inputs=None, keep=0.9, steps=60, lr=0.02, progress=progress)

    ends = [n.nmse for n in result.report.neighbourhoods if n.status == "distilled"]
    assert len(ends) == 2 and all(end is not None and end < 0.3 for end in ends)
    assert any("draws random numbers" in note for note in progress.notes)
