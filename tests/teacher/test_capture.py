"""Capture: what the store holds is what onnxruntime says, and what cannot be stored is told."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from ndonnx.errors import DataError, ModelError, RunDirError, UsageError
from ndonnx.teacher import CaptureSettings, capture, capture_bytes, make_session, sessions

Batches = Callable[[], Iterator[dict[str, np.ndarray]]]


def build(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[int | str]]],
    outputs: list[str],
    weights: dict[str, np.ndarray] | None = None,
    *,
    infer: bool = True,
) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model) if infer else model)


def chain(**options: bool) -> ir.Model:
    """x (N, 8) -> Gemm -> `a/b:0` -> Relu -> `hidden` -> Gemm -> `y`; `unused` is read by nobody."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a/b:0"]),
        helper.make_node("Relu", ["a/b:0"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "w2"], ["y"]),
        helper.make_node("Greater", ["a/b:0", "zero"], ["positive"]),
        helper.make_node("Neg", ["y"], ["unused"]),
    ]
    weights = {
        "w1": rng.standard_normal((8, 16)).astype(np.float32),
        "w2": rng.standard_normal((16, 4)).astype(np.float32),
        "zero": np.zeros((), np.float32),
    }
    return build(nodes, {"x": (TensorProto.FLOAT, ["N", 8])}, ["y"], weights, **options)


def one_node(op: str, *, scale: float | None = None) -> ir.Model:
    inputs = ["x"] if scale is None else ["x", "scale"]
    weights = {} if scale is None else {"scale": np.array(scale, np.float32)}
    return build([helper.make_node(op, inputs, ["y"])], {"x": (TensorProto.FLOAT, ["N", 4])}, ["y"], weights)


def batched(batch: int, **arrays: np.ndarray) -> Batches:
    def batches() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(next(iter(arrays.values()))), batch):
            yield {name: array[start : start + batch] for name, array in arrays.items()}

    return batches


def reference(model: ir.Model, names: list[str], **feed: np.ndarray) -> list[np.ndarray]:
    """onnxruntime on all samples at once, with every value as a plain output."""
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(names, feed)


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((50, 8)).astype(np.float32)


@pytest.mark.parametrize("infer", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_the_store_holds_what_onnxruntime_computes(tmp_path: Path, x: np.ndarray, half: bool, infer: bool) -> None:
    model, names = chain(infer=infer), ["x", "a/b:0", "hidden", "positive", "y"]
    counts: list[int] = []
    store = capture(
        model,
        names,
        batched(16, x=x),
        tmp_path,
        samples=50,
        settings=CaptureSettings(half=half),
        on_batch=counts.append,
    )
    assert store.names == tuple(names)
    assert counts == [16, 16, 16, 2]
    for name, expected in zip(names[1:], reference(model, names[1:], x=x), strict=True):
        wanted = expected.astype(np.float16) if half and expected.dtype == np.float32 else expected
        assert store.array(name).dtype == wanted.dtype
        if half:
            np.testing.assert_allclose(store.array(name).astype(np.float32), wanted.astype(np.float32), rtol=2e-3)
        store.verify(name)
    np.testing.assert_array_equal(store.array("x"), x)
    assert store.array("x").dtype == np.float32
    assert store.nbytes == capture_bytes(chain(), names, 50, np.float16 if half else np.float32)


def test_values_are_exact_and_halves_are_rounded_like_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((40, 4)) * 10.0 ** rng.integers(-9, 4, (40, 4))).astype(np.float32)
    model = one_node("Relu")
    full = capture(model, ["y"], batched(7, x=x), tmp_path / "full", samples=40, settings=CaptureSettings(half=False))
    np.testing.assert_array_equal(full.array("y"), np.maximum(x, 0))
    half = capture(model, ["y"], batched(7, x=x), tmp_path / "half", samples=40)
    np.testing.assert_array_equal(half.array("y"), np.maximum(x, 0).astype(np.float16))


def test_the_model_is_not_changed(tmp_path: Path, x: np.ndarray) -> None:
    model = chain()
    before = ir.to_proto(model).SerializeToString()
    capture(model, ["hidden"], batched(16, x=x), tmp_path, samples=50)
    assert ir.to_proto(model).SerializeToString() == before


