"""Benchmarks: what is run, how often and in which order; times themselves are not judged."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ndonnx.benchmark import Latency, benchmark, made_up_feeds, ratio
from ndonnx.data import InputSpec
from ndonnx.errors import DataError, ModelError


def identity(shape: list[int | str], name: str = "x") -> ir.Model:
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], ["y"])],
        "identity",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def latency(times: list[float] | NDArray[np.float64]) -> Latency:
    return Latency(1, 1, 1, 1, tuple(float(value) for value in times))


def test_every_model_is_timed_as_often() -> None:
    models = {"a": identity(["N", 3]), "b": identity(["N", 3])}
    result = benchmark(models, {"x": np.ones((8, 3), np.float32)}, rounds=6, warmup=1, threads=1)
    assert list(result) == ["a", "b"]
    for entry in result.values():
        assert len(entry.times_ms) == 6
        assert entry.p50_ms == np.median(entry.times_ms)
        assert min(entry.times_ms) <= entry.p50_ms <= entry.p95_ms <= max(entry.times_ms)
        assert entry.throughput == pytest.approx(8000 / entry.p50_ms)


def test_feeds_are_made_up_where_none_are_given() -> None:
    result = benchmark({"a": identity(["N", 3])}, None, rounds=1, warmup=0, threads=1)
    assert result["a"].throughput == pytest.approx(1000 / result["a"].p50_ms)
    feeds = made_up_feeds([InputSpec("f", np.dtype(np.float16), ("N", 3)), InputSpec("i", np.dtype(np.int64), (2, 5))])
    assert feeds["f"].shape == (1, 3) and feeds["f"].dtype == np.float16 and feeds["f"].any()
    assert feeds["i"].shape == (2, 5) and not feeds["i"].any()
    with pytest.raises(DataError, match=r"dimension 1 \(seq\) of input 'x' float32 \[N, seq\] is dynamic"):
        benchmark({"a": identity(["N", "seq"])}, None)


def test_feeds_that_do_not_fit() -> None:
    model = identity(["N", 3])
    with pytest.raises(DataError, match=r"a: expected the inputs \['x'\], found \['z'\]; missing \['x'\]"):
        benchmark({"a": model}, {"z": np.ones((1, 3), np.float32)})
    with pytest.raises(ModelError, match="a: onnxruntime failed") as caught:
        benchmark({"a": model}, {"x": np.ones((1, 4), np.float32)}, threads=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="rounds >= 1"):
        benchmark({"a": model}, None, rounds=0)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.floats(0.2, 5))
def test_a_constant_factor_is_found_whatever_the_drift(times: list[float], factor: float) -> None:
    found = ratio(latency(np.array(times) * factor), latency(times))
    assert found.low == pytest.approx(factor) and found.high == pytest.approx(factor)
    assert found.median == pytest.approx(factor)


def test_the_interval_holds_the_median_and_shrinks_with_confidence() -> None:
    rng = np.random.default_rng(0)
    one, two = (latency(np.exp(rng.normal(size=40))) for _ in range(2))
    wide, narrow = ratio(one, two), ratio(one, two, confidence=0.5)
    assert wide.low <= narrow.low <= wide.median <= narrow.high <= wide.high
    assert wide == ratio(one, two)
    with pytest.raises(ValueError, match="paired"):
        ratio(one, latency([1.0]))
