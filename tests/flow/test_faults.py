"""What goes wrong in one neighbourhood costs that neighbourhood only, in every mode, and is told and kept."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from ndonnx.api.harden import harden
from ndonnx.api.search import search
from ndonnx.config.recipe import Recipe
from ndonnx.distill import hardening as training
from ndonnx.distill.gate import pass_gate
from ndonnx.errors import NdonnxError, ParityError, RunDirError
from ndonnx.flow import block_library, train
from ndonnx.partition import extract, nodes_between
from ndonnx.report.search import OptionReport
from ndonnx.students import Candidate, StudentMethod, TeacherSlice
from ndonnx.students.methods.width import Width
from ndonnx_cli.main import main
from tests.helpers.families import all_control, scanned, unsupported
from tests.helpers.models import Net, inputs_of, parted, residual_cnn, run, with_if
from tests.helpers.runs import ALONE, SMALL, UNITS, Bench, Recorder, statuses

pytestmark = pytest.mark.usefixtures("one_core")


ERRORS: dict[str, BaseException] = {
    "broadcast": ValueError("operands could not be broadcast together with shapes (1,) (8,)"),
    "torch": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    "algebra": np.linalg.LinAlgError("Singular matrix"),
    "assertion": AssertionError(),
    "index": IndexError("index 8 is out of bounds for axis 0 with size 8"),
    "memory": MemoryError("Unable to allocate 80 GiB"),
    "exit": SystemExit(1),
    "disk": OSError(errno.ENOSPC, "No space left on device", "/somewhere"),
    "ctrl-c": KeyboardInterrupt(),
}
ONE_SLICE = list(ERRORS)[:7]


@dataclass(frozen=True)
class Breaking(StudentMethod):
    """Halves all neighbourhoods but one, where it raises an error of the table."""

    error: str
    where: str = "n03"

    def _build(self, teacher: TeacherSlice, rng: np.random.Generator) -> Candidate:
        if teacher.name == self.where:
            raise ERRORS[self.error]
        return Width(0.5).build(teacher, rng)


def break_with(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs shrink by the test's own method."""
    for module in (train, block_library):
        monkeypatch.setattr(module, "method_of", lambda recipe: Breaking(error))


@pytest.mark.parametrize("error", ONE_SLICE)
@pytest.mark.parametrize("inputs", ["teacher", "student", "noise"])
def test_whatever_a_method_raises_keeps_its_neighbourhood_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, inputs: str, error: str
) -> None:
    break_with(error, monkeypatch)
    recorder = Recorder()
    report = bench.compress(inputs=inputs, progress=recorder).report
    assert recorder.ends == dict.fromkeys(UNITS, "distilled") | {"n03": "kept"}
    (kept,) = (n for n in report.neighbourhoods if n.name == "n03")
    assert kept.status == "kept" and kept.reason and "\n" not in kept.reason
    assert report.unforeseen == {"n03": kept.traceback}
    text = Path(kept.traceback or "").read_text(encoding="utf-8")
    assert "raise ERRORS[self.error]" in text and type(ERRORS[error]).__name__ in text
    theirs, ours = (ir.load(path).graph.initializers for path in (bench.model, bench.student))
    np.testing.assert_array_equal(ours["first2.weight"].const_value, theirs["first2.weight"].const_value)


def test_a_fault_is_forgotten_when_it_is_gone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        break_with("broadcast", context)
        assert bench.compress().report.unforeseen
    result = bench.compress()
    assert not result.report.unforeseen and not (bench.folder / "run" / "faults").exists()
    assert {n for n, status in statuses(result).items() if status != "kept"} == UNITS


@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize(("error", "raised"), [("disk", RunDirError), ("ctrl-c", KeyboardInterrupt)])
def test_a_full_disk_and_ctrl_c_still_end_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, inputs: str, error: str, raised: type[BaseException]
) -> None:
    break_with(error, monkeypatch)
    with pytest.raises(raised):
        bench.compress(inputs=inputs)
    assert not bench.student.exists()


