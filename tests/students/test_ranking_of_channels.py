"""Which channels are kept, and students that look at one value after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndonnx.errors import ShrinkError
from ndonnx.graph.save import serialise
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.partition import ChannelGroups, WeightAxis
from ndonnx.students import Candidate, StudentMethod, TeacherSlice
from ndonnx.students import forward as forward_module
from ndonnx.students.cutting import choose_units
from ndonnx.students.forward import Forward, side_by_side
from ndonnx.students.methods.width import Width
from ndonnx.teacher import probe as probe_module
from tests.helpers.models import Net, inputs_of, residual_cnn, run, transformer
from tests.helpers.models import mlp as small_mlp
from tests.helpers.widths import answer, bottleneck, build, mlp, repeated, teacher_of, weights


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Which channels


def test_a_large_mean_does_not_change_the_ranking() -> None:
    def kept(offset: float) -> list[int]:
        net = Net(1)
        y = net.gemm(net.input("x", "N", 10), 10, 24, out="a")
        net.weights["a.bias"][:] += np.float32(offset)
        teacher = teacher_of(net, net.gemm(net.relu(y), 24, 12, out="b"), samples=300)
        return np.flatnonzero(choose_units(teacher, 0.3, None)).tolist()

    assert kept(20) == kept(1000)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_the_ranking_finds_the_best_subset_of_independent_channels(seed: int, keep: int) -> None:
    """With orthogonal features elimination one by one is optimal, so all subsets can tell no better."""
    net = Net(seed)
    net.constant("a.weight", np.diag(net.rng.uniform(0.2, 3, 6)).astype(np.float32))
    y = net.op("MatMul", net.input("x", "N", 6), "a.weight", out="a")
    teacher = teacher_of(net, net.gemm(y, 6, 4, out="b"), seed=seed)
    centred = teacher.samples["x"] - teacher.samples["x"].mean(axis=0)
    orthogonal = (np.linalg.qr(centred)[0] * np.sqrt(48)).astype(np.float32)
    teacher = replace(teacher, samples={"x": orthogonal})
    hidden, target = run(teacher.model, teacher.samples, ["a"])["a"], answer(teacher, teacher.model)

    def loss(units: tuple[int, ...]) -> float:
        features = np.hstack([hidden[:, units], np.ones((48, 1))])
        solution, *_ = np.linalg.lstsq(features, target, rcond=None)
        return float(np.square(features @ solution - target).sum())

    best = min(itertools.combinations(range(6), keep), key=loss)
    kept = tuple(np.flatnonzero(choose_units(teacher, keep / 6, None)).tolist())
    assert loss(kept) <= loss(best) * (1 + 1e-3)


def test_the_ranking_keeps_one_of_each_pair() -> None:
    kept = choose_units(repeated(3, "Relu"), 0.5, None)
    assert sorted([0, 1, 2, 3, 2, 0, 3, 1][unit] for unit in np.flatnonzero(kept)) == [0, 1, 2, 3]


def test_channels_that_matter_to_nobody_go_first() -> None:
    net = Net(3)
    y = net.relu(net.gemm(net.input("x", "N", 6), 6, 8, out="a"))
    out = net.gemm(y, 8, 4, out="b")
    net.weights["b.weight"][:, [1, 4, 5, 6]] = 0
    teacher = teacher_of(net, out)
    assert np.flatnonzero(choose_units(teacher, 0.5, None)).tolist() == [0, 2, 3, 7]


def test_channels_that_several_operators_read_count_by_what_they_bring_to_all() -> None:
    net = Net(3)
    y = net.relu(net.gemm(net.input("x", "N", 6), 6, 8, out="a"))
    out = net.op("Add", net.gemm(y, 8, 4, out="b"), net.op("Tanh", net.gemm(y, 8, 4, out="c")))
    net.weights["b.weight"][:, [1, 4, 5, 6, 7]] = 0
    net.weights["c.weight"][:, [0, 1, 4, 5, 6]] = 0
    teacher = teacher_of(net, out)
    assert np.flatnonzero(choose_units(teacher, 0.5, None)).tolist() == [0, 2, 3, 7]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("init", ["teacher", "least-squares"])
def test_a_slice_whose_inner_channels_are_all_dead_still_shrinks(init: str) -> None:
    net = Net(4)
    y = net.relu(net.gemm(net.input("x", "N", 6), 6, 8, out="a"))
    out = net.gemm(y, 8, 4, out="b")
    net.weights["a.weight"][:], net.weights["a.bias"][:] = 0, -1
    teacher = teacher_of(net, out)
    candidate = build(teacher, Width(0.5, None, init))  # type: ignore[arg-type]
    np.testing.assert_allclose(answer(teacher, candidate.model), answer(teacher, teacher.model), rtol=1e-5)


# Random


def test_a_random_start_follows_its_seed() -> None:
    teacher = bottleneck()
    one, same, other = (serialise(build(teacher, Width(0.5, None, "random"), seed).model) for seed in (1, 1, 2))
    assert one == same != other


def test_a_random_start_draws_matrices_and_leaves_the_rest() -> None:
    net = Net(3)
    y = net.op("PRelu", net.gemm(net.input("x", "N", 64), 64, 128, out="a"), net.weight("slope", 1, 128))
    y = net.op("Add", net.matmul(y, 128, 32, out="b"), net.weight("offset", 1, 32))
    teacher = teacher_of(net, y)
    drawn = weights(build(teacher, Width(0.5, None, "random")).model)
    copied = weights(build(teacher, Width(0.5, None, "teacher")).model)
    assert {name for name in drawn if not np.array_equal(drawn[name], copied[name])} == {"a.weight", "b.weight"}
    assert drawn["a.weight"].std() == pytest.approx(np.sqrt(2 / 64), rel=0.05)  # (outputs, inputs)
    assert drawn["b.weight"].std() == pytest.approx(np.sqrt(2 / 64), rel=0.05)  # (inputs, outputs)


# Conditions


class Renaming(StudentMethod):
    """TeacherOutputs under another name."""

    def __init__(self, side: str) -> None:
        self.side = side

    def _build(self, teacher: TeacherSlice, rng: np.random.Generator) -> Candidate:
        model = teacher.model.clone()
        getattr(model.graph, self.side)[0].name = "stranger"
        return Candidate("renaming", model)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_method_that_changes_the_boundary_fails_by_name(side: str) -> None:
    with pytest.raises(ShrinkError, match=f"n01: renaming changed the slice's {side} from .* to .*stranger"):
        build(mlp(), Renaming(side))


def test_a_slice_without_groups_has_no_width_to_shrink() -> None:
    teacher = replace(mlp(), groups=ChannelGroups((), (), ()))
    with pytest.raises(ShrinkError, match="n01: no width to shrink inside"):
        build(teacher, Width(0.5))


def wrong(teacher: TeacherSlice, change: Callable[[WeightAxis], WeightAxis]) -> TeacherSlice:
    groups = teacher.groups
    return replace(teacher, groups=ChannelGroups(groups.groups, tuple(map(change, groups.axes)), groups.edits))


def test_wrong_groups_do_not_pass_the_zeroing_check() -> None:
    def mixed_up(axis: WeightAxis) -> WeightAxis:
        return replace(axis, units=axis.units[::-1].copy()) if axis.initializer == "a.bias" else axis

    with pytest.raises(ShrinkError, match="without the removed channels the slice differs by"):
        build(wrong(mlp(), mixed_up), Width(0.5))


def test_groups_after_which_the_slice_does_not_run_are_this_slices_fault() -> None:
    teacher = mlp()
    fewer = tuple(axis for axis in teacher.groups.axes if axis.initializer != "b.weight")
    with pytest.raises(ShrinkError, match="n01"):
        build(replace(teacher, groups=ChannelGroups(teacher.groups.groups, fewer, ())), Width(0.5, None, "teacher"))


@pytest.mark.parametrize("init", ["teacher", "least-squares"])
def test_activations_that_overflow_when_squared_are_this_slices_fault(init: str) -> None:
    teacher = mlp()
    samples = {"x": teacher.samples["x"] * np.float32(1e25)}
    with pytest.raises(ShrinkError, match="overflow when they are squared"):
        build(replace(teacher, samples=samples), Width(0.5, None, init))  # type: ignore[arg-type]


def test_an_input_without_sample_axis_serves_all_samples() -> None:
    """As a store holds it once: longer than the check's few samples, or without any axis."""
    net = Net(7)
    x, table, scale = net.input("x", "N", 40, 6), net.input("table", 40, 8), net.input("scale")
    y = net.op("Add", net.matmul(x, 6, 8, out="a"), table)
    y = net.op("Mul", net.relu(y), scale)
    proto = net.proto(net.matmul(y, 8, 6, out="b"))
    model = infer_shapes(ir.from_proto(proto))
    rng = np.random.default_rng(0)
    samples = {
        "x": rng.standard_normal((20, 40, 6)).astype(np.float32),
        "table": rng.standard_normal((40, 8)).astype(np.float32),
        "scale": np.array(0.5, np.float32),
    }
    # The groups of the slice without its table: with it the rules freeze them all.
    net_ = Net(7)
    plain = net_.matmul(net_.relu(net_.matmul(net_.input("x", "N", 40, 6), 6, 8, out="a")), 8, 6, out="b")
    groups = teacher_of(net_, plain).groups
    teacher = TeacherSlice("n01", model, groups, samples, constants=frozenset({"table", "scale"}))
    assert teacher.first(3).samples["x"].shape == (3, 40, 6)
    assert teacher.first(3).samples["table"].shape == (40, 8)
    assert teacher.first(3).run(model, ["b"])["b"].shape == (3, 40, 6)


