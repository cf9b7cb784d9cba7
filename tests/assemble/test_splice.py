"""The splice: what goes in comes out, and everything else is the teacher's, byte for byte."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndonnx.assemble.splice import is_changed, splice
from ndonnx.convert import write_back
from ndonnx.errors import VerificationError
from ndonnx.graph import save, serialise, slice_cost
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.students.cutting import shrink
from tests.helpers.models import (
    BLOCKS,
    BUILDERS,
    Array,
    Net,
    boundary,
    custom_op,
    inputs_of,
    loaded,
    mlp,
    parted,
    residual_cnn,
    run,
    several_heads,
    stack,
    vgg,
    with_if,
)


def scaled(model: ir.Model, factor: float) -> ir.Model:
    """A student: the slice with every weight multiplied."""
    weights = {
        name: (value.const_value.numpy() * np.float32(factor))
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.dtype is ir.DataType.FLOAT
    }
    return write_back(model, weights)


def halved(parts: Partition, part: Neighbourhood) -> ir.Model:
    """A student: the slice with the first half of every group."""
    assert part.groups is not None
    kept = np.zeros(part.groups.units, bool)
    for group in part.groups.groups:
        kept[group.start : group.start + (group.width + 1) // 2] = True
    return shrink(parts.slice_of(part), part.groups, kept)


def check(model: ir.Model) -> onnx.ModelProto:
    """What `save` writes of a model, when `onnx.checker` accepts it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "student.onnx")
        save(model, path)
        onnx.checker.check_model(str(path), full_check=True)
        return onnx.load(path)


def node_bytes(model: onnx.ModelProto) -> dict[str, bytes]:
    """Nodes as they are stored, by their first output."""
    return {node.output[0]: node.SerializeToString(deterministic=True) for node in model.graph.node}


def check_kept(teacher: ir.Model, student: onnx.ModelProto, replaced: list[Neighbourhood]) -> None:
    """Interface, opset and metadata are the teacher's, and so are all nodes outside, in their order."""
    old = onnx.load_from_string(serialise(teacher))
    for name in ("ir_version", "opset_import", "producer_name", "producer_version", "domain", "model_version"):
        assert getattr(student, name) == getattr(old, name), name
    assert student.doc_string == old.doc_string
    assert student.graph.name == old.graph.name
    assert [*student.metadata_props] == [*old.metadata_props]
    weights = {weight.name for weight in (*old.graph.initializer, *student.graph.initializer)}
    assert [v for v in student.graph.input if v.name not in weights] == [
        v for v in old.graph.input if v.name not in weights
    ]
    assert [*student.graph.output] == [*old.graph.output]
    inside = {str(node.outputs[0].name) for n in replaced for node in n.nodes}
    before, after = node_bytes(old), node_bytes(student)
    outside = [name for name in before if name not in inside and name in after]
    gone = [name for name in before if name not in inside and name not in after]
    by_name = {node.output[0]: node for node in old.graph.node}
    # What only fed a constant or a target shape of a replaced slice may go with it.
    fed = [name for name in gone if by_name[name].op_type != "Shape"]
    assert all(not set(by_name[name].input) - {w.name for w in old.graph.initializer} - set(gone) for name in fed)
    assert {name: after[name] for name in outside} == {name: before[name] for name in outside}
    assert [name for name in after if name in set(outside)] == outside
    names = [output for node in student.graph.node for output in node.output if output]
    names += [weight.name for weight in student.graph.initializer]
    assert len(names) == len(set(names))


# Slices for themselves


def check_round_trip(model: onnx.ModelProto) -> None:
    teacher, parts = parted(model)
    before = serialise(teacher)
    student = splice(teacher, {n.name: parts.slice_of(n) for n in parts.distillable})
    assert serialise(teacher) == before
    written = check(student)
    check_kept(teacher, written, parts.distillable)
    feed = inputs_of(model)
    for output, expected in run(model, feed).items():
        np.testing.assert_array_equal(run(written, feed)[output], expected)
    assert slice_cost(student) == slice_cost(teacher)


@pytest.mark.parametrize("name", BUILDERS)
def test_slices_in_place_of_themselves_change_nothing(name: str) -> None:
    model = BUILDERS[name]()
    if name in ("tied", "local_function"):
        model.doc_string = "kept"
    model.metadata_props.add(key="classes", value="cat,dog")
    model.producer_name, model.model_version = "someone", 7
    check_round_trip(model)