def test_a_search_tries_again_what_nobody_foresaw(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(**SMALL | {"inputs": None}, search={"candidates": ("width 0.5",), "steps": 4, "samples": 64})  # type: ignore[arg-type]

    def options() -> dict[str, OptionReport]:
        found = search(folder / "teacher.onnx", data=str(folder / "data.npz"), recipe=recipe, run_dir=folder / "run")
        return {o.neighbourhood: o for o in found.report.options}

    with monkeypatch.context() as context:
        break_with("broadcast", context)
        failed = options()
    assert failed["n03"].status == "failed" and Path(failed["n03"].traceback or "").is_file()
    assert failed["n02"].status == "trained" and failed["n02"].traceback is None
    assert not list(folder.glob("run/failures/*")), "it need not happen again"


def test_what_nobody_foresaw_in_hardening_is_one_line_and_a_file(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "zeros_of", lambda model: {}["no such thing"])
    with pytest.raises(NdonnxError, match=r"teacher.onnx: cannot be hardened: KeyError: .*model.txt tells more"):
        harden(bench.model, data=str(bench.data), steps=2, output=bench.student, recipe=Recipe(**ALONE))
    assert "no such thing" in (bench.folder / "student.faults" / "model.txt").read_text(encoding="utf-8")
    assert not bench.student.exists()


CUSTOM = """
    import os
    import signal
    import sys
    from torch import nn

    class Unit(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(channels, 2, 1), nn.ReLU(), nn.Conv2d(2, channels, 1), nn.ReLU())

        def forward(self, x):
            return self.body(x)

    def killed(inputs, output):
        if output.name == "second2_out":
            os.kill(os.getpid(), signal.SIGKILL)
        return Unit(output.shape[1])

    def leaves(inputs, output):
        if output.name == "second2_out":
            sys.exit(5)
        return Unit(output.shape[1])
"""


@pytest.mark.parametrize(
    ("executor", "function", "told"),
    [
        pytest.param("process", "killed", "the worker process died (signal 9)", marks=pytest.mark.slow),
        ("serial", "leaves", "its work ended the process (exit code 5)"),
    ],
)
def test_a_process_that_ends_costs_one_neighbourhood_on_the_command_line_too(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    executor: str,
    function: str,
    told: str,
) -> None:
    """A student's code that leaves, or a worker that the system kills when memory runs out."""
    (bench.folder / "mine.py").write_text(dedent(CUSTOM.replace("second2_out", exit_of(bench, "n03"))))
    monkeypatch.chdir(bench.folder)
    monkeypatch.syspath_prepend(bench.folder)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    code = main(
        ["compress", "teacher.onnx", "--data", "data.npz", "--method", "custom", "--student", f"mine:{function}", "-q",
         "--steps", "2", "--finetune-steps", "0", "--inputs", "teacher", "--workers", "1",
         "--executor", executor, "-o", "s.onnx"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0 and told in printed
    assert "something unexpected happened in n03, which stayed as it was" in printed
    assert [path.name for path in (bench.folder / "s.run" / "faults").iterdir()] == ["n03.txt"]


def exit_of(bench: Bench, name: str) -> str:
    _, parts = parted(onnx.load(bench.model))
    (value,) = (n.exit for n in parts.neighbourhoods if n.name == name)
    assert value is not None
    return value.name or ""


# Models whose slices cannot be run one after the other as the whole is


def split_stages() -> onnx.ModelProto:
    """Stages whose Split has one output inside a neighbourhood and one that is read behind it, as in YOLOv8."""
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, 8, 8), 3, 16))
    for stage in ("a", "b"):
        net.op("Split", net.relu(net.conv(x, 16, 16, 1)), out=[f"{stage}1", f"{stage}2"], axis=1, num_outputs=2)
        parts = [f"{stage}1", f"{stage}2"]
        for _ in range(2):
            y = net.conv(net.relu(net.conv(parts[-1], 8, 8)), 8, 8)
            parts.append(net.op("Add", parts[-1], y))
        x = net.relu(net.conv(net.op("Concat", *parts, axis=1), 32, 16, 1))
    return net.proto(net.pooled_classifier(x, 16))


