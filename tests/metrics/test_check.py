"""The look before a run: what passes the gates of a distillation passes here, what does not is kept with its reason."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import ndonnx
from ndonnx.config.recipe import DataRecipe, Recipe
from ndonnx.data import InputSpec
from ndonnx.data.synthetic import made_up_samples
from ndonnx.demo import data_path, teacher_path
from ndonnx.distill.gate import free_batch
from ndonnx.errors import DataError, ShrinkError
from ndonnx.graph import fold_constants, load
from ndonnx.metrics.check import check_neighbourhood, guilty_operator
from ndonnx.partition import ChannelGroups, partition
from ndonnx.report.inspection import Inspection
from ndonnx.report.piece import Piece
from ndonnx.teacher import capture
from tests.helpers.models import Net, inputs_of, loaded, residual_cnn, transformer

TEACHER = teacher_path()


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def by_output(found: Inspection) -> Mapping[str | None, Piece]:
    return {piece.output: piece for piece in found.neighbourhoods}


def two_units(unconvertible: bool) -> onnx.ModelProto:
    """Two residual units; the second one may hold an operator that torch has no counterpart for."""
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8, out="stem"), out="unit0")
    for i in (1, 2):
        y = net.op("Sigmoid", net.conv(net.relu(net.conv(x, 8, 8)), 8, 8))
        y = net.op("Bernoulli", y, out="drawn") if unconvertible and i == 2 else y
        x = net.relu(net.op("Add", y, x), out=f"unit{i}")
    return net.proto(net.pooled_classifier(x, 8))


@pytest.mark.parametrize("data", [None, "gaussian", str(data_path("train"))])
def test_neighbourhoods_of_the_demo_pass(data: str | None) -> None:
    plain, found = ndonnx.inspect(TEACHER), ndonnx.inspect(TEACHER, check=True, data=data)
    assert found.coverage == plain.coverage
    for before, after in zip(plain.neighbourhoods, found.neighbourhoods, strict=True):
        assert before.parity is None
        assert (after.parity is not None) == (after.status == "distillable")
        assert after.parity is None or 0 < after.parity < 1e-5
        assert replace(after, parity=None) == before


def test_a_slice_that_does_not_convert_is_kept_with_its_operator_and_the_others_stay(tmp_path: Path) -> None:
    sound = by_output(ndonnx.inspect(saved(two_units(False), tmp_path), check=True))
    assert [sound[f"unit{i}"].status for i in (1, 2)] == ["distillable"] * 2
    path = saved(two_units(True), tmp_path)
    before, after = (by_output(ndonnx.inspect(path, check=check)) for check in (False, True))
    assert before["unit2"].status == "distillable"
    assert after["unit1"].status == "distillable" and after["unit1"].parity is not None
    assert (after["unit2"].status, after["unit2"].parity) == ("kept", None)
    assert (after["unit2"].reason or "").startswith("Bernoulli 'drawn': does not convert to torch: ")


def test_an_answer_that_differs_is_told_with_its_operator(tmp_path: Path) -> None:
    recipe = Recipe(parity=1e-30)
    found = ndonnx.inspect(saved(residual_cnn(2), tmp_path), recipe, check=True)
    assert {piece.status for piece in found.neighbourhoods} == {"kept"}
    assert (found.coverage.parameters, found.coverage.macs) == (0, 0)
    reason = by_output(found)["unit1"].reason or ""
    assert re.fullmatch(r"Conv '\w+': the converted slice differs from onnxruntime by .* \(at most 1e-30\)", reason)


def test_coverage_counts_what_passed(tmp_path: Path) -> None:
    model = load(saved(residual_cnn(2), tmp_path))
    parts = partition(fold_constants(model))
    unit = next(n for n in parts.neighbourhoods if n.exit is not None and n.exit.name == "unit1")
    kept = replace(
        parts, neighbourhoods=tuple(replace(n, reason="no") if n is unit else n for n in parts.neighbourhoods)
    )
    before, after = (Inspection.of("m", p).coverage.parameters for p in (parts, kept))
    whole = Inspection.of("m", parts).parameters
    assert before - after == pytest.approx(unit.parameters / whole)


def test_groups_that_do_not_describe_the_slice_are_found_out(tmp_path: Path) -> None:
    """An axis is missing: the shrunk slice does not fit together any more."""
    model = loaded(residual_cnn(1))
    parts = partition(model)
    unit = parts.distillable[0]
    assert unit.groups is not None and unit.exit is not None and unit.entry is not None
    wrong = ChannelGroups(unit.groups.groups, unit.groups.axes[:-1], unit.groups.edits)
    samples = inputs_of(residual_cnn(1), 4)
    names = [unit.entry.name or "", unit.exit.name or ""]
    store = capture(model, names, lambda: [samples], tmp_path / "store", samples=4)
    assert check_neighbourhood(parts, unit, store, Recipe()) < 1e-5
    with pytest.raises(ShrinkError, match="onnxruntime does not run the slice"):
        check_neighbourhood(parts, replace(unit, groups=wrong), store, Recipe())


@pytest.mark.parametrize("first", [1, 0])
def test_a_teacher_of_a_fixed_batch_is_checked_at_that_where_its_numbers_hold_it(tmp_path: Path, first: int) -> None:
    """A `Reshape` to one sample mixes several; one that copies the axis does not."""
    net = Net()
    y = net.relu(net.matmul(net.input("x", 1, 2, 6), 6, 16))
    net.matmul(net.op("Reshape", y, net.ints(first, -1, 16)), 16, 4, out="z")
    found = by_output(ndonnx.inspect(saved(net.proto("z"), tmp_path), check=True))["z"]
    assert found.status == "distillable", found.reason


def test_the_guilty_operator_is_the_first_behind_which_answers_differ() -> None:
    model = loaded(residual_cnn(1))
    parts = partition(model)
    piece = free_batch(parts.slice_of(parts.distillable[0]), [])
    probe = inputs_of(residual_cnn(1), 2)
    assert guilty_operator(piece, probe, 1e-4) is None
    assert guilty_operator(piece, probe, -1.0) == "Conv 'stem'"


def test_nothing_of_it_needs_torch_unless_asked_for() -> None:
    code = f"""
