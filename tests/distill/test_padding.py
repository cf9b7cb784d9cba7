"""Padding behind a sample's own length: found only where the model passes over it, and then cut off in training."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

import ndonnx
from ndonnx.distill.cutting import cut_where_same
from ndonnx.distill.padding import find_padding, lengths_of
from ndonnx.distill.samples import SliceSamples
from ndonnx.graph import load
from tests.helpers.models import Array, Net, run
from tests.helpers.training import store_of

POSITIONS, WORDS, WIDTH = 12, 30, 16


def encoder(*, masked: bool = True, pooled: bool = True, held: bool = False) -> onnx.ModelProto:
    """Word vectors through attention and a hidden layer, then their mean; every step passes over what the mask says."""
    net = Net(3)
    length: int | str = POSITIONS if held else "S"
    ids = net.input("ids", "N", length, dtype=TensorProto.INT64)
    mask = net.input("mask", "N", length, dtype=TensorProto.INT64)
    filled = net.op("Cast", mask, to=TensorProto.FLOAT)
    absent = net.op("Sub", net.constant("one", np.float32(1)), filled)
    away = net.op("Mul", absent, net.constant("away", np.float32(-1e9)))
    x = net.op("Gather", net.weight("words", WORDS, WIDTH), ids, out="embedded")
    for layer in range(2):
        scores = net.op("MatMul", net.matmul(x, WIDTH, WIDTH), net.op("Transpose", x, perm=[0, 2, 1]))
        if masked:
            scores = net.op("Add", scores, net.op("Unsqueeze", away, net.ints(1)))
        y = net.op("MatMul", net.op("Softmax", scores, axis=-1), x)
        x = net.op("Add", x, y, out=f"attended{layer}")
        hidden = net.relu(net.matmul(x, WIDTH, 32))
        x = net.op("Add", x, net.matmul(hidden, 32, WIDTH), out=f"layer{layer}")
    if pooled:
        one = net.op("Unsqueeze", filled, net.ints(2))
        total = net.op("ReduceSum", net.op("Mul", x, one), net.ints(1), keepdims=0)
        x = net.op("Div", total, net.op("ReduceSum", one, net.ints(1), keepdims=0), out="vector")
    return net.proto(x)


def texts(count: int, seed: int = 0, *, left: bool = False) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, POSITIONS + 1, count)
    mask = (np.arange(POSITIONS) < lengths[:, None]).astype(np.int64)
    return {"ids": rng.integers(0, WORDS, (count, POSITIONS)), "mask": mask[:, ::-1].copy() if left else mask}


def written(folder: Path, proto: onnx.ModelProto) -> Path:
    path = folder / "teacher.onnx"
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize("pooled", [True, False])
def test_an_attention_mask_is_found_by_what_the_model_does(pooled: bool) -> None:
    assert find_padding(ir.from_proto(encoder(pooled=pooled)), texts(20)) == "mask"


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"masked": False}, texts(20)),
        ({"held": True}, texts(20)),
        ({}, texts(20, left=True)),
        ({}, texts(20) | {"mask": np.ones((20, POSITIONS), np.int64)}),
    ],
    ids=["padding is attended to", "one length only", "padding comes first", "nothing is padded"],
)
def test_what_says_something_is_no_padding(options: dict[str, bool], given: dict[str, Array]) -> None:
    assert find_padding(ir.from_proto(encoder(**options)), given) is None


@settings(max_examples=40)
@given(st.integers(2, 60), st.integers(1, 20), st.integers(0, 10**6))
def test_every_row_comes_once_an_epoch_and_no_filled_position_is_lost(count: int, size: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given_ = texts(count, seed)
        lengths = lengths_of(given_["mask"])
        values = {"x": np.random.default_rng(seed).standard_normal((count, POSITIONS, 3)).astype(np.float32)}
        whole = SliceSamples.of(store_of(Path(folder), values), ["x"], ["x"], 0.3)
        samples = whole.without_padding(lengths, POSITIONS)
        rows = samples.order(np.random.default_rng(seed), size)
        assert sorted(rows) == list(range(whole.blocks.holdout, count))
        for part in samples.split(np.sort(rows[:size]), 3):
            found = samples.batch(part)["x"].numpy()
            assert found.shape[1] == lengths[part].max()
            np.testing.assert_array_equal(found, values["x"][part][:, : found.shape[1]])
        held = whole.blocks.holdout
        for groups, block in ((samples.heldout(count), range(held)), (samples.shaping(count), range(held, count))):
            found_rows = []
            for group in groups:
                numbers = [
                    int(np.flatnonzero((values["x"][:, 0] == row[0]).all(axis=1))[0]) for row in group.arrays["x"]
                ]
                assert group.arrays["x"].shape[1] == lengths[numbers].max()
                found_rows += numbers
            assert sorted(found_rows) == list(block), "each row of its block once, none of the other's"


def test_a_slice_that_needs_all_positions_gets_them(tmp_path: Path) -> None:
    """A sum over positions without the mask: other lengths, other answers."""
    net = Net(1)
    net.op("ReduceSum", net.input("x", "N", "S", 4), net.ints(1), keepdims=0, out="y")
    model = ir.from_proto(net.proto("y"))
    given_ = texts(20)
    x = np.random.default_rng(0).standard_normal((20, POSITIONS, 4)).astype(np.float32)
    samples = SliceSamples.of(store_of(tmp_path, {"x": x, "y": x.sum(axis=1)}), ["x"], ["y"], 0.3)
    assert cut_where_same(model, samples, given_["mask"]) is samples


def test_rows_that_are_filled_otherwise_than_the_first_ones_lose_nothing(tmp_path: Path) -> None:
    """A hole in one row: what is counted there says nothing of where it ends."""
    net = Net(1)
    net.relu(net.input("x", "N", "S", 4), out="y")
    model = ir.from_proto(net.proto("y"))
    mask = texts(20)["mask"]
    x = np.random.default_rng(0).standard_normal((20, POSITIONS, 4)).astype(np.float32)
    samples = SliceSamples.of(store_of(tmp_path, {"x": x, "y": np.maximum(x, 0)}), ["x"], ["y"], 0.3)
    assert cut_where_same(model, samples, mask) is not samples
    mask[7] = [1, 0, 1, *[0] * (POSITIONS - 3)]
    assert cut_where_same(model, samples, mask) is samples


def test_students_learn_on_what_is_filled_and_answer_at_any_length(tmp_path: Path) -> None:
    teacher = written(tmp_path, encoder())
    found = ndonnx.compress(
        teacher,
        data=texts(400),
        output=tmp_path / "student.onnx",
        keep=0.5,
        steps=60,
        finetune_steps=60,
        executor="serial",
    )
    assert [n.status for n in found.report.neighbourhoods].count("distilled") >= 1
    assert found.report.finetune is not None and found.report.finetune.reason is None
    test = texts(100, seed=9)
    student = load(tmp_path / "student.onnx")
    expected = next(iter(run(load(teacher), test).values()))
    whole = next(iter(run(student, test).values()))
    cosines = (expected * whole).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(whole, axis=1)
    assert cosines.mean() > 0.95
    row = int(np.argmin(lengths_of(test["mask"])))
    alone = {name: array[row : row + 1, : test["mask"][row].sum()] for name, array in test.items()}
    np.testing.assert_allclose(next(iter(run(student, alone).values())), whole[row : row + 1], rtol=1e-3, atol=1e-4)