@pytest.mark.parametrize("inputs", ["student", "refit"])
def test_outputs_of_one_node_are_read_on_both_sides_of_a_cut(tmp_path: Path, inputs: str) -> None:
    result = Bench(tmp_path).put(split_stages()).compress(inputs=inputs)
    ends = statuses(result)
    assert list(ends.values()).count("distilled") >= 4 and not result.report.unforeseen
    assert all("weights" in (n.reason or "") or "width" in (n.reason or "") for n in result.report.neighbourhoods
               if n.status == "kept")  # fmt: skip


def test_a_cut_reads_what_it_is_given_and_not_what_it_makes_again() -> None:
    """A value in hand may be another one than the teacher's: a student's."""
    _, parts = parted(split_stages())
    values = ir.convenience.create_value_mapping(parts.model.graph)
    split = values["a1"].producer()
    assert split is not None and split.inputs[0] is not None
    add = next(node for node in parts.model.graph if node.op_type == "Concat")
    nodes, held = nodes_between([add.outputs[0]], {split.inputs[0].name or "", "a2", *names_of(add.inputs[2:])})
    part = extract(parts.model, nodes, held, [add.outputs[0]])
    rng, wide = np.random.default_rng(0), split.inputs[0].name
    shapes = {value.name or "": (2, 16 if value.name == wide else 8, 8, 8) for value in part.graph.inputs}
    feed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    found = run(part, feed)[add.outputs[0].name or ""]
    np.testing.assert_array_equal(found[:, 8:16], feed["a2"])


def names_of(values: Sequence[ir.Value | None]) -> list[str]:
    return [value.name or "" for value in values if value is not None]


def measured_only() -> onnx.ModelProto:
    """Two units that read the length of a value of which nothing else is read."""
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, 8, 8), 3, 8))
    count = net.op("Gather", net.op("Shape", net.op("NonZero", x)), net.constant("one", np.array(1)))
    scale = net.op("Cast", net.op("Min", count, net.constant("two", np.array(2))), to=TensorProto.FLOAT)
    for _ in range(2):
        inner = net.op("Mul", net.relu(net.conv(x, 8, 16)), scale)
        x = net.relu(net.op("Add", x, net.conv(inner, 16, 8)))
    return net.proto(net.pooled_classifier(x, 8))


def test_a_value_that_is_only_measured_is_computed_in_each_neighbourhood(tmp_path: Path) -> None:
    ends = statuses(Bench(tmp_path).put(measured_only()).compress(inputs="student"))
    assert list(ends.values()).count("distilled") == 2


# Samples that change each other's answers


def contrastive() -> onnx.ModelProto:
    """Two towers and the similarity of each sample of one with each of the other."""
    net = Net()
    ends = []
    for tower in ("a", "b"):
        x = net.input(tower, "N", 8)
        for _ in range(2):
            x = net.op("Add", x, net.gemm(net.relu(net.gemm(x, 8, 16)), 16, 8))
        ends.append(x)
    return net.proto(net.op("MatMul", ends[0], net.op("Transpose", ends[1], perm=[1, 0]), out="similarity"))


@pytest.mark.parametrize("samples", [64, 50])
def test_what_mixes_samples_is_not_fine_tuned_and_the_best_student_is_written(tmp_path: Path, samples: int) -> None:
    bench = Bench(tmp_path).put(contrastive(), samples)
    recorder = Recorder()
    result = bench.compress(inputs=None, finetune_steps=4, progress=recorder)
    tuned = result.report.finetune
    assert tuned is not None and tuned.traceback is None and not result.report.unforeseen
    assert "'similarity' holds no answer of its own for each sample of a batch" in (tuned.reason or "")
    assert list(statuses(result).values()).count("distilled") == 4
    assert "refit" in recorder.stages and bench.student.exists()