@settings(max_examples=30)
@given(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4))
def test_slices_of_random_networks_in_place_of_themselves_change_nothing(names: list[str]) -> None:
    check_round_trip(stack(names))


def test_nodes_round_a_custom_operator_are_untouched() -> None:
    model = custom_op()
    teacher, parts = parted(model)
    student = splice(teacher, {n.name: parts.slice_of(n) for n in parts.distillable})
    written = onnx.load_from_string(serialise(student))
    check_kept(teacher, written, parts.distillable)
    assert "Magic" in [node.op_type for node in written.graph.node]


def test_no_students_give_the_teacher() -> None:
    teacher, _ = parted(residual_cnn())
    assert serialise(splice(teacher, {})) == serialise(teacher)


# Students that differ


def answers(parts: Partition, students: dict[str, ir.Model], model: onnx.ModelProto) -> dict[str, Array]:
    """What the pieces give when they are run one after the other by hand, as far as the last exit."""
    values = dict(inputs_of(model))
    for n in parts.neighbourhoods:
        *inputs, exit_ = boundary(n)
        piece = students.get(n.name, parts.slice_of(n))
        values |= run(piece, {name: values[name] for name in inputs})
        assert exit_ in values
    return values


@pytest.mark.parametrize(
    "name", ["residual_cnn", "residual_norm", "inverted_bottleneck", "bottleneck", "vgg", "tied", "old_style"]
)
@pytest.mark.parametrize("which", ["first", "last", "all"])
def test_shrunk_students_answer_as_the_pieces_do(name: str, which: str) -> None:
    model = BUILDERS[name]()
    teacher, parts = parted(model)
    chosen = {"first": parts.distillable[:1], "last": parts.distillable[-1:], "all": parts.distillable}[which]
    students = {n.name: halved(parts, n) for n in chosen}
    spliced = splice(teacher, students)
    written = check(spliced)
    check_kept(teacher, written, chosen)
    assert slice_cost(spliced).macs < slice_cost(teacher).macs
    expected = answers(parts, students, model)
    feed = inputs_of(model)
    names = [boundary(n)[-1] for n in parts.neighbourhoods]
    for value, array in run(written, feed, names).items():
        np.testing.assert_array_equal(array, expected[value])


def test_tied_weights_stay_right_when_one_student_changes() -> None:
    model = BUILDERS["tied"]()
    teacher, parts = parted(model)
    first, second = parts.distillable
    for changed, other in ((first, second), (second, first)):
        students = {changed.name: scaled(parts.slice_of(changed), 2.0), other.name: parts.slice_of(other)}
        for chosen in (students, {changed.name: students[changed.name]}):
            written = check(splice(teacher, chosen))
            by_name = {weight.name for weight in written.graph.initializer}
            assert "shared.first" in by_name and len([name for name in by_name if name.startswith("shared.first")]) == 2
            got = run(written, inputs_of(model), ["unit1", "unit2", "logits"])
            expected = answers(parts, chosen, model)
            for name, array in got.items():
                np.testing.assert_array_equal(array, expected[name])


def test_a_student_of_a_student() -> None:
    """Names given by an earlier splice do not collide with those given by a later one."""
    model = BUILDERS["tied"]()
    for _ in range(3):
        teacher, parts = parted(model)
        students = {n.name: scaled(parts.slice_of(n), 1.5) for n in parts.distillable}
        written = check(splice(teacher, students))
        check_kept(teacher, written, parts.distillable)
        got = run(written, inputs_of(model))
        np.testing.assert_array_equal(got["logits"], answers(parts, students, model)["logits"])
        model = written