def test_nodes_behind_the_wanted_values_are_not_run(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Reshape", ["y", "shape"], ["z"])]
    weights = {"shape": np.array([7, 7, 7])}
    model = build(nodes, {"x": (TensorProto.FLOAT, ["N", 4])}, ["z"], weights, infer=False)
    x = np.ones((6, 4), np.float32)
    np.testing.assert_array_equal(capture(model, ["y"], batched(3, x=x), tmp_path, samples=6).array("y"), x)


@pytest.mark.parametrize("row", [0, 49])
def test_a_value_that_overflows_half_is_stored_in_full(tmp_path: Path, row: int) -> None:
    nodes = [helper.make_node("Mul", ["x", "scale"], ["big"]), helper.make_node("Relu", ["x"], ["small"])]
    weights = {"scale": np.array(-65500, np.float32)}
    model = build(nodes, {"x": (TensorProto.FLOAT, ["N", 4])}, ["big", "small"], weights)
    x = np.random.default_rng(0).uniform(0.1, 0.9, (50, 4)).astype(np.float32)
    x[row, 3] = 3
    counts: list[int] = []
    store = capture(model, ["big", "small"], batched(16, x=x), tmp_path, samples=50, on_batch=counts.append)
    np.testing.assert_array_equal(store.array("big"), x * np.float32(-65500))
    assert store.array("big").dtype == np.float32
    assert store.array("small").dtype == np.float16
    assert store.nonfinite == ()
    assert sum(counts) == 50
    assert len(list(tmp_path.glob("*.npy"))) == 2


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("values", "halved"),
    [
        (RNG.standard_normal((50, 4)), True),
        (RNG.standard_normal((50, 4)) * 1e-3, True),
        (RNG.standard_normal((50, 4)) * 1e-9, False),  # all of them become zeros
        (RNG.standard_normal((50, 4)) * 1e-6, False),  # a few steps are left
        (1000 + RNG.standard_normal((50, 4)) * 0.1, False),  # the steps are as large as the differences
        (10 + RNG.standard_normal((50, 4)), True),
        (np.where(np.arange(50)[:, None] < 16, 0, RNG.standard_normal((50, 4)) * 1e-9), False),  # nothing in batch 1
        (RNG.standard_normal((50, 4)) * [1, 1, 1, 1e-9], True),  # beside the others, the last tells nothing
    ],
)
def test_values_are_halved_only_where_they_bear_it(tmp_path: Path, values: np.ndarray, halved: bool) -> None:
    x = values.astype(np.float32)
    found = capture(one_node("Neg"), ["y"], batched(16, x=x), tmp_path, samples=50).array("y")
    assert found.dtype == (np.float16 if halved else np.float32)
    error, spread = np.square(found.astype(np.float64) + x).sum(), np.square(x - x.mean(axis=0)).sum(dtype=np.float64)
    assert error <= 1e-5 * spread
    if not halved:
        np.testing.assert_array_equal(found, -x)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_floats_are_stored_as_they_are(tmp_path: Path, kind: int) -> None:
    x = RNG.standard_normal((20, 4)).astype(helper.tensor_dtype_to_np_dtype(kind)) * 1e-4
    model = build([helper.make_node("Neg", ["x"], ["y"])], {"x": (kind, ["N", 4])}, ["y"])
    np.testing.assert_array_equal(capture(model, ["y"], batched(8, x=x), tmp_path, samples=20).array("y"), -x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("half", [True, False])
def test_bad_numbers_are_recorded_and_kept(tmp_path: Path, bad: float, half: bool) -> None:
    x = np.ones((20, 4), np.float32)
    x[13, 2] = bad
    store = capture(
        one_node("Neg"), ["x", "y"], batched(8, x=x), tmp_path, samples=20, settings=CaptureSettings(half=half)
    )
    assert sorted(store.nonfinite) == ["x", "y"]
    np.testing.assert_array_equal(store.array("y"), -x)


def masked(shape: list[int | str]) -> ir.Model:
    """`mask` comes through an Identity, so that it is an inner value without a sample axis."""
    nodes = [helper.make_node("Identity", ["m"], ["mask"]), helper.make_node("Add", ["x", "mask"], ["y"])]
    return build(nodes, {"x": (TensorProto.FLOAT, ["N", 4]), "m": (TensorProto.FLOAT, shape)}, ["y"])


def with_mask(x: np.ndarray, batch: int, masks: Callable[[int], np.ndarray]) -> Batches:
    def batches() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(x), batch):
            yield {"x": x[start : start + batch], "m": masks(start)}

    return batches


