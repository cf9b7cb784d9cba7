"""Custom students: the user's torch modules, exported, checked and put into the teacher."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from torch import nn

from ndonnx.assemble.splice import splice
from ndonnx.config.recipe import Recipe
from ndonnx.errors import RecipeError, ShrinkError
from ndonnx.graph import slice_cost
from ndonnx.students import TeacherSlice
from ndonnx.students.methods.custom import Custom, ValueType
from ndonnx.students.registry import method_of
from tests.helpers.models import Net, inputs_of, parted, residual_cnn, run, transformer
from tests.helpers.slices import answer, build, error, teacher_of, weights

STUDENTS = """
    import torch
    from torch import nn
    import torch.nn.functional as F

    seen = []

    class Unit(nn.Module):
        def __init__(self, channels, inner):
            super().__init__()
            self.a = nn.Conv2d(channels, inner, 3, padding=1)
            self.norm = nn.BatchNorm2d(inner)
            self.b = nn.Conv2d(inner, channels, 1)

        def forward(self, x):
            return F.relu(x + self.b(F.silu(self.norm(self.a(x)))))

    def unit(inputs, output):
        seen.append((inputs, output))
        return Unit(output.shape[1], 4)

    def plain(inputs, output):
        return nn.Sequential(nn.Conv2d(6, 3, 1), nn.ReLU(), nn.Conv2d(3, 6, 1))

    def nothing(inputs, output):
        return None

    def raises(inputs, output):
        raise KeyError("no students today")

    def narrow(inputs, output):
        return nn.Conv2d(6, 5, 1)

    def double(inputs, output):
        return nn.Conv2d(6, 6, 1, dtype=torch.float64)

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    def pair(inputs, output):
        return Pair()

    class Deciding(nn.Module):
        def forward(self, x):
            return x * 1.0 if len(x) > 2 else x * 2.0

    def deciding(inputs, output):
        return Deciding()

    class Unknown(nn.Module):
        def forward(self, x):
            return torch.special.i0(x)

    def unknown(inputs, output):
        return Unknown()

    class Mixer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a = nn.Linear(width, 5)
            self.b = nn.Linear(5, width)

        def forward(self, x, *context):
            return x + self.b(torch.tanh(self.a(x)))

    def mixer(inputs, output):
        return Mixer(output.shape[-1])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder from which the command is started, with the user's module in it."""
    (tmp_path / "my_students.py").write_text(dedent(STUDENTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_students", None)


def unit(opset: int = 18, seed: int = 0) -> TeacherSlice:
    net = Net(seed)
    x = net.input("x", "N", 6, 5, 7)
    y = net.conv(net.relu(net.conv(x, 6, 8)), 8, 6)
    return teacher_of(net, net.relu(net.op("Add", y, x, out="/sum")), 40, opset=opset)


def own_answer(teacher: TeacherSlice, make: Callable[..., nn.Module], seed: int = 0) -> np.ndarray:
    """What the module answers as it was made for this seed."""
    torch.manual_seed(int(np.random.default_rng(seed).integers(2**31)))
    module = make((), ValueType("", "float32", ("N", 6, 5, 7))).eval()
    with torch.no_grad():
        return np.asarray(module(torch.from_numpy(teacher.samples["x"])).numpy())


# What comes in, and what comes out


@pytest.mark.parametrize("opset", [8, 9, 13, 18, 20, 21, 23])
def test_a_student_answers_as_its_module_at_the_teachers_opset(folder: Path, opset: int) -> None:
    teacher = unit(opset)
    candidate = build(teacher, Custom.made_by("my_students:unit", "teacher"))
    assert candidate.spec == "custom my_students:unit"
    assert candidate.model.opset_imports == teacher.model.opset_imports
    module = sys.modules["my_students"]
    np.testing.assert_allclose(answer(teacher, candidate.model), own_answer(teacher, module.unit), atol=1e-5)
    inputs, output = module.seen[0]
    assert [(value.name, value.dtype, value.shape) for value in inputs] == [("x", "float32", ("N", 6, 5, 7))]
    assert (output.name, output.dtype, output.shape) == (teacher.model.graph.outputs[0].name, "float32", ("N", 6, 5, 7))


def test_the_same_seed_gives_the_same_student_and_leaves_torch_alone(folder: Path) -> None:
    teacher, method = unit(), Custom.made_by("my_students:unit", "teacher")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (weights(build(teacher, method, seed).model) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not all(np.array_equal(one[name], other[name]) for name in one)


def test_names_inside_are_of_this_slice(folder: Path) -> None:
    model = build(unit(), Custom.made_by("my_students:unit")).model
    boundary = {model.graph.inputs[0].name, model.graph.outputs[0].name}
    made = {value.name for node in model.graph for value in node.outputs} | set(model.graph.initializers)
    assert all(name is not None and name.startswith("n01/") for name in made - boundary)
    assert all(node.name is not None and node.name.startswith("n01/") for node in model.graph)


# The closed form at its end


def test_the_last_operator_is_the_least_squares_solution(folder: Path) -> None:
    """Behind a sum and an activation that the teacher ends with too."""
    teacher = unit()
    start = build(teacher, Custom.made_by("my_students:unit", "teacher")).model
    fitted = build(teacher, Custom.made_by("my_students:unit")).model
    (read,) = (n.inputs[0] for n in fitted.graph if len(n.inputs) == 3 and n.inputs[1].name == "n01/b.weight")  # type: ignore[union-attr]
    assert read is not None
    hidden = answer(teacher, start, read.name).transpose(0, 2, 3, 1).reshape(-1, 4).astype(np.float64)
    missing = (answer(teacher, teacher.model, "/sum") - teacher.samples["x"]).transpose(0, 2, 3, 1).reshape(-1, 6)
    solution, *_ = np.linalg.lstsq(np.hstack([hidden, np.ones((len(hidden), 1))]), missing, rcond=None)
    found = weights(fitted)
    np.testing.assert_allclose(found["n01/b.weight"][:, :, 0, 0].T, solution[:-1], atol=2e-3)
    np.testing.assert_allclose(found["n01/b.bias"], solution[-1], atol=2e-3)
    assert error(teacher, fitted) < error(teacher, start)


def test_where_the_ends_differ_the_student_begins_as_it_is(folder: Path) -> None:
    """The teacher ends in an activation that the student does not have: the whole answer is fitted instead."""
    teacher = unit()
    start, fitted = (
        build(teacher, Custom.made_by("my_students:plain", init)).model for init in ("teacher", "least-squares")
    )
    assert error(teacher, fitted) < error(teacher, start)
    net = Net()
    bent = teacher_of(net, net.op("Tanh", net.conv(net.input("x", "N", 6, 5, 7), 6, 6)), 20)
    one, other = (
        weights(build(bent, Custom.made_by("my_students:unit", init)).model) for init in ("teacher", "least-squares")
    )
    assert all(np.array_equal(one[name], other[name]) for name in one)


# What can be wrong


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (None, "needs a student"),
        ("my_students", "expected module:function"),
        ("my_students:", "expected module:function"),
        ("my_students:missing", "'my_students' has no function 'missing'; it has .*'unit'"),
        ("my_students:Unit", "has no function 'Unit'"),
        ("no_such_module:unit", "cannot import 'no_such_module'"),
    ],
)
def test_a_function_that_is_not_there_ends_the_run_at_once(folder: Path, student: str | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        method_of(Recipe(method="custom", student=student))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "returned NoneType; expected a torch.nn.Module"),
        ("raises", "raised KeyError: 'no students today'"),
        ("narrow", r"answers 16 samples with float32 \(16, 5, 5, 7\); '.*' is float32 \(16, 6, 5, 7\)"),
        ("double", "the module raised RuntimeError"),
        ("pair", "answered with tuple; expected one tensor"),
        ("deciding", "differs from the module by .* must not decide"),
        ("unknown", "cannot be exported at the teacher's opset 18"),
    ],
)
def test_a_student_that_does_not_fit_is_this_slices_fault(folder: Path, function: str, message: str) -> None:
    with pytest.raises(ShrinkError, match=f"n01: my_students:{function}.*({message})") as caught:
        build(unit(), Custom.made_by(f"my_students:{function}"))
    assert "\n" not in str(caught.value)


