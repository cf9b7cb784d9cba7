"""The walk down the chain: values as the whole student has them, and refits that are least-squares solutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ndonnx.assemble.propagation import Prefix, held_values, reconstruct_in_order
from ndonnx.assemble.splice import splice
from ndonnx.partition import Partition
from ndonnx.students import TeacherSlice
from ndonnx.students.last_layer import find_last_layer, reconstruct_last_layer
from ndonnx.students.methods.width import Width
from tests.helpers.models import Array, Net, inputs_of, parted, residual_cnn, run, stack, transformer

SAMPLES = 40


def batches_of(data: Mapping[str, Array]) -> Callable[[], Iterator[Mapping[str, Array]]]:
    count = len(next(iter(data.values())))
    return lambda: ({name: rows[i : i + 16] for name, rows in data.items()} for i in range(0, count, 16))


def values(model: ir.Model, data: Mapping[str, Array], names: list[str]) -> dict[str, Array]:
    probe = model.clone()
    inner = ir.convenience.create_value_mapping(probe.graph)
    probe.graph.outputs.clear()
    probe.graph.outputs.extend(inner[name] for name in names)
    return run(probe, data)


def shrunk(parts: Partition, data: Mapping[str, Array], names: Any = None) -> dict[str, ir.Model]:
    """Students of half the width, with the teacher's weights: bad ones."""
    students = {}
    for n in parts.distillable:
        if names is None or n.name in names:
            inputs = [value.name or "" for value in (n.entry, *n.context) if value is not None]
            samples = values(parts.model, data, inputs)
            teacher = TeacherSlice(n.name, parts.slice_of(n), n.groups, samples)  # type: ignore[arg-type]
            students[n.name] = Width(0.5, init="teacher").build(teacher, np.random.default_rng(0)).model
    return students


@pytest.mark.parametrize(
    "model",
    [residual_cnn(), transformer(), stack(["plain", "squeeze_excite", "branches"])],
    ids=["residual", "transformer", "stack"],
)
def test_the_prefix_gives_what_the_whole_student_has_there(tmp_path: Path, model: onnx.ModelProto) -> None:
    _, parts = parted(model)
    data = inputs_of(model, SAMPLES)
    students = shrunk(parts, data)
    assert len(students) >= 2
    whole = splice(parts.model, students)
    order = [n for n in parts.neighbourhoods if n.name in students]
    prefix = Prefix(parts, order, batches_of(data), tmp_path, SAMPLES)
    foretold = held_values(parts, order)
    for n, held in zip(order, foretold, strict=True):
        for name, store in prefix.inputs_of(n).items():
            expected = values(whole, data, [name])[name]
            found = np.asarray(store.array(name), dtype=np.float32)
            assert np.abs(found - expected).max() <= 3e-3 * np.abs(expected).max()  # kept in half precision
        on_disk = list(tmp_path.rglob("*.npy"))
        assert len(on_disk) == len(held) - 1  # the exit is still to come
        prefix.put(n, students[n.name])
    prefix.close()
    assert not list(tmp_path.rglob("*.npy"))


def test_a_walk_lowers_the_error_of_the_whole(tmp_path: Path) -> None:
    model = residual_cnn(4)
    _, parts = parted(model)
    data = inputs_of(model, 200)
    students = shrunk(parts, data)
    seen: list[str] = []
    better = reconstruct_in_order(
        parts,
        students,
        batches_of(data),
        tmp_path,
        160,
        threads=1,
        on_end=lambda name, done: seen.append(name),
    )
    assert seen == list(students)
    fresh = inputs_of(model, 100, seed=5)
    exit_ = [n for n in parts.neighbourhoods if n.name in students][-1].exit
    assert exit_ is not None and exit_.name
    teacher = values(parts.model, fresh, [exit_.name])[exit_.name]
    before, after = (
        float(np.square(values(splice(parts.model, s), fresh, [exit_.name])[exit_.name] - teacher).mean())
        for s in (students, better)
    )
    assert after < 0.7 * before
    assert not list(tmp_path.rglob("*.npy"))


def linear_pair() -> tuple[ir.Model, ir.Model]:
    """A teacher y = relu(x A + b) + and a student of the same form with other weights."""

    def build(seed: int) -> ir.Model:
        net = Net(seed)
        x = net.input("x", "N", 6)
        total = net.op("Add", net.gemm(x, 6, 4, out="main"), net.gemm(x, 6, 4, bias=False, out="side"), out="total")
        net.relu(total, out="y")
        return ir.from_proto(net.proto("y"))

    return build(0), build(1)


