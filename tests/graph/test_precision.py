"""Models in float16 and float64: trained in float32, and back in their own types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from ndonnx.config.recipe import Recipe
from ndonnx.errors import TrainingError
from ndonnx.graph.precision import in_float32, in_own_types, rounding_error
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.metrics.check import check
from ndonnx_cli.main import main
from tests.helpers.models import Array, Net, inputs_of, loaded, mlp, residual_cnn, retyped, run, transformer
from tests.helpers.runs import ALONE, Bench, statuses

pytestmark = pytest.mark.usefixtures("one_core")

MODELS = {"residual": residual_cnn(norm=True), "transformer": transformer(), "mlp": mlp()}


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of all weights and values, as far as they are inferred, by name."""
    full = onnx.shape_inference.infer_shapes(model)
    values = (*full.graph.input, *full.graph.output, *full.graph.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {weight.name: weight.data_type for weight in full.graph.initializer}


def put(folder: Path, name: str, kind: Any, *, ends: bool = True, data: Any = None) -> Bench:
    """A folder with a retyped model; data in its own type, or another one."""
    model = MODELS[name]
    bench = Bench(folder)
    onnx.save(retyped(model, kind, ends=ends), bench.model)
    arrays = {n: a.astype(data or (kind if ends else np.float32)) for n, a in inputs_of(model, 64).items()}
    np.savez(bench.data, **arrays)  # type: ignore[arg-type]
    return bench


def close(bench: Bench, other: onnx.ModelProto) -> bool:
    """Whether the student answers about as another model does."""
    data: dict[str, Array] = {n: a[:8] for n, a in np.load(bench.data).items()}
    ours = run(onnx.load(bench.student), data)
    theirs = run(other, {name: rows.astype(np.float32) for name, rows in data.items()})
    return all(
        np.abs(ours[name].astype(np.float64) - wanted).max() < 0.1 * np.abs(wanted).max()
        for name, wanted in theirs.items()
    )


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_slice_is_itself_again_behind_float32(name: str, ends: bool) -> None:
    own = infer_shapes(loaded(retyped(MODELS[name], np.float16, ends=ends)))
    wide = in_float32(own)
    assert not {v.dtype for n in wide.graph for v in n.outputs} & {ir.DataType.FLOAT16}
    feed = inputs_of(MODELS[name], 4)
    typed = {n: a.astype(np.float16) if ends else a for n, a in feed.items()}
    given = {n: a.astype(np.float32) for n, a in typed.items()}
    back = in_own_types(wide, own)
    assert types(ir.to_proto(back)) == types(ir.to_proto(own))
    for output, answer in run(own, typed).items():
        np.testing.assert_array_equal(run(back, typed)[output], answer)
        exact = run(wide, given)[output]
        assert np.abs(answer - exact).max() <= rounding_error(own) * np.abs(exact).max()


def test_a_float32_slice_is_left_alone() -> None:
    model = loaded(residual_cnn())
    assert in_float32(model) is model and in_own_types(model, model) is model and rounding_error(model) == 0


def test_what_a_student_adds_has_the_type_of_what_it_is_computed_from() -> None:
    """A slice in two types, and a student with other nodes and weights in both parts."""
    net = Net()
    half = net.op("Cast", net.input("x", "N", 4), to=TensorProto.FLOAT16)
    y = net.op("MatMul", half, net.constant("a", np.ones((4, 6), np.float16)))
    net.op("MatMul", net.op("Cast", y, to=TensorProto.FLOAT, out="wide"), net.weight("b", 6, 4), out="y")
    own = infer_shapes(loaded(net.proto("y")))
    net = Net()
    half = net.op("Cast", net.input("x", "N", 4), to=TensorProto.FLOAT, out="cast_1")
    thin = net.op("MatMul", half, net.weight("left", 4, 2))
    y = net.op("Cast", net.op("MatMul", thin, net.weight("right", 2, 6)), to=TensorProto.FLOAT, out="wide")
    net.op("Add", net.op("MatMul", y, net.weight("b", 6, 4)), net.weight("new", 4), out="y")
    student = in_own_types(infer_shapes(loaded(net.proto("y"))), own)
    found = types(ir.to_proto(student))
    halves = {"left", "right", "cast_1"}
    assert {name for name, kind in found.items() if kind == TensorProto.FLOAT16} > halves
    assert all(found[name] == TensorProto.FLOAT for name in ("x", "wide", "b", "new", "y"))
    onnx.checker.check_model(ir.to_proto(student), full_check=True)
    assert run(student, {"x": np.ones((3, 4), np.float32)})["y"].shape == (3, 4)


def test_a_weight_that_has_become_too_large_is_told() -> None:
    own = infer_shapes(loaded(retyped(mlp(), np.float16)))
    wide = in_float32(own).clone()
    value = next(iter(wide.graph.initializers.values()))
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1e6), name=value.name)
    with pytest.raises(TrainingError, match=f"'{value.name}' has become too large for FLOAT16"):
        in_own_types(wide, own)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("residual", np.float16, {"inputs": "student"}),
        ("residual", np.float16, {"inputs": "teacher", "finetune_steps": 3}),
        ("residual", np.float16, {"method": "lowrank", "inputs": "refit"}),
        ("residual", np.float16, {"inputs": "noise"}),
        ("transformer", np.float16, {"inputs": "student", "look_ahead": 1}),
        ("transformer", np.float16, {"method": "sparsity", "finetune_steps": 3}),
        ("mlp", np.float64, {"inputs": "student", "finetune_steps": 3}),
    ],
)
@pytest.mark.parametrize("ends", [True, False])
def test_models_in_other_types_are_distilled_and_keep_them(
    tmp_path: Path, name: str, kind: Any, options: dict[str, Any], ends: bool
) -> None:
    bench = put(tmp_path, name, kind, ends=ends)
    result = bench.compress(**{"keep": 0.9, "sparsity": "0.1"} | options)
    assert "distilled" in statuses(result).values() and not result.report.unforeseen
    if result.report.finetune is not None:
        assert result.report.finetune.reason is None
    student, teacher = (onnx.load(path) for path in (bench.student, bench.model))
    known = types(teacher)
    assert {w.data_type for w in student.graph.initializer} == {w.data_type for w in teacher.graph.initializer}
    assert all(known.get(value, kind_) == kind_ for value, kind_ in types(student).items())
    assert close(bench, MODELS[name])