@pytest.mark.parametrize("rows", [1, 4])
def test_a_value_without_sample_axis_is_stored_once(tmp_path: Path, rows: int) -> None:
    # With 4 rows it looks like a batch of 4 until the last, shorter batch comes.
    x = np.ones((10, 4), np.float32)
    mask = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    model = build(
        [helper.make_node("Identity", ["m"], ["mask"]), helper.make_node("Relu", ["x"], ["y"])],
        {"x": (TensorProto.FLOAT, ["N", 4]), "m": (TensorProto.FLOAT, [rows, 4])},
        ["y", "mask"],
    )
    store = capture(model, ["y", "mask", "m"], with_mask(x, 4, lambda _: mask), tmp_path, samples=10)
    assert [store.is_constant(name) for name in ("y", "mask", "m")] == [False, True, True]
    np.testing.assert_array_equal(store.read("mask", 5, 7), mask)
    assert store.array("mask").dtype == np.float16
    assert store.unstorable == {}
    assert len(list(tmp_path.glob("*.npy"))) == 3


def test_a_value_without_sample_axis_that_differs_is_given_up(tmp_path: Path) -> None:
    x = np.ones((10, 4), np.float32)
    batches = with_mask(x, 4, lambda start: np.full((1, 4), start, np.float32))
    store = capture(masked([1, 4]), ["mask", "y"], batches, tmp_path, samples=10)
    assert store.names == ("y",)
    assert "differs between batches" in store.unstorable["mask"]
    with pytest.raises(RunDirError, match="no sample axis"):
        store.read("mask", 0, 1)


def test_a_mask_of_minus_infinity_is_stored_in_full(tmp_path: Path) -> None:
    x, mask = np.ones((10, 4), np.float32), np.array([[0, 0, -3.0e38, -np.inf]], np.float32)
    store = capture(masked([1, 4]), ["mask"], with_mask(x, 4, lambda _: mask), tmp_path, samples=10)
    np.testing.assert_array_equal(store.array("mask"), mask)
    assert store.nonfinite == ("mask",)


def test_a_shape_that_changes_between_batches_is_given_up(tmp_path: Path) -> None:
    model = build([helper.make_node("Relu", ["x"], ["y"])], {"x": (TensorProto.FLOAT, ["N", "T"])}, ["y"])

    def batches() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": np.ones((4, 3), np.float32)}
        yield {"x": np.ones((4, 5), np.float32)}

    store = capture(model, ["y"], batches, tmp_path, samples=8)
    assert store.names == ()
    assert "(3,), then (5,)" in store.unstorable["y"]
    assert not list(tmp_path.glob("*.npy"))


def test_what_is_no_array_of_numbers_is_given_up(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x"], ["list"]),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("NonZero", ["off"], ["empty"]),
        helper.make_node("Mul", ["x", "off"], ["off_x"]),
    ]
    weights = {"off": np.zeros(4, np.float32)}
    model = build(nodes, {"x": (TensorProto.FLOAT, ["N", 4])}, ["y"], weights, infer=False)
    x = np.ones((5, 4), np.float32)
    store = capture(model, ["list", "empty", "y"], batched(2, x=x), tmp_path, samples=5)
    assert store.names == ("y",)
    assert "list" in store.unstorable["list"]
    assert "int64(1, 0)" in store.unstorable["empty"]


def test_a_fixed_batch_may_overshoot(tmp_path: Path) -> None:
    model = build([helper.make_node("Neg", ["x"], ["y"])], {"x": (TensorProto.FLOAT, [4, 3])}, ["y"])
    x = np.arange(36, dtype=np.float32).reshape(12, 3)
    store = capture(model, ["y", "x"], batched(4, x=x), tmp_path, samples=10)
    np.testing.assert_array_equal(store.array("y"), -x[:10])
    np.testing.assert_array_equal(store.array("x"), x[:10])
    assert capture_bytes(model, ["y", "x"], 10) == store.nbytes


def test_a_source_may_fill_the_same_array_again(tmp_path: Path) -> None:
    x = np.random.default_rng(3).standard_normal((64, 4)).astype(np.float32)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        buffer = np.empty((2, 4), np.float32)
        for start in range(0, 64, 2):
            buffer[:] = x[start : start + 2]
            yield {"x": buffer}

    store = capture(one_node("Neg"), ["x", "y"], batches, tmp_path, samples=64, settings=CaptureSettings(half=False))
    np.testing.assert_array_equal(store.array("x"), x)
    np.testing.assert_array_equal(store.array("y"), -x)