def attention_over_the_batch(net: Net, x: str) -> str:
    scores = net.op("Softmax", net.op("MatMul", x, net.op("Transpose", x, perm=[1, 0])), axis=-1)
    return net.op("MatMul", scores, x)


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        (attention_over_the_batch, "mixes the samples of a batch"),
        (lambda net, x: net.op("Sub", x, net.op("ReduceMean", x, net.ints(0))), "mixes the samples of a batch"),
        (lambda net, x: net.op("CumSum", x, net.constant("first", np.array(0))), "mixes the samples of a batch"),
        (lambda net, x: net.op("MatMul", x, net.op("Transpose", x, perm=[1, 0])), "holds no answer of its own"),
        (lambda net, x: net.op("ReduceMean", x, net.ints(0), keepdims=0), "holds no answer of its own"),
        (lambda net, x: net.op("ReduceMean", x, keepdims=0), "holds no answer of its own"),
    ],
)
def test_the_gate_tells_slices_that_mix_samples(mix: Callable[[Net, str], str], words: str) -> None:
    net = Net()
    _, parts = parted(net.proto(mix(net, net.gemm(net.input("x", "N", 6), 6, 8))))
    probe = inputs_of(ir.to_proto(parts.model), 16)
    with pytest.raises(ParityError, match=words):
        pass_gate(parts.model, probe, 1e-4, sampled=["x"])
    pass_gate(parts.model, probe, 1e-4)


# Everything stays


def opaque() -> onnx.ModelProto:
    """A model in which nothing can be distilled."""
    net = Net()
    x = net.op("Celu", net.input("x", "N", 6))
    return net.proto(net.op("Einsum", x, x, equation="ni,mi->nm"))


@pytest.mark.parametrize(
    "model", [residual_cnn(), with_if(), all_control(), scanned(), unsupported(), split_stages(), opaque()]
)
def test_keeping_everything_captures_nothing_and_never_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: onnx.ModelProto
) -> None:
    bench = Bench(tmp_path).put(model)
    monkeypatch.chdir(tmp_path)
    code = main(["compress", "teacher.onnx", "--data", "data.npz", "--keep", "1", "--steps", "0", "-o", "student.onnx"])
    printed = capsys.readouterr()
    assert code == 0 and "the student is the teacher, as asked" in printed.out
    assert not any(stage in printed.err for stage in ("capture", "distil:", "refit", "finetune"))
    assert not any((tmp_path / "student.run" / kind).exists() for kind in ("activations", "slices", "students"))
    feed = inputs_of(model, 64)
    theirs, ours = (run(onnx.load(path), feed) for path in (bench.model, bench.student))
    assert {name: value.tobytes() for name, value in theirs.items()} == {n: v.tobytes() for n, v in ours.items()}


# Gemm adds whatever broadcasts


def odd_gemm(shape: Callable[[int], tuple[int, ...]], batch: int | str = "N") -> onnx.ModelProto:
    net = Net()
    x = net.input("x", batch, 10)
    for unit in ("a", "b"):
        y = x
        for number, (features, to) in enumerate(((10, 16), (16, 10))):
            weight = net.weight(f"{unit}{number}.weight", to, features)
            bias = net.constant(f"{unit}{number}.bias", net.rng.standard_normal(shape(to)).astype(np.float32))
            y = net.relu(net.op("Gemm", y, weight, bias, transB=1))
        x = net.op("Add", x, y)
    return net.proto(net.gemm(x, 10, 5, out="logits"))


@pytest.mark.parametrize("shape", [lambda n: (), lambda n: (1,), lambda n: (n,), lambda n: (1, n), lambda n: (1, 1)])
@pytest.mark.parametrize("method", ["width", "lowrank", "sparsity"])
def test_a_gemm_may_add_whatever_broadcasts(
    tmp_path: Path, method: str, shape: Callable[[int], tuple[int, ...]]
) -> None:
    model = odd_gemm(shape)
    result = Bench(tmp_path).put(model).compress(method=method, inputs="student")
    assert not result.report.unforeseen
    assert list(statuses(result).values()).count("distilled") >= 2
    student = onnx.load(tmp_path / "student.onnx")
    assert {w.name: list(w.dims) for w in student.graph.initializer}["a1.bias"] == list(shape(10))


@pytest.mark.parametrize("shape", [lambda n: (4, 1), lambda n: (4, n)])
def test_a_gemm_may_add_another_number_to_each_sample_of_a_batch(
    tmp_path: Path, shape: Callable[[int], tuple[int, ...]]
) -> None:
    bench = Bench(tmp_path).put(odd_gemm(shape, 4), free=odd_gemm(lambda n: (n,)))
    result = bench.compress(inputs="student")
    assert not result.report.unforeseen
    assert run(onnx.load(bench.student), inputs_of(onnx.load(bench.model), 4))["logits"].shape == (4, 5)
