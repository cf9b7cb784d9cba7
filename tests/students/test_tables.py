"""Embedding tables as two factors, and regions for methods that need no width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

import ndonnx
from ndonnx.config.recipe import SearchRecipe
from ndonnx.graph import fold_constants, slice_cost
from ndonnx.partition import Partition, find_groups, partition
from ndonnx.students import TeacherSlice
from ndonnx.students.methods.lowrank import LowRank
from ndonnx.students.methods.width import Width
from ndonnx.students.registry import operators_around
from ndonnx.students.tables import lookups, measure
from tests.helpers.models import Net, inputs_of, loaded, parted, residual_cnn, transformer

IDS, WIDTH, LENGTH = 200, 12, 7


def lexical(ids: int = IDS) -> onnx.ModelProto:
    """A table whose rows are added up, and a classifier."""
    net = Net()
    x = net.input("ids", "N", LENGTH, dtype=TensorProto.INT64)
    found = net.op("Gather", net.weight("table", ids, WIDTH), x, out="found")
    return net.proto(net.gemm(net.op("ReduceMean", found, net.ints(1), keepdims=0), WIDTH, 5, out="scores"))


def skewed_ids(samples: int = 64, ids: int = IDS) -> np.ndarray:
    """Few ids make most of the samples, some come from the table's end, most never occur."""
    rng = np.random.default_rng(0)
    return np.where(
        rng.random((samples, LENGTH)) < 0.1,
        -rng.integers(1, 9, (samples, LENGTH)),
        rng.integers(0, 8, (samples, LENGTH)),
    )


def table_slice() -> TeacherSlice:
    graph = fold_constants(loaded(lexical()))
    parts = partition(graph, around=operators_around(("lowrank",)))
    (n,) = [n for n in parts.distillable if any(node.op_type == "Gather" for node in n.nodes)]
    assert n.groups is not None
    return TeacherSlice(n.name, parts.slice_of(n), n.groups, {"ids": skewed_ids()})


def test_factors_lose_least_where_the_data_look() -> None:
    """No other factors of this rank do better on what is looked up, and every id counts once beside it."""
    teacher = table_slice()
    (table,) = measure(teacher, lookups(teacher.model))
    rows = table.lookup.rows.astype(np.float64)
    seen = np.ones(IDS)
    np.add.at(seen, skewed_ids().reshape(-1) % IDS, 1)
    scaled = rows * np.sqrt(seen / seen.sum())[:, None]
    singular = np.linalg.svd(scaled, compute_uv=False)
    errors = table.errors()
    for rank in (1, 3, 6):
        a, b = table.factors(rank)
        assert a.shape == (IDS, rank) and b.shape == (rank, WIDTH)
        lost = ((rows - a.astype(np.float64) @ b) ** 2).sum(axis=1) @ (seen / seen.sum())
        assert lost == pytest.approx((singular[rank:] ** 2).sum(), rel=1e-4)
        assert errors[rank - 1] == pytest.approx(lost, rel=1e-4)


def test_a_table_becomes_two_that_answer_nearly_alike() -> None:
    teacher = table_slice()
    student = LowRank(0.5, round_to=1).build(teacher, np.random.default_rng(0)).model
    assert slice_cost(student).parameters <= 0.5 * slice_cost(teacher.model).parameters
    assert [node.op_type for node in student.graph][:2] == ["Gather", "MatMul"]
    assert slice_cost(student).macs > 0
    name = teacher.model.graph.outputs[0].name or ""
    found, expected = (teacher.run(model, [name])[name] for model in (student, teacher.model))
    (table,) = measure(teacher, lookups(teacher.model))
    assert np.square(found - expected).sum(axis=-1).mean() < 2 * table.errors()[5]


@pytest.mark.parametrize("case", ["shared", "axis", "constant ids", "one row"])
def test_what_is_no_table_stays(case: str) -> None:
    net = Net()
    x = net.input("ids", "N", LENGTH, dtype=TensorProto.INT64)
    table = net.weight("table", 1 if case == "one row" else 6, WIDTH)
    index = net.ints(0, 1) if case == "constant ids" else x
    out = net.op("Gather", table, index, axis=1 if case == "axis" else 0)
    if case == "shared":
        out = net.op("Add", net.op("Gather", table, x), net.op("Neg", out))
    model = loaded(net.proto(net.op("Neg", out), types={}))
    assert [len(found.rows) for found in lookups(model)] == ([1] if case == "one row" else [])