def test_inputs_alone_need_no_session(tmp_path: Path, x: np.ndarray) -> None:
    store = capture(chain(), ["x"], batched(16, x=x), tmp_path, samples=50)
    np.testing.assert_array_equal(store.array("x"), x)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ModelError, "no activation named 'nothing'", {"values": ["nothing"]}),
        (ModelError, "no activation named 'w1'", {"values": ["w1"]}),
        (DataError, "ended after 50 of 60 samples", {"samples": 60}),
        (DataError, "ended after 0 of 50 samples", {"batches": lambda: iter(())}),
        (DataError, "no array for the model's input 'x', only z", {"batches": lambda: iter([{"z": np.ones(3)}])}),
        (DataError, "at sample 0 does not fit", {"batches": lambda: iter([{"x": np.ones((2, 8))}])}),
        (DataError, "at sample 0 does not fit", {"batches": lambda: iter([{"x": np.ones((2, 9), np.float32)}])}),
    ],
)
def test_what_fails_names_its_cause_and_leaves_nothing(
    tmp_path: Path, x: np.ndarray, error: type[Exception], match: str, options: dict
) -> None:
    arguments = {"values": ["hidden"], "batches": batched(16, x=x), "samples": 50} | options
    with pytest.raises(error, match=match) as caught:
        capture(chain(), directory=tmp_path / "store", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_batch_without_a_second_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="input 'm', only x"):
        capture(masked([1, 4]), ["y"], batched(2, x=np.ones((4, 4), np.float32)), tmp_path, samples=4)


def test_an_error_of_the_source_or_the_writer_ends_the_sweep(tmp_path: Path, x: np.ndarray) -> None:
    def torn() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": x}
        raise DataError("torn")

    with pytest.raises(DataError, match="torn"):
        capture(chain(), ["y"], torn, tmp_path / "torn", samples=100)
    assert not (tmp_path / "torn").exists()

    with pytest.raises(RunDirError, match=r"full|cannot write"):  # 2**48 samples do not fit on any disk
        capture(chain(), ["y"], batched(16, x=x), tmp_path / "full", samples=2**48)
    assert not (tmp_path / "full").exists()


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    model, batch = one_node("Neg"), {"x": RNG.standard_normal((64, 4096), np.float32)}
    model.graph.inputs[0].shape = ir.Shape(["N", 4096])
    model.graph.outputs[0].shape = ir.Shape(["N", 4096])

    def peak(count: int) -> int:
        tracemalloc.start()
        capture(model, ["y"], lambda: iter([batch] * count), tmp_path, samples=64 * count).remove()
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    few, many = peak(12), peak(48)
    one_batch = 64 * 4096 * 2
    assert many < few + 4 * one_batch  # of 36 more
    assert many < 8 * one_batch


def test_the_estimate_asks_for_a_batch_when_shapes_are_unknown(tmp_path: Path, x: np.ndarray) -> None:
    model, names = chain(infer=False), ["x", "hidden", "positive"]
    with pytest.raises(ModelError, match=r"'hidden'.*a batch is needed"):
        capture_bytes(model, names, 50)
    estimate = capture_bytes(model, names, 50, batch={"x": x[:3]})
    assert estimate == capture(model, names, batched(16, x=x), tmp_path, samples=50).nbytes
    mask = np.zeros((1, 4), np.float32)
    batch = {"x": np.ones((3, 4), np.float32), "m": mask}
    assert capture_bytes(masked([1, 4]), ["mask"], 1000, batch=batch) == 4 * 2
    assert capture_bytes(masked([1, 4]), ["mask"], 1000) == 4 * 2


def test_sessions_take_models_bytes_and_paths(tmp_path: Path, x: np.ndarray) -> None:
    model = chain()
    path = tmp_path / "model.onnx"
    ir.save(model, path, external_data="weights.bin", size_threshold_bytes=0)
    assert (tmp_path / "weights.bin").stat().st_size > 0
    (expected,) = reference(model, ["y"], x=x)
    serialised = ir.to_proto(model).SerializeToString()
    for source in (model, serialised, path, str(path), ir.load(path)):  # the last points at external data
        session = make_session(source, threads=1)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-5)


def test_a_model_too_large_for_protobuf_goes_through_a_folder(
    x: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = chain()
    monkeypatch.setattr(sessions, "PROTOBUF_LIMIT", 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = ir.to_proto(model).SerializeToString()
    (expected,) = reference(model, ["y"], x=x)
    np.testing.assert_allclose(make_session(model).run(None, {"x": x})[0], expected, rtol=1e-5)
    assert ir.to_proto(model).SerializeToString() == before
    assert not list(tmp_path.iterdir())


def test_what_onnxruntime_refuses_is_told_on_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x07" + b"no model")
    unknown = one_node("NoSuchOperator")
    for source, name in ((broken, str(broken)), (tmp_path / "none.onnx", "none.onnx"), (unknown, "graph 'net'")):
        with pytest.raises(ModelError) as caught:
            make_session(source)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError):
        make_session(b"")
    with pytest.raises(UsageError, match="device 'tpu': expected one of cpu, cuda"):
        make_session(chain(), device="tpu")
    assert capfd.readouterr() == ("", "")
