"""The last gate: a student that is not what was trained, or no drop-in for its teacher, gets no name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ndonnx.assemble.splice import splice
from ndonnx.assemble.verify import verify
from ndonnx.errors import VerificationError
from ndonnx.graph import fold_constants
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.partition import Partition, partition
from ndonnx.students import TeacherSlice
from ndonnx.students.methods.width import Width
from tests.helpers.models import BUILDERS, CUSTOM, Array, Net, inputs_of, loaded, residual_cnn, run


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """A teacher, its untrained students, and the model that they were spliced into."""

    teacher: ir.Model
    parts: Partition
    students: dict[str, ir.Model]
    student: ir.Model
    probe: dict[str, Array]

    def check(self, tolerance: float = 1e-4) -> None:
        verify(self.teacher, self.student, self.parts, self.students, self.probe, tolerance)


def shrunk(name: str = "residual_cnn") -> Case:
    proto = BUILDERS[name]()
    teacher = infer_shapes(ir.from_proto(proto))
    parts = partition(fold_constants(teacher.clone()))
    probe = inputs_of(proto, 4)
    students = {}
    for n in parts.distillable:
        model = parts.slice_of(n)
        names = [value.name or "" for value in model.graph.inputs]
        assert n.groups is not None
        values = run(parts.model, probe, names) if set(names) - set(probe) else probe
        slice_ = TeacherSlice(n.name, model, n.groups, {name: values[name] for name in names})
        students[n.name] = Width(0.5, None, "teacher").build(slice_, np.random.default_rng(0)).model
    return Case(teacher, parts, students, splice(teacher, students), probe)


@pytest.mark.parametrize("name", ["residual_cnn", "inverted_bottleneck", "transformer", "tied", "several_heads"])
def test_a_spliced_student_passes(name: str) -> None:
    case = shrunk(name)
    assert case.students
    case.check()


def test_a_teacher_without_students_passes() -> None:
    case = shrunk()
    case.students = {}
    case.student = case.teacher.clone()
    case.check()


def weight_of(student: ir.Model, node: str) -> ir.Value:
    (found,) = (n for n in student.graph if n.outputs[0].name == node)
    value = found.inputs[1]
    assert value is not None
    return value


@pytest.mark.parametrize("broken", [0.5, np.nan, np.inf])
def test_weights_that_are_not_those_trained_do_not_pass(broken: float) -> None:
    case = shrunk()
    value = weight_of(case.student, "first2")
    assert value.const_value is not None
    array = np.array(value.const_value.numpy())
    array.reshape(-1)[0] += broken
    value.const_value = ir.tensor(array, name=value.name)
    with pytest.raises(VerificationError, match="n03: in the spliced student, the converted slice differs"):
        case.check()


def test_students_that_changed_places_do_not_pass() -> None:
    case = shrunk()
    first, second = (case.students[name] for name in ("n02", "n03"))
    case.students["n02"], case.students["n03"] = second, first
    with pytest.raises(VerificationError, match="n02"):
        case.check()


def rename_input(model: ir.Model) -> None:
    model.graph.inputs[0].name = "image"


def rename_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "scores"


def fix_the_batch(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape([1, 3, 8, 8])


def lose_an_output(model: ir.Model) -> None:
    model.graph.outputs.pop()


def gain_an_output(model: ir.Model) -> None:
    (node,) = (n for n in model.graph if n.outputs[0].name == "unit1")
    model.graph.outputs.append(node.outputs[0])


def other_type(model: ir.Model) -> None:
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)


@pytest.mark.parametrize(
    ("change", "side"),
    [
        (rename_input, "inputs"),
        (fix_the_batch, "inputs"),
        (other_type, "inputs"),
        (rename_output, "outputs"),
        (lose_an_output, "outputs"),
        (gain_an_output, "outputs"),
    ],
)
def test_another_interface_does_not_pass(change: Callable[[ir.Model], None], side: str) -> None:
    case = shrunk()
    change(case.student)
    with pytest.raises(VerificationError, match=f"the student's {side} .* are not the teacher's"):
        case.check()


def test_another_opset_does_not_pass() -> None:
    case = shrunk()
    case.student.opset_imports[""] = 17
    with pytest.raises(VerificationError, match="opset"):
        case.check()


def test_a_file_that_the_checker_refuses_does_not_pass() -> None:
    case = shrunk()
    (node,) = (n for n in case.student.graph if n.outputs[0].name == "unit1")
    node.op_type = "Reluu"
    with pytest.raises(VerificationError, match=r"onnx\.checker refuses the student"):
        case.check()


def _older_norms() -> Case:
    """A teacher with an operator that its opset does not have, as onnxruntime writes them, and its student."""
    net = Net(2)
    x = net.gemm(net.input("x", "N", 8), 8, 12)
    scale, shift = (net.constant(name, np.ones(12, np.float32)) for name in ("scale", "shift"))
    x = net.op("LayerNormalization", x, scale, shift, out="normed")
    x = net.op("Add", net.gemm(net.relu(net.gemm(x, 12, 20)), 20, 12, out="inner"), x, out="unit")
    proto = net.proto(net.gemm(x, 12, 3, out="y"), opset=17)
    proto.opset_import[0].version = 14
    teacher = loaded(proto)
    parts = partition(fold_constants(teacher.clone()))
    return Case(teacher, parts, {}, splice(teacher, {}), inputs_of(proto, 4))


def test_what_the_checker_refuses_in_the_teacher_may_be_in_the_student() -> None:
    case = _older_norms()
    case.check()


@pytest.mark.parametrize("broken", ["Reluu", "RMSNormalization"])
def test_what_the_checker_refuses_in_the_student_alone_does_not_pass(broken: str) -> None:
    """Also where it refuses something else in both, and would stop there."""
    case = _older_norms()
    (node,) = (n for n in case.student.graph if n.outputs[0].name == "unit")
    node.op_type = broken
    with pytest.raises(VerificationError, match=rf"onnx\.checker refuses the student: No Op registered for {broken}"):
        case.check()


def test_a_model_that_onnxruntime_refuses_does_not_pass() -> None:
    case = shrunk()
    (node,) = (n for n in case.student.graph if n.outputs[0].name == "unit1")
    node.domain = CUSTOM
    case.student.opset_imports[CUSTOM] = 1
    with pytest.raises(VerificationError, match="onnxruntime does not run the student"):
        case.check()


def test_a_boundary_that_disappeared_does_not_pass() -> None:
    case = shrunk()
    (node,) = (n for n in case.student.graph if n.outputs[0].name == "unit2")
    node.outputs[0].name = "stranger"
    with pytest.raises(VerificationError, match="the student has no value 'unit2'"):
        case.check()


def test_initializers_among_the_inputs_are_no_interface() -> None:
    case = shrunk("old_style")
    assert len(case.teacher.graph.inputs) > 1
    case.check()


def test_verifying_changes_nothing() -> None:
    case = shrunk()
    before = ir.to_proto(case.student).SerializeToString(deterministic=True)
    case.check()
    assert ir.to_proto(case.student).SerializeToString(deterministic=True) == before
    assert [v.name for v in case.student.graph.outputs] == [v.name for v in residual_cnn().graph.output]