# Values one after the other


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([transformer, residual_cnn, small_mlp]), st.integers(2, 40), st.integers(1, 60_000), st.data())
def test_values_in_order_are_those_of_the_whole(make: Any, samples: int, limit: int, data: st.DataObject) -> None:
    """Each is computed from the one before, also where what lies between them has been changed by then."""
    model = infer_shapes(ir.from_proto(make()))
    teacher = TeacherSlice("n01", model, ChannelGroups((), (), ()), inputs_of(make(), samples))
    names = [value.name or "" for node in model.graph for value in node.outputs if value.type is not None]
    chosen = [names[place] for place in sorted(data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1)))]
    changed = model.clone()
    theirs, ours = Forward(teacher, model), Forward(teacher, changed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_module, "BATCH_BYTES", limit)
        patch.setattr(forward_module, "_KEPT_BYTES", 2 * limit)
        for name in chosen:
            expected = [run(each, teacher.samples, [name])[name] for each in (changed, model)]
            found = list(side_by_side((ours, name), (theirs, name)))
            assert [row for rows, _, _ in found for row in rows] == list(range(samples))
            for side, whole in enumerate(expected, start=1):
                pieces = [each[side] for each in found]
                if len(whole) == samples and whole.ndim:
                    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-3, atol=1e-4)
            for node in changed.graph:  # what reads it may change now
                if name in {value.name for value in node.inputs if value is not None}:
                    for weight in (
                        value for value in node.inputs if value is not None and value.const_value is not None
                    ):
                        if weight.dtype == ir.DataType.FLOAT:
                            weight.const_value = ir.tensor(
                                weight.const_value.numpy() * 0.9, weight.dtype, name=weight.name
                            )