def test_a_refit_is_the_least_squares_solution_on_the_students_own_inputs() -> None:
    teacher, student = linear_pair()
    rng = np.random.default_rng(0)
    theirs = rng.standard_normal((400, 6)).astype(np.float32)
    ours = theirs + 0.3 * rng.standard_normal((400, 6)).astype(np.float32)
    refitted = reconstruct_last_layer(teacher, student, {"x": theirs}, {"x": ours})
    assert refitted is not None
    end = find_last_layer(student)
    assert end is not None and end.total == "total"
    fitted = slice(0, 300)
    expected = values(teacher, {"x": theirs}, ["total"])["total"][fitted]
    found = values(refitted, {"x": ours}, ["total"])["total"][fitted]
    rows = np.concatenate([ours, np.ones((400, 1), np.float32)], axis=1)[fitted]
    best = rows @ np.linalg.lstsq(rows, expected, rcond=None)[0]
    assert np.square(found - expected).mean() <= 1.001 * np.square(best - expected).mean()
    changed = {n for n, v in refitted.graph.initializers.items() if not np.array_equal(*_pair(student, v, n))}
    assert changed <= {end.weight, end.bias}


def _pair(model: ir.Model, value: ir.Value, name: str) -> tuple[Array, Array]:
    old, new = model.graph.initializers[name].const_value, value.const_value
    assert old is not None and new is not None
    return old.numpy(), new.numpy()


def test_a_refit_that_helps_nothing_is_not_taken() -> None:
    teacher, _ = linear_pair()
    x = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    assert reconstruct_last_layer(teacher, teacher, {"x": x}, {"x": x}) is None


def test_a_pattern_of_zeros_survives_the_refit() -> None:
    teacher, student = linear_pair()
    end = find_last_layer(student)
    assert end is not None
    weight = student.graph.initializers[end.weight]
    pruned = np.array(weight.const_value.numpy())  # type: ignore[union-attr]
    pruned[np.random.default_rng(2).random(pruned.shape) < 0.5] = 0
    weight.const_value = ir.tensor(pruned, name=end.weight)
    x = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    refitted = reconstruct_last_layer(teacher, student, {"x": x}, {"x": x})
    assert refitted is not None
    after = refitted.graph.initializers[end.weight].const_value.numpy()  # type: ignore[union-attr]
    assert np.array_equal(after == 0, pruned == 0)


def test_there_is_no_exit_to_refit_behind_an_unknown_operator_or_a_shared_weight() -> None:
    net = Net()
    net.op("Softmax", net.gemm(net.input("x", "N", 6), 6, 4), out="y")
    assert find_last_layer(ir.from_proto(net.proto("y"))) is None
    net = Net()
    x = net.input("x", "N", 6)
    weight = net.weight("w", 6, 6)
    net.op("MatMul", net.op("MatMul", x, weight), weight, out="y")
    assert find_last_layer(ir.from_proto(net.proto("y"))) is None


def matrix_and_constant(seed: int, *, features: int = 24) -> ir.Model:
    """A product and what is added to it, behind a residual: as transformers are exported."""
    net = Net(seed)
    x = net.input("x", "N", 5, features)
    product = net.matmul(net.op("Tanh", net.matmul(x, features, features, out="up")), features, features, out="down")
    net.op("Add", net.op("Add", net.weight("offset", features), product), x, out="y")
    return ir.from_proto(net.proto("y"))


def test_what_is_added_to_a_product_is_refitted_with_it() -> None:
    teacher = matrix_and_constant(0)
    student = teacher.clone()
    offset = student.graph.initializers["offset"]
    offset.const_value = ir.tensor(offset.const_value.numpy() + np.float32(0.5), name="offset")  # type: ignore[union-attr]
    x = np.random.default_rng(0).standard_normal((200, 5, 24)).astype(np.float32)
    refitted = reconstruct_last_layer(teacher, student, {"x": x}, {"x": x})
    assert refitted is not None
    np.testing.assert_allclose(*(values(each, {"x": x}, ["y"])["y"] for each in (refitted, teacher)), atol=1e-3)


def test_few_rows_correct_a_part_of_what_is_wrong() -> None:
    """Twenty-four features and as many rows: without a strong ridge the correction would do harm."""
    teacher, rng = matrix_and_constant(0), np.random.default_rng(1)
    student = teacher.clone()
    weight = student.graph.initializers["down.weight"]
    assert weight.const_value is not None
    noisy = weight.const_value.numpy() + 0.05 * rng.standard_normal((24, 24)).astype(np.float32)
    weight.const_value = ir.tensor(noisy, name="down.weight")
    x = rng.standard_normal((10, 5, 24)).astype(np.float32)
    moved = x + 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    refitted = reconstruct_last_layer(teacher, student, {"x": x}, {"x": moved})
    assert refitted is not None
    fresh = rng.standard_normal((500, 5, 24)).astype(np.float32)
    given = fresh + 0.3 * rng.standard_normal(fresh.shape).astype(np.float32)
    expected = values(teacher, {"x": fresh}, ["y"])["y"]
    before, after = (
        np.square(values(each, {"x": given}, ["y"])["y"] - expected).mean() for each in (student, refitted)
    )
    assert after < before