def test_renamed_values_do_not_take_a_name_of_the_student() -> None:
    """The student holds `w`, which the teacher still needs, and also the name that `w` would get."""
    net = Net()
    x = net.relu(net.gemm(net.input("x", "N", 4), 4, 4), out="entry")
    h = net.relu(net.op("Gemm", x, net.weight("w", 4, 6), net.weight("w/n02", 6)))
    net.op("Gemm", h, net.weight("v", 6, 4), out="exit")
    net.op("Mul", "exit", net.op("ReduceMean", "w", keepdims=0), out="y")
    model = net.proto("y")
    teacher, parts = parted(model, cut=["entry", "exit"])
    part = next(n for n in parts.distillable if boundary(n) == ["entry", "exit"])
    piece = parts.slice_of(part)
    for name in ("n01", "n02", "n03"):
        written = check(splice(teacher, {name: scaled(piece, 3.0)}))
        expected = run(scaled(piece, 3.0), run(model, inputs_of(model), ["entry"]))["exit"]
        np.testing.assert_array_equal(run(written, inputs_of(model), ["exit"])["exit"], expected)
        np.testing.assert_array_equal(
            next(onnx.numpy_helper.to_array(w) for w in written.graph.initializer if w.name == "w"), net.weights["w"]
        )


# Places


def test_neighbourhoods_back_to_back() -> None:
    model = residual_cnn(4)
    teacher, parts = parted(model)
    students = {n.name: scaled(parts.slice_of(n), 0.9) for n in parts.distillable}
    in_order = check(splice(teacher, students))
    backwards = check(splice(teacher, dict(reversed(students.items()))))
    feed = inputs_of(model)
    expected = answers(parts, students, model)["logits"]
    np.testing.assert_array_equal(run(in_order, feed)["logits"], expected)
    np.testing.assert_array_equal(run(backwards, feed)["logits"], expected)
    assert len(in_order.graph.node) == len(model.graph.node)


def test_an_exit_may_be_an_output_and_read_by_several() -> None:
    model = several_heads()
    teacher, parts = parted(model)
    students = {n.name: scaled(parts.slice_of(n), 0.9) for n in parts.distillable}
    written = check(splice(teacher, students))
    assert [value.name for value in written.graph.output] == ["feature1", "boxes", "classes"]
    expected = answers(parts, students, model)
    for name, array in run(written, inputs_of(model), ["feature1", "feature2", "boxes", "classes"]).items():
        np.testing.assert_array_equal(array, expected[name])


def test_an_exit_may_be_read_by_a_branch() -> None:
    model = with_if()
    teacher, parts = parted(model)
    first = parts.distillable[0]
    written = check(splice(teacher, {first.name: scaled(parts.slice_of(first), 0.5)}))
    feed = inputs_of(model)
    values = run(written, feed, ["before", "unit1", "chosen"])
    expected = run(scaled(parts.slice_of(first), 0.5), values)["unit1"]
    np.testing.assert_array_equal(values["unit1"], expected)
    mean = float(expected.mean())
    if mean > 0.5:
        np.testing.assert_array_equal(values["chosen"], expected * np.float32(0.5))
    else:
        assert not np.array_equal(values["chosen"], run(model, feed, ["chosen"])["chosen"])


def test_an_old_model_keeps_its_initializers_among_the_inputs() -> None:
    model = BUILDERS["old_style"]()
    teacher, parts = parted(model)
    written = check(splice(teacher, {n.name: halved(parts, n) for n in parts.distillable}))
    assert written.ir_version == 3
    weights = {weight.name: tuple(weight.dims) for weight in written.graph.initializer}
    declared = {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in written.graph.input
    }
    assert declared.pop("x") == (0, 3, 8, 8)
    assert declared == weights


def test_the_last_neighbourhood_may_end_the_model() -> None:
    for model in (mlp(), vgg()):
        teacher, parts = parted(model)
        last = parts.distillable[-1]
        student = scaled(parts.slice_of(last), 0.5)
        written = check(splice(teacher, {last.name: student}))
        entry, exit_ = boundary(last)
        values = run(written, inputs_of(model), [entry, exit_])
        np.testing.assert_array_equal(values[exit_], run(student, values)[exit_])


def test_values_that_the_teacher_does_not_have_are_refused() -> None:
    teacher, parts = parted(residual_cnn())
    for side in ("inputs", "outputs"):
        student = parts.slice_of(parts.distillable[0])
        getattr(student.graph, side)[0].name = "nowhere"
        with pytest.raises(VerificationError, match=r"n02: does not fit into the teacher: .*nowhere") as caught:
            splice(teacher, {"n02": student})
        assert caught.value.neighbourhood == "n02"
    student = parts.slice_of(parts.distillable[0])
    student.graph.outputs[0].name = "x"
    with pytest.raises(VerificationError, match="'x' is made by no node"):
        splice(teacher, {"n02": student})
    np.testing.assert_array_equal(
        run(teacher, inputs_of(residual_cnn()))["logits"], run(residual_cnn(), inputs_of(residual_cnn()))["logits"]
    )
    assert loaded(residual_cnn()).graph.outputs[0].name == "logits"


