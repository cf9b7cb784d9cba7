"""Made-up inputs obey what the graph demands: sizes by trying, rows of tables, lengths, masks, scalars, ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import ndonnx
from ndonnx.config.recipe import InputRecipe, Recipe
from ndonnx.data import input_specs, open_source
from ndonnx.data.inputs import settle
from ndonnx.data.synthetic import made_up_samples
from ndonnx.errors import DataError
from ndonnx.graph import load
from ndonnx.teacher import make_session
from ndonnx.teacher.synthetic_inputs import complete_settings
from tests.helpers.detectors import detector
from tests.helpers.models import Array, Net
from tests.helpers.runs import Bench

INT = TensorProto.INT64


def text(offset: int = 2, rows: int = 12) -> onnx.ModelProto:
    """Tokens and their places, looked up in tables; how many of them count; a mask; all of open length."""
    net = Net(1)
    ids, lengths = net.input("ids", "N", "T", dtype=INT), net.input("lengths", "N", dtype=INT)
    places, mask = net.input("places", "N", "T", dtype=INT), net.input("attention_mask", "N", "T", dtype=INT)
    words = net.op("Gather", net.weight("words", rows, 8), ids)
    moved = net.op("Add", places, net.constant("offset", np.array(offset)))
    x = net.op("Add", words, net.op("Gather", net.weight("table", 20, 8), moved), out="x")
    steps = net.op("Gather", net.op("Shape", ids), net.constant("one", np.array(1)))
    counted = net.op("Range", net.constant("zero", np.array(0)), steps, net.constant("step", np.array(1)))
    inside = net.op("Less", counted, net.op("Unsqueeze", lengths, net.ints(1)))
    kept = net.op("Mul", net.op("Cast", inside, to=TensorProto.FLOAT), net.op("Cast", mask, to=TensorProto.FLOAT))
    x = net.op("Mul", x, net.op("Unsqueeze", kept, net.ints(2)))
    return net.proto(net.matmul(net.relu(net.matmul(x, 8, 24, out="up")), 24, 8, out="y"))


def strip(height: int = 48) -> onnx.ModelProto:
    """Lines of text, whose height and width the file leaves open and whose numbers take one height only."""
    net = Net(2)
    x = net.relu(net.conv(net.input("image", "N", 1, "H", "W"), 1, 8, out="stem"))
    x = net.op("Reshape", x, net.ints(0, 8 * height, -1), out="columns")
    steps = net.op("Transpose", x, perm=[0, 2, 1])
    return net.proto(net.matmul(net.relu(net.matmul(steps, 8 * height, 16)), 16, 5, out="y"))


def cached() -> onnx.ModelProto:
    """A decoder step: what is new, what is past, and a mask over both."""
    net = Net(3)
    x, past = net.input("x", "N", "sequence", 8), net.input("past", "N", "past_sequence", 8)
    mask = net.input("bias", "N", "sequence", "total_sequence")
    both = net.op("Concat", past, x, axis=1)
    scores = net.op("Add", net.op("MatMul", x, net.op("Transpose", both, perm=[0, 2, 1])), mask)
    out = net.op("MatMul", net.op("Softmax", scores, axis=-1), both)
    return net.proto(net.matmul(net.relu(net.matmul(out, 8, 24)), 24, 8, out="y"))


def completed(model: onnx.ModelProto, recipe: Recipe | None = None) -> tuple[dict[str, Array], dict[str, Any]]:
    """Five made-up samples, and the inputs that have one value."""
    recipe = recipe or Recipe()
    graph, session = _loaded(model), make_session(model.SerializeToString())
    settings = complete_settings(session, graph, recipe)
    inputs, fixed = settle(input_specs(session), settings)
    return made_up_samples(inputs, graph, recipe.data, 5, seed=3), fixed


def _loaded(model: onnx.ModelProto) -> Any:
    import tempfile  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder, "m.onnx"))
        return load(Path(folder, "m.onnx")).graph


def test_tables_lengths_and_masks_bound_what_is_drawn() -> None:
    made, _ = completed(text())

    steps = made["ids"].shape[1]
    assert made["ids"].min() >= 0 and made["ids"].max() < 12
    assert made["places"].max() + 2 < 20
    assert made["lengths"][0] == steps and steps / 2 <= made["lengths"].min() <= made["lengths"].max() <= steps
    assert set(np.unique(made["attention_mask"])) <= {0, 1} and made["attention_mask"][0].all()
    make_session(text().SerializeToString()).run(None, made)


@pytest.mark.parametrize("model", [strip(), strip(32), cached(), text(), detector(), detector(branches=True)])
def test_sizes_and_values_are_found_on_which_the_model_runs(model: onnx.ModelProto) -> None:
    made, fixed = completed(model)

    feeds = {name: np.moveaxis(a, 0, 1) if name == "state" else a for name, a in made.items()}
    make_session(model.SerializeToString()).run(None, feeds | fixed)


def test_a_scalar_is_what_the_graph_compares_it_with() -> None:
    assert completed(detector())[1]["sr"] == 16000
    assert completed(detector(branches=True))[1]["sr"] == 16000


def test_what_the_user_binds_is_kept() -> None:
    settings = {"image": InputRecipe(shape=(1, 1, 48, 64), min=0.25, max=0.75)}

    made, _ = completed(strip(), Recipe(model_inputs=settings))

    assert made["image"].shape == (5, 1, 48, 64)
    assert 0.25 <= made["image"].min() < 0.3 and 0.7 < made["image"].max() <= 0.75
    ids, _ = completed(text(), Recipe(model_inputs={"ids": InputRecipe(min=3, max=5)}))
    assert set(np.unique(ids["ids"])) == {3, 4, 5}
    with pytest.raises(DataError, match=r"no inputs could be made up.*give data, or --shape and --input"):
        completed(strip(), Recipe(model_inputs={"image": InputRecipe(shape=(1, 1, 40, 64))}))


@pytest.mark.parametrize("shape", [("N", 2**31, 6, 6), (2**60, 4), (2**30, 2**30)])
def test_sizes_that_nobody_can_make_up_are_refused(shape: tuple[int | str, ...]) -> None:
    net = Net()
    model = net.proto(net.relu(net.input("x", *shape), out="y"))
    with pytest.raises(DataError, match=r"'x' of .* is too large to be made up"):
        complete_settings(make_session(model.SerializeToString()), _loaded(model), Recipe())


def test_data_without_data_obey_the_same(tmp_path: Path) -> None:
    model = text()
    graph, session = _loaded(model), make_session(model.SerializeToString())
    settings = complete_settings(session, graph, Recipe())

    source = open_source("gaussian:40", input_specs(session), Recipe().data, graph=graph, settings=settings)

    (batch,) = source.batches(64)
    assert len(batch) == 40 and batch.inputs["lengths"].max() <= batch.inputs["ids"].shape[1]
    session.run(None, batch.inputs)
    again = next(iter(source.take(np.array([7]), 1))).inputs
    assert all(np.array_equal(again[name][0], array[7]) for name, array in batch.inputs.items())
    ranged = settings | {"places": settings["places"].model_copy(update={"max": 1})}
    other = open_source("gaussian:40", input_specs(session), Recipe().data, graph=graph, settings=ranged)
    assert other.fingerprint() != source.fingerprint()
    assert next(iter(other.batches(40))).inputs["places"].max() == 1


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("model", [text(), strip(), detector(branches=True)])
def test_every_verb_works_without_data(tmp_path: Path, model: onnx.ModelProto) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model, path)

    found = ndonnx.inspect(path, check=True)
    speed = ndonnx.benchmark(path, batch_sizes=[2], processes=2, rounds=3, memory=False)
    same = ndonnx.evaluate(path, "gaussian:20", teacher=path)

    assert "distillable" in {n.status for n in found.neighbourhoods}, [n.reason for n in found.neighbourhoods]
    assert found.macs is not None and speed.model.macs is not None
    assert same.samples == 20 and same.nmse == 0


@pytest.mark.usefixtures("one_core")
def test_a_model_of_open_sizes_is_compressed_without_data(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    onnx.save(text(), bench.model)
    recipe = Recipe(data_free=True, samples=40, steps=4, finetune_steps=0, executor="serial", inputs="teacher")

    result = ndonnx.compress(bench.model, recipe=recipe, output=bench.student)

    assert "distilled" in {n.status for n in result.report.neighbourhoods}


def test_branches_of_an_if_that_read_a_table_bound_the_numbers_too() -> None:
    net = Net(5)
    ids = net.input("ids", "N", 4, dtype=INT)
    table = net.weight("table", 9, 6)
    many = net.op("Greater", net.op("ReduceMax", ids, keepdims=0), net.constant("limit", np.array(3)))
    branch = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Gather", [table, "ids"], [f"{name}/rows"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}/rows", TensorProto.FLOAT, ["N", 4, 6])],
        )
        for name in ("then", "else")
    }
    model = net.proto(net.op("If", many, out="y", **branch), types={"y": onnx.ValueInfoProto(name="y")})
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 6]))

    made, _ = completed(model)

    assert made["ids"].max() < 9