def test_an_opset_that_cannot_be_reached_is_told(folder: Path) -> None:
    net = Net()
    teacher = teacher_of(net, net.relu(net.conv(net.input("x", "N", 6, 5, 7), 6, 6)), 20, opset=6)
    with pytest.raises(ShrinkError, match="my_students:unit: cannot be exported at the teacher's opset 6"):
        Custom.made_by("my_students:unit").build(teacher, np.random.default_rng(0))


# Where it runs


def test_it_travels_to_a_worker_that_runs_elsewhere(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another process would find it: pickled, in another folder, with nothing imported yet."""
    pickled = pickle.dumps(Custom.made_by("my_students:unit"))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    del sys.modules["my_students"]
    sys.path.remove(str(folder))
    assert build(unit(), pickle.loads(pickled)).spec == "custom my_students:unit"


def test_a_changed_module_is_another_method(folder: Path) -> None:
    before = Custom.made_by("my_students:unit")
    assert before == Custom.made_by("my_students:unit")
    with (folder / "my_students.py").open("a") as file:
        file.write("# changed\n")
    assert before != Custom.made_by("my_students:unit")


@pytest.mark.parametrize(("make", "function"), [(residual_cnn, "unit"), (transformer, "mixer")])
def test_students_take_their_places_in_the_teacher(folder: Path, make, function: str) -> None:  # type: ignore[no-untyped-def]
    """The transformer's slices read a mask besides."""
    proto = make()
    teacher, parts = parted(proto)
    feed = inputs_of(proto, 12)
    students = {}
    for part in parts.distillable:
        assert part.entry is not None
        assert part.groups is not None
        names = [value.name or "" for value in (part.entry, *part.context)]
        known = {name: feed[name] for name in names if name in feed}
        samples = known | run(parts.model, feed, [name for name in names if name not in feed])
        slice_ = TeacherSlice(part.name, parts.slice_of(part), part.groups, samples)
        students[part.name] = build(slice_, Custom.made_by(f"my_students:{function}")).model
    whole = splice(teacher, students)
    assert len(students) > 1
    assert slice_cost(whole).parameters < slice_cost(teacher).parameters
    expected, answered = (next(iter(run(model, feed).values())) for model in (teacher, whole))
    assert answered.shape == expected.shape
    again = inputs_of(proto, 5)
    assert next(iter(run(whole, again).values())).shape == next(iter(run(teacher, again).values())).shape
