"""Weights that are shared stay shared: one student for all places, one neighbourhood, or left as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ndonnx.api.compress import CompressResult, compress
from ndonnx.api.search import search
from ndonnx.assemble.splice import splice
from ndonnx.assemble.verify import check_no_larger
from ndonnx.config.recipe import Recipe
from ndonnx.distill.samples import SharedSamples, SliceSamples
from ndonnx.errors import VerificationError
from ndonnx.graph import fold_constants, load
from ndonnx.graph.costs import held_weights, parameters_of
from ndonnx.partition import Partition
from ndonnx.students import TeacherSlice
from ndonnx.students.cutting import shrink
from ndonnx.students.methods.width import Width
from ndonnx.students.zeroing import check_by_zeroing
from ndonnx.teacher import ActivationStore
from tests.helpers import sharing
from tests.helpers.models import Array, Net, inputs_of, loaded, parted, residual_cnn, run
from tests.helpers.runs import ALONE, Bench

pytestmark = pytest.mark.usefixtures("one_core")

MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "albert": sharing.albert,
    "albert of two": lambda: sharing.albert(2, stem=False),
    "siamese": sharing.towers,
    "triplet": lambda: sharing.towers("abc"),
    "head": sharing.head,
    "transposed": sharing.tied,
    "transposed, rank 3": lambda: sharing.tied(rank=3),
    "identity": lambda: sharing.tied("Identity"),
    "language model": sharing.language_model,
    "unrolled": sharing.unrolled,
    "branches": sharing.branches,
    "alike but one": sharing.alike_but_one,
    "vectors": sharing.same_vectors,
}
SHRINKING = [name for name in MODELS if name != "unrolled"]
"""Those with a width to shrink: the cell of the other one reads what it makes."""


def places(parts: Partition) -> list[int]:
    """How many places each student has."""
    return [len(parts.uses(n)) for n in parts.trained]


def reading(path: Path) -> list[int]:
    """How often each matrix of a model is read, through its transposes too."""
    model = load(path)
    matrices = [v for v in model.graph.initializers.values() if v.shape is not None and len(v.shape) > 1]
    counts = []
    for value in matrices:
        users = value.consumers()
        views = [user for user in users if user.op_type in ("Transpose", "Identity")]
        counts.append(len(users) - len(views) + sum(len(view.outputs[0].consumers()) for view in views))
    return sorted(counts)


def left(bench: Bench) -> float:
    """Part of the teacher's float weights that the student's file holds."""
    student, teacher = (held_weights(load(path))[0] for path in (bench.student, bench.model))
    return student / teacher


def go(bench: Bench, name: str = "run", **recipe: Any) -> CompressResult:
    settings = ALONE | {"steps": 3, "keep": 0.5, "round_to": 1} | recipe
    return compress(
        bench.model,
        data=str(bench.data),
        output=bench.student,
        run_dir=bench.folder / name,
        recipe=Recipe(**settings),
    )


def distance(bench: Bench, one: str, other: str, feed: dict[str, Array]) -> Array:
    given = {"a": feed[one], "b": feed[other]}
    return run(onnx.load(bench.student), given)["to_b"]


# Which places have one student


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (sharing.albert(2), [2]),
        (sharing.albert(12), [12]),
        (sharing.albert(3, width=16, inner=8), [3]),
        (sharing.albert(3, tail=True), [3]),
        (sharing.albert(3, stem=False), [3]),
        (sharing.towers(), [2, 2]),
        (sharing.towers("abc"), [3, 3]),
        (sharing.head(), [3]),
        (sharing.head(norm=True), [3]),
        (sharing.tied(), [1]),
        (sharing.tied(rank=3), [1]),
        (sharing.tied("Identity"), [1]),
        (sharing.branches(), [1]),
        (sharing.alike_but_one(), [1]),
        (sharing.same_vectors(), [1, 1, 1]),
        (residual_cnn(), [1, 1, 1]),
    ],
)
def test_what_reads_the_same_weights_alike_has_one_student(model: onnx.ModelProto, expected: list[int]) -> None:
    _, parts = parted(model)
    assert places(parts) == expected


def test_a_place_knows_the_values_that_correspond() -> None:
    _, parts = parted(sharing.towers())
    first, other = parts.uses(parts.trained[0])
    assert first.first is None and other.first == first.name
    student = parts.slice_of(first)
    feed = inputs_of(sharing.towers())
    ends = [str(n.exit.name) for n in (first, other) if n.exit is not None]
    expected = run(sharing.towers(), feed, ends)
    assert np.array_equal(run(student, feed)[ends[0]], expected[ends[0]])
    assert np.array_equal(run(parts.at(other, student), feed)[ends[1]], expected[ends[1]])


def test_places_of_one_student_come_together_where_neither_needs_the_other() -> None:
    _, siamese = parted(sharing.towers())
    assert [n.name for n in siamese.in_order] == ["n01", "n03", "n02", "n04"]
    assert all(map(siamese.together, siamese.distillable))
    _, albert = parted(sharing.albert(3))
    assert albert.in_order == albert.distillable
    assert [albert.together(n) for n in albert.distillable] == [True, False, False]


def test_what_is_kept_says_who_else_reads_the_weight() -> None:
    _, parts = parted(sharing.albert(3, stem=False), freeze=["layer2"])
    reasons = [n.reason or "" for n in parts.neighbourhoods]
    assert not parts.distillable
    assert reasons[1].startswith("frozen")
    assert reasons[0] == "shares the weight 'up' with n02, which is kept"


# Ties by operators


@pytest.mark.parametrize("name", ["transposed", "transposed, rank 3", "identity", "language model"])
def test_a_tied_weight_counts_once(name: str) -> None:
    model = MODELS[name]()
    held = sum(int(np.prod(weight.dims)) for weight in model.graph.initializer if weight.data_type == 1)
    working = fold_constants(loaded(model))
    assert parameters_of(working.graph) == held
    feed = inputs_of(model)
    expected, found = run(model, feed)["y"], run(working, feed)["y"]
    assert np.array_equal(expected, found)


def views(*paths: Sequence[str]) -> ir.Model:
    """A model, folded, in which one matrix is read by way of operators: `t` transposes, `c` casts, `r` reshapes."""
    net = Net(1)
    weight, ends = net.constant("w", net.rng.standard_normal((4, 4)).astype(np.float16)), []
    for path in paths:
        value = weight
        for step in path:
            match step:
                case "t":
                    value = net.op("Transpose", value, perm=[1, 0])
                case "c":
                    value = net.op("Cast", value, to=1)
                case "i":
                    value = net.op("Identity", value)
                case "r":
                    value = net.op("Reshape", value, net.ints(2, 8))
        size = 2 if "r" in path else 4
        ends.append(net.op("MatMul", net.input(f"x{len(ends)}", "N", size), value, out=f"y{len(ends)}"))
    return fold_constants(loaded(net.proto(*ends)))


@pytest.mark.parametrize(
    ("paths", "held", "left"),
    [
        (["c", "c"], 1, []),
        (["ct", "ct"], 1, []),
        (["tc", "tic"], 1, []),
        (["c", "ct"], 1, ["Transpose"]),
        (["ci", "ctt"], 1, ["Transpose", "Transpose"]),
        (["ct", "ct", "c", "cr"], 1, ["Reshape", "Transpose"]),
    ],
)
def test_views_of_a_matrix_are_one_weight(paths: list[str], held: int, left: list[str]) -> None:
    model = views(*paths)
    weights = [value for value in model.graph.initializers.values() if value.dtype is ir.DataType.FLOAT]
    assert len(weights) == held
    assert sorted(node.op_type for node in model.graph if node.op_type != "MatMul") == left


@pytest.mark.parametrize("name", SHRINKING)
def test_a_shared_weight_loses_the_same_channels_at_all_its_uses(name: str) -> None:
    model = MODELS[name]()
    _, parts = parted(model)
    rng = np.random.default_rng(0)
    for n in parts.trained:
        slice_ = parts.slice_of(n)
        names = [value.name or "" for value in slice_.graph.inputs]
        samples = run(model, inputs_of(model, 6), names)
        assert n.groups is not None
        kept = rng.random(n.groups.units) < 0.6
        for group in n.groups.groups:
            kept[group.start] = True
        teacher = TeacherSlice(n.name, slice_, n.groups, samples)
        check_by_zeroing(teacher, shrink(slice_, n.groups, kept), kept)


def test_a_vector_of_zeros_for_all_is_cut_where_its_channels_go_and_shared_elsewhere() -> None:
    teacher, parts = parted(sharing.same_vectors())
    (unit, *_) = parts.trained
    assert unit.widths == [8] and unit.held == {"zeros", "ones"}
    students = {}
    for n in parts.trained:
        samples = run(sharing.same_vectors(), inputs_of(sharing.same_vectors(), 32), [str(n.entry.name)])  # type: ignore[union-attr]
        given = TeacherSlice(n.name, parts.slice_of(n), n.groups, samples, held=n.held)  # type: ignore[arg-type]
        students[n.name] = Width(0.5, 1).build(given, np.random.default_rng(0)).model
    spliced = splice(teacher, students)
    vectors = [tuple(v.shape or ()) for name, v in spliced.graph.initializers.items() if "zeros" in name]
    assert sorted(vectors) == [(4,), (4,), (4,), (8,)]


# One student


def test_a_student_of_several_places_is_written_once_under_its_old_names() -> None:
    model = sharing.albert(4)
    teacher, parts = parted(model)
    (first,) = parts.trained
    assert first.groups is not None
    student = shrink(parts.slice_of(first), first.groups, np.arange(first.groups.units) % 2 == 0)
    students = {use.name: parts.at(use, student) for use in parts.uses(first)}
    spliced = splice(teacher, students, parts.shared)
    assert set(spliced.graph.initializers) == set(teacher.graph.initializers)
    for name, value in student.graph.initializers.items():
        assert np.array_equal(spliced.graph.initializers[name].const_value, value.const_value)  # type: ignore[arg-type]
    feed = inputs_of(model)
    expected = run(parts.slice_of(first), run(model, feed, ["layer0"]))
    assert expected["layer1"].shape == run(spliced, feed, ["layer1"])["layer1"].shape
    by_hand = run(model, feed, ["layer0"])
    for n in parts.uses(first):
        by_hand |= run(students[n.name], by_hand)
    assert np.allclose(run(spliced, feed, ["layer4"])["layer4"], by_hand["layer4"], atol=1e-6)


def store_of(folder: Path, values: dict[str, Array]) -> ActivationStore:
    samples = len(next(iter(values.values())))
    writer = ActivationStore.create(folder, {name: (a.dtype, a.shape[1:]) for name, a in values.items()}, samples)
    for name, array in values.items():
        writer.append(name, array)
    return writer.finish()


def two_places(folder: Path) -> tuple[SliceSamples, SliceSamples]:
    rng = np.random.default_rng(0)
    made = []
    for name in "ab":
        values = {value: rng.standard_normal((40, 3)).astype(np.float32) for value in ("x", "y")}
        made.append(SliceSamples.of(store_of(folder / name, values), ["x"], ["y"], 0.1))
    return made[0], made[1]


def test_rows_of_all_places_are_seen_and_a_sample_is_set_aside_at_all_of_them(tmp_path: Path) -> None:
    a, b = two_places(tmp_path)
    both = SharedSamples([a, b])
    assert (both.blocks.samples, both.blocks.holdout) == (80, 8)
    (held,) = both.heldout(8)
    expected = np.stack([a.arrays(0, 4)["x"], b.arrays(0, 4)["x"]], axis=1).reshape(8, 3)
    assert np.array_equal(held.arrays["x"], expected)
    (part,) = both.split(np.arange(8, 80), 1)
    batch = both.batch(part)
    rows = {tuple(row) for row in batch["x"].numpy().tolist()}
    assert rows == {tuple(row) for place in (a, b) for row in place.arrays(4, 40)["x"].tolist()}
    pairs = {tuple(x): tuple(y) for place in (a, b) for x, y in zip(*place.arrays(0, 40).values(), strict=True)}
    assert all(pairs[tuple(x)] == tuple(y) for x, y in zip(batch["x"].numpy(), batch["y"].numpy(), strict=True))


def test_places_of_other_sizes_come_in_batches_of_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = []
    for number, size in enumerate((4, 2, 4)):
        values = {"x": rng.standard_normal((20, 2, size)).astype(np.float32)}
        made.append(SliceSamples.of(store_of(tmp_path / str(number), values), ["x"], ["x"], 0.1))
    samples = SharedSamples(made)
    parts = samples.split(np.arange(60), 1)
    assert sorted(tuple(samples.batch(part)["x"].shape) for part in parts) == [(20, 2, 2), (40, 2, 4)]
    assert sum(map(len, parts)) == 60


# From end to end


@pytest.mark.parametrize("name", MODELS)
def test_with_everything_kept_the_student_is_the_teacher(name: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(MODELS[name]())
    go(bench, keep=1.0, steps=0)
    feed = inputs_of(onnx.load(bench.model), 5, seed=1)
    teacher, student = (run(onnx.load(path), feed) for path in (bench.model, bench.student))
    assert all(np.array_equal(teacher[output], student[output]) for output in teacher)


@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize("name", MODELS)
def test_a_student_is_smaller_and_shares_what_the_teacher_shares(name: str, inputs: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(MODELS[name]())
    result = go(bench, inputs=inputs, finetune_steps=3 if inputs == "teacher" else 0)
    assert reading(bench.student) == reading(bench.model)
    assert left(bench) < 0.85 if name in SHRINKING else left(bench) == 1
    assert result.report.student.parameters / result.report.teacher.parameters == pytest.approx(left(bench), abs=0.01)
    assert all(n.status == "distilled" or n.reason for n in result.report.neighbourhoods)


@pytest.mark.parametrize("options", [{"inputs": "teacher", "finetune_steps": 3}, {"inputs": "student"}])
@pytest.mark.parametrize("method", ["width", "lowrank", "sparsity"])
def test_the_distance_of_a_thing_to_itself_stays_nought(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(sharing.towers())
    result = go(bench, method=method, **options)
    assert [n.status for n in result.report.neighbourhoods].count("distilled") == 4
    feed = inputs_of(sharing.towers(), 20, seed=3)
    assert not distance(bench, "a", "a", feed).any()
    assert np.array_equal(distance(bench, "a", "b", feed), distance(bench, "b", "a", feed))
    assert distance(bench, "a", "b", feed).any()


@pytest.mark.parametrize("method", ["lowrank", "sparsity", "removal", "activation"])
@pytest.mark.parametrize("name", ["albert", "head", "transposed", "language model", "unrolled", "vectors"])
def test_no_other_method_makes_the_model_larger(name: str, method: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(MODELS[name]())
    go(bench, method=method, inputs="teacher")
    assert left(bench) <= 1
    assert method in ("lowrank", "removal") or reading(bench.student) == reading(bench.model)


def test_training_behind_each_other_goes_on_to_the_same_student(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(sharing.albert(3))
    go(bench, inputs="student")
    before = bench.student.read_bytes()
    again = go(bench, inputs="student")
    assert bench.student.read_bytes() == before
    assert [n.status for n in again.report.neighbourhoods].count("reused") == 3
    (student,) = (bench.folder / "run" / "students").iterdir()
    assert student.name.startswith("n02-")


def test_a_search_counts_and_measures_a_shared_student_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(sharing.towers(), samples=80)
    settings = ALONE | {"steps": 3, "round_to": 1, "samples": 48, "target": ("params=0.6",)}
    recipe = Recipe(**settings, search={"candidates": ("width 0.25,0.5,0.75",), "steps": 3})
    found = search(
        bench.model, data=str(bench.data), recipe=recipe, output=tmp_path / "out", run_dir=tmp_path / "run", pareto=2
    ).report
    assert {option.neighbourhood for option in found.options} == {"n01", "n02"}
    for student in found.students:
        assert student.shares["params"] <= 1
    teacher = next(s for s in found.students if s.source == "teacher")
    written = [s for s in found.students if s.path is not None and s.source == "searched"]
    costs = {(o.neighbourhood, o.candidate): o.costs["params"] for o in found.options if "params" in o.costs}
    assert written and teacher.params == sum(parameters_of(n.nodes) for n in parted(sharing.towers())[1].trained)
    feed = inputs_of(sharing.towers(), 20, seed=3)
    for student in written:
        if "teacher" not in student.candidates.values():
            assert sum(costs[key] for key in student.candidates.items()) == student.params
        model = onnx.load(student.path)  # type: ignore[arg-type]
        assert not run(model, {"a": feed["a"], "b": feed["a"]})["to_b"].any()


# Never larger


def test_a_student_that_would_make_the_model_larger_is_refused_by_name() -> None:
    model = residual_cnn()
    teacher, parts = parted(model)
    students = {n.name: parts.slice_of(n) for n in parts.trained}
    for name in ("n02", "n04"):
        for value in list(students[name].graph.initializers.values()):
            if value.name in ("first1.weight", "first3.weight") and value.const_value is not None:
                value.const_value = ir.tensor(np.tile(value.const_value.numpy(), (2 if name == "n02" else 3, 1, 1, 1)))
    with pytest.raises(VerificationError, match="n04: with its student the model would be larger") as caught:
        check_no_larger(teacher, splice(teacher, students), students, {})
    assert caught.value.neighbourhood == "n04"
    one = {"n03": students["n03"]}
    check_no_larger(teacher, splice(teacher, one), one, {})


def test_copies_of_a_shared_weight_count_as_larger() -> None:
    teacher, parts = parted(sharing.albert(4))
    (first,) = parts.trained
    assert first.groups is not None
    student = shrink(parts.slice_of(first), first.groups, np.arange(first.groups.units) % 2 == 0)
    students = {use.name: parts.at(use, student) for use in parts.uses(first)}
    check_no_larger(teacher, splice(teacher, students, parts.shared), students, parts.shared)
    with pytest.raises(VerificationError):
        check_no_larger(teacher, splice(teacher, students), students, {})
