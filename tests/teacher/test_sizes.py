"""Sizes of values: what the graph or one run tells is what onnxruntime gives, and batches keep to bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndonnx.config.recipe import DataRecipe
from ndonnx.data import input_specs, open_source
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.working_copy import working_copy
from ndonnx.metrics.evaluation import evaluate
from ndonnx.teacher import capture, make_session, sizes
from ndonnx.teacher.sizes import BoundedBatches, Layout, layouts_of, live_bytes, rows_at_once
from tests.helpers.models import Array, Net, inputs_of, run


def images(net: Net, *, open_: bool) -> str:
    """A convolution, a pool that halves, a flattening, a matrix; height and width are open or not."""
    x = net.input("x", "N", 3, *(("H", "W") if open_ else (8, 12)))
    y = net.relu(net.conv(x, 3, 5, out="a"))
    y = net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2], out="b")
    y = net.op("GlobalAveragePool", y, out="c")
    return net.gemm(net.op("Flatten", y), 5, 4, out="y")


def sequence(net: Net) -> str:
    """Rows of all positions together, N * T of them, and back."""
    x = net.input("x", "N", "T", 6)
    rows = net.op("Reshape", x, net.constant("rows", np.array([-1, 6], np.int64)), out="rows_of_x")
    y = net.op("Relu", net.matmul(rows, 6, 10, out="a"), out="b")
    shape = net.op(
        "Concat", net.op("Shape", x, start=0, end=2), net.constant("width", np.array([10], np.int64)), axis=0
    )
    return net.op("Reshape", y, shape, out="y")


def model_of(name: str) -> ir.Model:
    net = Net(0)
    output = sequence(net) if name == "sequence" else images(net, open_=name == "open")
    return working_copy(infer_shapes(ir.from_proto(net.proto(output))))


def batch_of(name: str, rows: int = 2) -> dict[str, Array]:
    shape = (5, 6) if name == "sequence" else (3, 8, 12)
    return {"x": np.random.default_rng(0).standard_normal((rows, *shape)).astype(np.float32)}


def inner(model: ir.Model) -> list[str]:
    return [value.name or "" for node in model.graph for value in node.outputs if value.type is not None]


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("name", ["closed", "open", "sequence"])
def test_sizes_are_those_that_a_run_gives(name: str, forget: bool) -> None:
    model, batch = model_of(name), batch_of(name)
    if forget:
        for node in model.graph:
            for value in node.outputs:
                value.shape = None
    names = inner(model)
    found = layouts_of(model, ["x", *names], batch)
    assert list(found) == ["x", *names]
    for value, array in (batch | run(model, batch, names)).items():
        each = array.nbytes // 2 if array.shape[:1] == (2,) and found[value].rows else array.nbytes
        assert found[value].sample_bytes() == each, value
        if name != "sequence":
            assert found[value].rows


def test_many_values_of_open_sizes_are_found_by_few_runs_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of all would do; the names that sizes share need even less."""
    net = Net(0)
    y = net.input("x", "N", 4, "H", "W")
    for number in range(100):
        y = net.relu(net.conv(y, 4, 4, 1, out=f"conv{number}"))
    model = working_copy(infer_shapes(ir.from_proto(net.proto(y))))
    asked: list[int] = []
    real = sizes._run

    def counted(model: ir.Model, names: list[str], batch: dict[str, Array]) -> dict[str, object]:
        asked.append(len(names))
        return real(model, names, batch)

    monkeypatch.setattr(sizes, "_run", counted)
    layouts = layouts_of(model, inner(model), {"x": np.zeros((2, 4, 3, 5), np.float32)})
    assert {layout.shape[1:] for layout in layouts.values()} == {(4, 3, 5)}
    assert len(asked) <= 2
    assert sum(asked) <= 100
    asked.clear()
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    assert layouts_of(model, inner(model), {"x": np.zeros((2, 4, 3, 5), np.float32)}).keys() == set(inner(model))
    assert len(asked) == 2


def test_a_run_is_asked_for_no_more_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "_RUN_BYTES", 1000)
    monkeypatch.setattr(sizes, "_FIRST_RUN", 1)
    model = model_of("open")
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    assert layouts_of(model, inner(model), batch_of("open")).keys() == set(inner(model))


def test_what_lives_at_the_same_time_is_counted_by_hand() -> None:
    """x and a, then a and its ReLU, then b beside it, each until its last reader."""
    model = model_of("closed")
    layouts = layouts_of(model, ["x", *inner(model)])
    x, a, b = (layouts[name].sample_bytes() for name in ("x", "a", "b"))
    assert (x, a, b) == (3 * 96 * 4, 5 * 96 * 4, 5 * 24 * 4)
    assert live_bytes(model, layouts) == 2 * a
    assert live_bytes(model, layouts, ["a", "b"]) == 2 * a + b
    assert live_bytes(model, {"x": Layout(np.dtype(np.float32), (1, 3, 8, 12), True)}) == x


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60_000), st.sampled_from(["closed", "open", "sequence"]))
def test_batches_are_split_and_nothing_is_lost(samples: int, size: int, limit: int, name: str) -> None:
    model, x = model_of(name), batch_of(name, samples)["x"]

    def batches() -> Iterator[dict[str, Array]]:
        for start in range(0, samples, size):
            yield {"x": x[start : start + size]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "BATCH_BYTES", limit)
        parts = [part["x"] for part in BoundedBatches.of(model, ["y"], batches)()]
        most = rows_at_once(model, ["y"], batch_of(name), size)
    assert max(map(len, parts)) <= min(size, most)
    np.testing.assert_array_equal(np.concatenate(parts), x)


def test_what_is_captured_and_measured_does_not_depend_on_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net(0)
    proto = net.proto(images(net, open_=True))
    model, x = working_copy(infer_shapes(ir.from_proto(proto))), batch_of("open", 30)["x"]
    np.savez(tmp_path / "x.npz", x=x)
    source = open_source(str(tmp_path / "x.npz"), input_specs(make_session(model)), DataRecipe())
    changed = ir.from_proto(proto)
    weight = changed.graph.initializers["y.weight"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * 1.1, name="y.weight")  # type: ignore[union-attr]
    found = []
    for limit in (sizes.BATCH_BYTES, 1):
        monkeypatch.setattr(sizes, "BATCH_BYTES", limit)
        rows: list[int] = []
        folder = tmp_path / f"{limit}"
        store = capture(model, ["a", "y"], lambda: iter([{"x": x}]), folder, samples=30, on_batch=rows.append)
        found.append((store.array("a"), evaluate(changed, source, teacher=ir.from_proto(proto))))
        assert rows == ([30] if limit > 1 else [1] * 30)
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1].nmse == pytest.approx(found[1][1].nmse)
    assert found[0][1].worst_sample == found[1][1].worst_sample


def test_a_model_that_fixes_its_batch_gets_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "BATCH_BYTES", 1)
    net = Net(0)
    proto = net.proto(net.gemm(net.input("x", 4, 6), 6, 3))
    batch = inputs_of(proto, 4)
    parts = list(BoundedBatches.of(ir.from_proto(proto), [], lambda: iter([batch]))())
    assert [len(part["x"]) for part in parts] == [4]