import sys, ndonnx
ndonnx.inspect({str(TEACHER)!r})
print("torch" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"


# Made-up inputs


def spec(name: str, dtype: type[np.generic], *shape: int | str | None) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


def test_made_up_tokens_are_rows_of_the_table_that_they_choose() -> None:
    net = Net()
    tokens, kinds = (net.input(name, "N", "L", dtype=TensorProto.INT64) for name in ("tokens", "kinds"))
    words = net.op("Gather", net.weight("words", 7, 4), net.op("Cast", tokens, to=TensorProto.INT32))
    model = loaded(net.proto(net.op("Add", words, net.op("Gather", net.weight("sorts", 3, 4), kinds), out="y")))
    specs = [spec("tokens", np.int64, "N", "L"), spec("kinds", np.int64, "N", "L"), spec("mask", np.int32, "N", "L")]
    made = made_up_samples(specs, model.graph, DataRecipe(), 50)
    assert {array.shape for array in made.values()} == {(50, 16)}
    assert set(np.unique(made["tokens"])) == set(range(7))
    assert set(np.unique(made["kinds"])) == set(range(3))
    mask = made["mask"]
    assert mask.dtype == np.int32 and (np.diff(mask, axis=1) <= 0).all()
    assert mask[0].all() and (mask.sum(axis=1) >= 8).all() and not mask.all()


def test_made_up_floats_have_the_shape_and_type_that_the_model_states() -> None:
    graph = loaded(residual_cnn(1)).graph
    specs = [spec("x", np.float32, "N", 3, None, None), spec("z", np.float16, 1, 5)]
    made = made_up_samples(specs, graph, DataRecipe(), 3)
    assert made["x"].shape == (3, 3, 224, 224) and made["x"].dtype == np.float32
    assert made["z"].shape == (3, 5) and made["z"].dtype == np.float16
    assert abs(float(made["x"].std()) - 1) < 0.01
    sized = made_up_samples(specs[:1], graph, DataRecipe(size=(8, 9)), 3)["x"]
    assert sized.shape == (3, 3, 8, 9)
    again = made_up_samples(specs[:1], graph, DataRecipe(size=(8, 9)), 3)["x"]
    assert np.array_equal(sized, again)


def test_a_transformer_takes_made_up_inputs(tmp_path: Path) -> None:
    found = ndonnx.inspect(saved(transformer(), tmp_path), check=True)
    assert any(piece.parity is not None for piece in found.neighbourhoods)
    assert found.coverage.parameters > 0.5


def test_a_model_that_takes_no_made_up_input_asks_for_data(tmp_path: Path) -> None:
    net = Net()
    x = net.op("Reshape", net.input("x", "N", "L"), net.ints(-1, 1001))  # whatever is tried leaves a rest
    y = net.matmul(net.relu(net.matmul(x, 1001, 12)), 12, 4, out="y")
    path = saved(net.proto(y), tmp_path)
    with pytest.raises(DataError, match=r"does not take made-up inputs: .*give data, or --shape and --input$"):
        ndonnx.inspect(path, Recipe(), check=True)
    np.savez(tmp_path / "d.npz", x=np.ones((1, 1001), np.float32))
    found = ndonnx.inspect(path, Recipe(), check=True, data=str(tmp_path / "d.npz"))
    assert [piece.status for piece in found.neighbourhoods if piece.widths] == ["distillable"]
