"""Removal: what is left is the input, scaled and shifted as least squares says."""

from __future__ import annotations

import numpy as np
import pytest

from ndonnx.assemble.splice import splice
from ndonnx.config.recipe import Recipe
from ndonnx.errors import ShrinkError
from ndonnx.graph import slice_cost
from ndonnx.graph.save import serialise
from ndonnx.students import TeacherSlice
from ndonnx.students.methods.removal import Removal
from ndonnx.students.registry import method_of
from tests.helpers.models import Array, Net, inputs_of, parted, residual_cnn, run, transformer
from tests.helpers.slices import answer, build, error, operators, teacher_of, weights


def unit(*, relu: bool = True, strength: float = 0.3) -> TeacherSlice:
    """A residual unit, with or without an activation at its end."""
    net = Net(1)
    x = net.input("x", "N", 6, 5, 5)
    y = net.conv(net.relu(net.conv(x, 6, 8, out="a")), 8, 6, out="b")
    net.weights["b.weight"] *= np.float32(strength)
    total = net.op("Add", y, x, out="sum")
    return teacher_of(net, net.relu(total) if relu else total, 100)


def least_squares(data: Array, target: Array, axis: int) -> Array:
    """Scale and shift of each channel, one small problem at a time: (channels, 2)."""
    x, y = (np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64) for array in (data, target))
    return np.array(
        [np.linalg.lstsq(np.stack([a, np.ones_like(a)], axis=1), b, rcond=None)[0] for a, b in zip(x, y, strict=True)]
    )


def found(teacher: TeacherSlice) -> tuple[Array, Array]:
    """Scale and shift."""
    scale, shift = weights(build(teacher, Removal()).model).values()
    return scale, shift


def test_scale_and_shift_are_the_least_squares_solution() -> None:
    teacher = unit(relu=False)
    expected = least_squares(teacher.samples["x"], answer(teacher, teacher.model), 1)
    scale, shift = found(teacher)
    assert scale.shape == shift.shape == (6, 1, 1)
    np.testing.assert_allclose(np.stack([scale.ravel(), shift.ravel()], axis=1), expected, atol=1e-5)


def test_the_last_activation_stays_where_that_is_closer() -> None:
    teacher = unit()
    candidate = build(teacher, Removal())
    assert candidate.spec == "removal"
    assert operators(candidate.model) == ["Mul", "Add", "Relu"]
    expected = least_squares(teacher.samples["x"], answer(teacher, teacher.model, "sum"), 1)
    np.testing.assert_allclose(found(teacher)[0].ravel(), expected[:, 0], atol=1e-5)


def test_the_last_activation_goes_where_that_is_closer() -> None:
    """Nearly the identity, written as an activation that bends it."""
    net = Net(1)
    x = net.input("x", "N", 6, 5, 5)
    y = net.conv(net.op("Tanh", net.conv(x, 6, 6)), 6, 6)
    zero = net.op("Mul", y, net.constant("nothing", np.zeros((6, 1, 1), np.float32)))
    one = net.constant("one", np.ones((6, 1, 1), np.float32))
    exit_ = net.op("Softplus", net.op("Log", net.op("Sub", net.op("Exp", net.op("Add", x, zero)), one)))
    teacher = teacher_of(net, exit_, 50)
    teacher.samples["x"][:] = np.abs(teacher.samples["x"]) + 0.5
    assert operators(build(teacher, Removal()).model) == ["Mul", "Add"]
    assert error(teacher, build(teacher, Removal()).model) < 1e-6


def test_features_on_the_last_axis_are_channels_too() -> None:
    net = Net(2)
    x = net.input("x", "N", 7, 8)
    y = net.op("Add", net.matmul(net.op("Tanh", net.matmul(x, 8, 16)), 16, 8), net.op("Mul", x, net.weight("s", 8)))
    teacher = teacher_of(net, y, 60)
    scale, _ = found(teacher)
    assert scale.shape == (8,)
    np.testing.assert_allclose(
        scale, least_squares(teacher.samples["x"], answer(teacher, teacher.model), 2)[:, 0], atol=1e-4
    )


def test_a_channel_that_never_changes_gets_its_mean() -> None:
    teacher = unit(relu=False)
    teacher.samples["x"][:, 2] = 4
    scale, shift = found(teacher)
    assert scale[2] == 0
    np.testing.assert_allclose(shift[2], answer(teacher, teacher.model)[:, 2].mean(), rtol=1e-5)


@pytest.mark.parametrize("init", ["teacher", "random"])
def test_otherwise_it_begins_as_the_identity(init: str) -> None:
    teacher = unit(relu=False)
    student = build(teacher, Removal(init)).model  # type: ignore[arg-type]
    assert np.array_equal(answer(teacher, student), teacher.samples["x"])


def test_only_the_correction_stays_and_the_teacher_is_not_changed() -> None:
    teacher = unit()
    before = serialise(teacher.model)
    cost = slice_cost(build(teacher, Removal()).model)
    assert (cost.parameters, cost.macs) == (12, 0)
    assert serialise(teacher.model) == before


def test_ends_that_do_not_agree_are_told() -> None:
    net = Net()
    y = net.conv(net.relu(net.conv(net.input("x", "N", 6, 5, 5), 6, 8)), 8, 6, stride=2, out="y")
    with pytest.raises(
        ShrinkError, match=r"n01: cannot be removed: 'x' has the shape \(48, 6, 5, 5\) .* 'y' \(48, 6, 3, 3\)"
    ):
        build(teacher_of(net, y), Removal())


def test_a_slice_that_is_no_more_than_a_scale_and_a_shift_stays() -> None:
    net = Net()
    x = net.op("Mul", net.input("x", "N", 6, 5, 5), net.weight("scale", 6, 1, 1))
    with pytest.raises(ShrinkError, match="n01: has no more weights than a scale and a shift"):
        build(teacher_of(net, net.relu(net.op("Add", x, net.weight("shift", 6, 1, 1)))), Removal())


def test_a_recipe_names_the_method() -> None:
    assert method_of(Recipe(method="removal")) == Removal()


@pytest.mark.parametrize("make", [residual_cnn, transformer])
def test_students_take_their_places_in_the_teacher(make) -> None:  # type: ignore[no-untyped-def]
    """The transformer's slices read a mask that their students do not."""
    proto = make()
    teacher, parts = parted(proto)
    feed = inputs_of(proto, 16)
    students = {}
    for part in parts.distillable:
        assert part.entry is not None
        assert part.groups is not None
        names = [value.name or "" for value in (part.entry, *part.context)]
        known = {name: feed[name] for name in names if name in feed}
        samples = known | run(parts.model, feed, [name for name in names if name not in feed])
        slice_ = TeacherSlice(part.name, parts.slice_of(part), part.groups, samples)
        students[part.name] = build(slice_, Removal()).model
    whole = splice(teacher, students)
    assert slice_cost(whole).parameters < 0.6 * slice_cost(teacher).parameters
    expected, answered = (next(iter(run(model, feed).values())) for model in (teacher, whole))
    assert answered.shape == expected.shape
    assert np.isfinite(answered).all()