def test_the_identity_and_a_second_run_keep_every_bit(tmp_path: Path) -> None:
    bench = put(tmp_path, "residual", np.float16)
    bench.compress(keep=1.0, steps=0)
    feed = {n: a.astype(np.float16) for n, a in inputs_of(MODELS["residual"], 5).items()}
    answers = [run(onnx.load(path), feed)["logits"].tobytes() for path in (bench.model, bench.student)]
    assert answers[0] == answers[1]
    first = bench.bytes(inputs="student")
    assert bench.bytes(inputs="student") == first == bench.bytes("another", inputs="student")


def test_data_come_in_float32_or_in_the_models_own_type(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = put(tmp_path / "a", "mlp", np.float16), put(tmp_path / "b", "mlp", np.float16, data=np.float32)
    assert one.bytes() == other.bytes()


@pytest.mark.parametrize("command", ["search", "threshold", "harden", "evaluate", "inspect"])
def test_every_command_takes_a_model_in_float16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    bench = put(tmp_path, "residual", np.float16)
    monkeypatch.chdir(tmp_path)
    data = ["--data", "data.npz"]
    short = {
        "search": ["--candidates", "width 0.5", "--steps", "2", "--pareto", "1", "--executor", "serial"],
        "threshold": ["--repeats", "1"],
        "harden": ["--steps", "2", "--executor", "serial", "-o", "hard.onnx"],
        "evaluate": ["--teacher", "teacher.onnx"],
        "inspect": ["--check"],
    }
    assert main([command, bench.model.name, *data, *short[command]]) == 0, capsys.readouterr().err


def test_the_check_of_a_partition_takes_float16(tmp_path: Path) -> None:
    from tests.helpers.models import parted  # noqa: PLC0415

    bench = put(tmp_path, "transformer", np.float16)
    _, parts = parted(onnx.load(bench.model))
    checked = check(bench.model, parts, Recipe(**ALONE), data=str(bench.data))
    assert len(checked.parity) == len(parts.distillable) == len(checked.parts.distillable)


def test_a_model_with_bfloat16_inside_is_distilled_around_it(tmp_path: Path) -> None:
    net = Net()
    x = net.relu(net.gemm(net.input("x", "N", 8), 8, 8))
    y = net.op("Cast", net.op("Cast", x, to=TensorProto.BFLOAT16), to=TensorProto.FLOAT)
    z = net.gemm(net.relu(net.gemm(y, 8, 16)), 16, 8)
    bench = Bench(tmp_path).put(net.proto(net.gemm(net.op("Add", y, z), 8, 5, out="logits")))
    result = bench.compress(inputs="student")
    assert "distilled" in statuses(result).values() and not result.report.unforeseen
    kinds = types(onnx.load(bench.student)).values()
    assert TensorProto.BFLOAT16 in kinds