def test_compress_by_rank_reaches_tables_and_classifiers(tmp_path: Path) -> None:
    onnx.save(lexical(), tmp_path / "lexical.onnx")
    np.savez(tmp_path / "ids.npz", ids=skewed_ids(48) % IDS)
    recipe = ndonnx.Recipe(
        method="lowrank", keep=0.5, executor="serial", steps=3, samples=48, finetune_steps=2, round_to=1
    )
    output = tmp_path / "student.onnx"
    result = ndonnx.compress(tmp_path / "lexical.onnx", data=str(tmp_path / "ids.npz"), recipe=recipe, output=output)
    pieces = result.report.neighbourhoods
    assert {"distilled"} <= {piece.status for piece in pieces}
    sizes = [
        sum(np.prod(w.dims) for w in onnx.load(path).graph.initializer) for path in (tmp_path / "lexical.onnx", output)
    ]
    assert sizes[1] < 0.6 * sizes[0]
    session = ort.InferenceSession(output)
    assert session.run(None, {"ids": skewed_ids(3) % IDS})[0].shape == (3, 5)


def test_the_columns_of_a_table_are_a_width() -> None:
    working = fold_constants(loaded(lexical()))
    groups = find_groups(working.graph, working.graph.outputs[0])
    assert {group.name: group.width for group in groups.groups} == {"found": WIDTH}
    teacher = TeacherSlice("n01", working, groups, {"ids": skewed_ids()})
    student = Width(0.5).build(teacher, np.random.default_rng(0)).model
    assert tuple(student.graph.initializers["table"].shape or ()) == (IDS, WIDTH // 2)


# Regions for methods that need no width


def ops(parts: Partition) -> list[list[str]]:
    return [[node.op_type for node in n.nodes] for n in parts.distillable]


def test_what_has_no_width_is_a_region_where_none_is_needed() -> None:
    model = residual_cnn(2)
    _, narrow = parted(model)
    _, wide = parted(model, around=operators_around(("width", "lowrank")))
    assert ops(wide) == [["Conv", "Relu"], *ops(narrow), ["Gemm"]]
    assert [n.widths for n in wide.distillable] == [[], [8], [8], []]
    assert wide.coverage()[0] == 1.0
    assert ops(parted(model, around=operators_around(("width", "removal")))[1]) == ops(narrow)


def test_what_is_left_over_of_a_large_model_is_no_region() -> None:
    """A stem and a classifier with a hundredth of the weights cost as much as a region with all the others."""
    _, parts = parted(residual_cnn(3, channels=64), around=operators_around(("lowrank",)))
    assert ops(parts) == ops(parted(residual_cnn(3, channels=64))[1])


def test_regions_without_a_width_overlap_with_no_others() -> None:
    for model in (transformer(), residual_cnn(), lexical()):
        _, parts = parted(model, around=operators_around(("lowrank", "sparsity")))
        made = [
            value
            for n in parts.neighbourhoods
            for node in n.nodes
            for value in node.outputs
            if parts.flow.is_stream(value)
        ]
        assert len(made) == len(set(made))


def test_a_search_mixes_widths_and_ranks_where_only_some_regions_have_a_width(tmp_path: Path) -> None:
    model = residual_cnn(2)
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **inputs_of(model, batch=48))
    recipe = ndonnx.Recipe(
        samples=32,
        executor="serial",
        target=("params=0.75",),
        search=SearchRecipe(candidates=("width 0.5", "lowrank 0.5"), steps=2, samples=16),
    )
    found = ndonnx.search(tmp_path / "model.onnx", data=str(tmp_path / "data.npz"), recipe=recipe, pareto=1)
    by_kind = {
        (option.candidate.partition(" ")[0], option.status, option.reason)
        for option in found.report.options
        if option.neighbourhood == found.report.options[0].neighbourhood
    }
    assert ("width", "skipped", "no width to shrink inside") in by_kind
    assert ("lowrank", "trained", None) in by_kind