def test_only_a_changed_student_takes_its_neighbourhoods_place() -> None:
    _, parts = parted(BUILDERS["residual_cnn"]())
    slice_ = parts.slice_of(parts.distillable[0])
    twin = slice_.clone()
    assert not is_changed(twin, slice_)
    name = next(iter(twin.graph.initializers))
    value = twin.graph.initializers[name]
    assert value.const_value is not None
    moved = np.array(value.const_value.numpy())
    moved.reshape(-1)[0] = np.nextafter(moved.reshape(-1)[0], np.inf, dtype=moved.dtype)
    value.const_value = ir.tensor(moved, name=name)
    assert is_changed(twin, slice_)


def measured_inside(*axes: int) -> onnx.ModelProto:
    """Two units; behind the first one a `Reshape` whose target holds lengths of a value inside it, as exporters
    write the way from feature maps to tokens and back."""
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8), out="a")
    inner = net.conv(x, 8, 12, out="inner")
    picks = [net.constant(f"axis{axis}", np.array(axis)) for axis in axes]
    lengths = [net.op("Unsqueeze", net.op("Gather", net.op("Shape", inner), pick), net.ints(0)) for pick in picks]
    x = net.op("Add", net.conv(net.relu(inner), 12, 8), x, out="b")
    tokens = net.op("Transpose", net.op("Reshape", x, net.ints(0, 8, -1)), perm=[0, 2, 1])
    tokens = net.matmul(net.relu(net.matmul(tokens, 8, 16)), 16, 8)
    back = net.op("Transpose", tokens, perm=[0, 2, 1])
    rest = [net.ints(8)] if len(axes) < 3 else []
    target = net.op("Concat", net.ints(-1), *rest, *lengths, axis=0)
    return net.proto(net.pooled_classifier(net.relu(net.op("Reshape", back, target)), 12 if 1 in axes else 8))


def test_lengths_inside_a_neighbourhood_are_read_of_its_student() -> None:
    proto = measured_inside(2, 3)
    _, parts = parted(proto)
    unit = next(part for part in parts.distillable if any(v.name == "inner" for n in part.nodes for v in n.outputs))
    assert 12 in unit.widths
    students = {unit.name: halved(parts, unit)}
    student = check(splice(loaded(proto), students))
    assert Counter(node.op_type for node in student.graph.node) == Counter(node.op_type for node in proto.graph.node)
    old, new = node_bytes(proto), node_bytes(student)
    replaced = {value.name for node in unit.nodes for value in node.outputs}
    assert {name: new[name] for name in old if name not in replaced} == {
        name: node for name, node in old.items() if name not in replaced
    }
    feeds = inputs_of(proto)
    assert unit.entry is not None and unit.exit is not None
    piece = run(students[unit.name], run(proto, feeds, [unit.entry.name or ""]))
    rest = ir.Model(ir.convenience.extract(parts.model.graph, [unit.exit], ["logits"]), ir_version=9)
    np.testing.assert_allclose(run(student, feeds)["logits"], run(rest, piece)["logits"], rtol=1e-5, atol=1e-6)


def test_a_length_that_shrinks_is_not_read_of_a_student() -> None:
    """The number of channels is wanted as it was: nothing that holds the value can be shrunk."""
    _, parts = parted(measured_inside(1, 2, 3))
    assert 12 not in [width for part in parts.distillable for width in part.widths]


def test_an_inner_value_that_no_student_has_stays_for_its_lengths() -> None:
    proto = measured_inside(2, 3)
    _, parts = parted(proto)
    part = next(part for part in parts.distillable if 12 in part.widths)
    other = parts.slice_of(part)
    for node in other.graph:
        for value in node.outputs:
            if value.name == "inner":
                value.name = "something else"
    student = check(splice(loaded(proto), {part.name: scaled(other, 0.5)}))
    names = [name for node in student.graph.node for name in node.output]
    assert "inner" in names and "something else" in names
    run(student, inputs_of(proto))
