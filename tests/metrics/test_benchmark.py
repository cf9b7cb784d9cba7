"""Benchmarks: what is run, how often and in which order, and that intervals are honest; times are not judged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import ndonnx
from ndonnx.data import InputSpec
from ndonnx.errors import DataError, ModelError, UsageError
from ndonnx.metrics.latency import (
    Latency,
    Plan,
    batch_of,
    benchmark,
    common_batch_size,
    latency_of,
    made_up_feeds,
    measure,
    ratio,
    ratio_over_blocks,
)
from ndonnx.metrics.latency.fresh import LEAST_ROUNDS, MOST_ROUNDS, rounds_for
from ndonnx.metrics.latency.measure import Timing
from ndonnx.metrics.latency.statistics import latency as latency_from
from ndonnx.metrics.latency.timing import take_turns
from ndonnx_cli.main import main

F32 = np.dtype(np.float32)


def identity(shape: list[int | str], name: str = "x") -> ir.Model:
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], ["y"])],
        "identity",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def linear(path: Path, width: int = 4, batch: int | str = "N", factor: float = 1.0) -> str:
    """A file with `logits = factor * x @ (1s on the diagonal)`: (batch, width) to (batch, 4)."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 4])],
        [numpy_helper.from_array((factor * np.eye(width, 4)).astype(np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


def latency(times: list[float] | NDArray[np.float64]) -> Latency:
    return latency_from([float(value) for value in times], samples=1)


# The statistics


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.floats(0.2, 5))
def test_a_constant_factor_is_found_whatever_the_drift(times: list[float], factor: float) -> None:
    found = ratio(latency(np.array(times) * factor), latency(times))
    assert found.low == pytest.approx(factor) and found.high == pytest.approx(factor)
    assert found.median == pytest.approx(factor)
    blocks = [(np.array(times) * factor * drift, np.array(times) * drift) for drift in (1, 2, 7)]
    found = ratio_over_blocks([(list(one), list(other)) for one, other in blocks])
    assert found.low == pytest.approx(factor) and found.high == pytest.approx(factor)


def test_the_interval_holds_the_median_and_shrinks_with_confidence() -> None:
    rng = np.random.default_rng(0)
    one, two = (latency(np.exp(rng.normal(size=40))) for _ in range(2))
    wide, narrow = ratio(one, two), ratio(one, two, confidence=0.5)
    assert wide.low <= narrow.low <= wide.median <= narrow.high <= wide.high
    assert wide == ratio(one, two)
    with pytest.raises(ValueError, match="paired"):
        ratio(one, latency([1.0]))


def test_the_interval_over_processes_against_numbers_by_hand() -> None:
    blocks = [([2.0, 9.0, 2.0], [1.0, 3.0, 1.0]), ([8.0, 8.0, 1.0], [1.0, 1.0, 1.0])]  # medians 2 and 8
    found = ratio_over_blocks(blocks)
    assert found.median == pytest.approx(4)
    # Student's t with one degree of freedom is 12.706 at 97.5%; the logarithms lie ln 2 beside their mean.
    reach = 12.7062047 * math.log(2)
    assert math.log(found.high / 4) == pytest.approx(reach) == -math.log(found.low / 4)
    with pytest.raises(ValueError, match="at least 2 blocks, found 1"):
        ratio_over_blocks(blocks[:1])
    with pytest.raises(ValueError, match="paired"):
        ratio_over_blocks([([1.0], [1.0, 2.0])] * 2)


def test_the_interval_over_processes_covers_what_stays_with_a_process() -> None:
    """Each process has a ratio of its own, 3% about the true one; its runs differ far less."""
    rng = np.random.default_rng(1)
    covered, too_sure = [], []
    for _ in range(400):
        own = np.exp(rng.normal(math.log(0.6), 0.03, size=8))
        blocks = [(list(r * np.exp(rng.normal(0, 0.01, size=20))), [1.0] * 20) for r in own]
        found = ratio_over_blocks(blocks)
        covered.append(found.low <= 0.6 <= found.high)
        within = ratio(latency(blocks[0][0]), latency(blocks[0][1]))
        too_sure.append(within.low <= 0.6 <= within.high)
    assert 0.92 < np.mean(covered) < 0.98
    assert np.mean(too_sure) < 0.5


def test_percentiles_and_throughput() -> None:
    times = [float(value) for value in range(1, 102)]
    found = latency_from(times, samples=8)
    assert (found.p50_ms, found.p95_ms, found.p99_ms, found.mean_ms) == (51, 96, 100, 51)
    assert found.throughput == pytest.approx(8000 / 51)
    assert found.times_ms == tuple(times)
    assert Timing(1, found, None, None).is_steady
    assert not Timing(1, found, latency([1.0, 1.0, 1.0, 9.0]), None).is_steady


# In this process


def test_turns_alternate_and_go_backwards_every_other_time() -> None:
    now, order = [0.0], []

    def run(name: str, seconds: float) -> Callable[[], object]:
        def timed() -> None:
            order.append(name)
            now[0] += seconds

        return timed

    times = take_turns({"a": run("a", 0.5), "b": run("b", 0.25)}, 3, clock=lambda: now[0])
    assert "".join(order) == "abbaab"
    assert times == {"a": [500] * 3, "b": [250] * 3}


def test_every_model_is_timed_as_often() -> None:
    models = {"a": identity(["N", 3]), "b": identity(["N", 3])}
    result = benchmark(models, {"x": np.ones((8, 3), np.float32)}, rounds=6, warmup=1, threads=1)
    assert list(result) == ["a", "b"]
    for entry in result.values():
        assert len(entry.times_ms) == 6
        assert entry.p50_ms == np.median(entry.times_ms)
        assert min(entry.times_ms) <= entry.p50_ms <= entry.p95_ms <= entry.p99_ms <= max(entry.times_ms)
        assert entry.throughput == pytest.approx(8000 / entry.p50_ms)


def test_slices_take_the_inputs_that_they_read() -> None:
    feeds = {"x": np.ones((8, 3), np.float32), "z": np.ones((2, 5), np.float32)}
    found = latency_of({"a": identity(["N", 3]), "b": identity([2, 5], "z")}, feeds, rounds=3, warmup=0, threads=1)
    assert list(found) == ["a", "b"] and min(found.values()) > 0


def test_feeds_are_made_up_where_none_are_given() -> None:
    result = benchmark({"a": identity(["N", 3])}, None, rounds=1, warmup=0, threads=1)
    assert result["a"].throughput == pytest.approx(1000 / result["a"].p50_ms)
    specs = [InputSpec("f", np.dtype(np.float16), ("N", 3)), InputSpec("i", np.dtype(np.int64), (2, 5))]
    feeds = made_up_feeds(specs, batch_size=4)
    assert feeds["f"].shape == (4, 3) and feeds["f"].dtype == np.float16 and feeds["f"].any()
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


def test_a_batch_begins_anew_where_samples_run_out() -> None:
    feeds = batch_of({"x": np.arange(6).reshape(3, 2), "scale": np.array(2.0)}, 5)
    assert feeds["x"][:, 0].tolist() == [0, 2, 4, 0, 2]
    assert feeds["scale"] == 2


def test_models_agree_on_a_batch_size_or_it_is_told() -> None:
    fixed, open_ = [InputSpec("x", F32, (4, 3))], [InputSpec("x", F32, ("N", 3)), InputSpec("scale", F32, ())]
    assert common_batch_size({"a": open_, "b": open_}) is None
    assert common_batch_size({"a": open_, "b": fixed}) == 4
    with pytest.raises(ModelError, match=r"expected one batch size, .* found 4 in a, 2 in b"):
        common_batch_size({"a": fixed, "b": [InputSpec("x", F32, (2, 3))]})


def test_rounds_fit_a_second_within_bounds() -> None:
    assert rounds_for(100) == 10
    assert rounds_for(0) == rounds_for(1) == MOST_ROUNDS
    assert rounds_for(60_000) == LEAST_ROUNDS


# In processes of their own


@pytest.mark.slow
def test_a_model_against_itself_takes_as_long(tmp_path: Path) -> None:
    """At 99.99%, so that a busy machine fails this once in ten thousand times."""
    path = Path(linear(tmp_path / "m.onnx", width=512))
    samples = made_up_feeds([InputSpec("x", F32, ("N", 512))], batch_size=64)
    plan = Plan((64,), ("cpu",), threads=1, processes=4, rounds=15, memory=False)
    ((timing,),) = [entry.batches for entry in measure({"model": path, "against": path}, samples, plan)]
    assert timing.against is not None and len(timing.against.times_ms) == len(timing.model.times_ms) == 60
    pairs = list(zip(timing.model.times_ms, timing.against.times_ms, strict=True))
    blocks = [tuple(zip(*pairs[start : start + 15], strict=True)) for start in range(0, 60, 15)]
    sure = ratio_over_blocks([(one, other) for one, other in blocks], confidence=0.9999)
    assert sure.low <= 1 <= sure.high
    assert timing.ratio == ratio_over_blocks([(one, other) for one, other in blocks])


@pytest.mark.slow
def test_documents_of_two_models_with_labelled_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    linear(tmp_path / "s.onnx", factor=2)
    linear(tmp_path / "t.onnx")
    x = np.random.default_rng(0).standard_normal((5, 4), np.float32)
    x[3] = 9
    np.savez("d.npz", x=x, label=x.argmax(axis=1))
    arguments = ["benchmark", "s.onnx", "--against", "t.onnx", "--data", "d.npz", "--batch-sizes", "2,7", "--threads"]
    code = main([*arguments, "1", "--processes", "2", "--rounds", "4", "--picture", "p.svg", "--json", "-q"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert list(document) == [
        "model", "against", "shares", "threads", "processes", "providers", "fidelity", "notes",
    ]  # fmt: skip
    size = (tmp_path / "s.onnx").stat().st_size
    assert document["model"]["path"] == "s.onnx"
    assert (document["model"]["parameters"], document["model"]["macs"], document["model"]["bytes"]) == (16, 16, size)
    assert 0 < document["model"]["compressed_bytes"] < size
    assert document["shares"]["macs"] == 1
    assert (document["threads"], document["processes"]) == (1, 2)
    (provider,) = document["providers"]
    assert (provider["provider"], provider["memory_batch_size"]) == ("cpu", 7)
    assert provider["model"]["load_ms"] > 0 and provider["against"]["load_ms"] > 0
    assert [timing["batch_size"] for timing in provider["batches"]] == [2, 7]
    for timing in provider["batches"]:
        assert set(timing["model"]) == {"p50_ms", "p95_ms", "p99_ms", "mean_ms", "throughput", "runs"}
        assert timing["model"]["runs"] == timing["against"]["runs"] == 8
        assert timing["ratio"]["low"] <= timing["ratio"]["median"] <= timing["ratio"]["high"]
        assert timing["ratio"]["confidence"] == 0.95
    fidelity = document["fidelity"]
    assert fidelity["model"]["accuracy"] == fidelity["against"]["accuracy"] == 1
    assert (fidelity["model"]["agreement"], fidelity["model"]["worst_sample"]) == (1, 3)
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")


def test_table_of_one_model_with_a_fixed_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = linear(tmp_path / "m.onnx", batch=3)
    code = main(["benchmark", model, "--processes", "2", "--rounds", "3", "--threads", "1", "-q"])
    out, _ = capsys.readouterr()
    assert code == 0
    assert "the batch size is fixed in the model: timed at 3 only" in out
    assert re.search(r"^cpu: p50 / p95 / p99, batch 3 +\S+ / \S+ / \S+ ms$", out, re.MULTILINE)
    assert re.search(r"^cpu: peak memory, batch 3 +\S+ k?M?B$", out, re.MULTILINE) or "peak memory" not in out
    assert "batch 8" not in out and "of the time" not in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--provider", "abacus"], "'abacus': expected one of cpu"),
        (["--against", "nothing.onnx"], "nothing.onnx: no such file"),
        (["--against", "wide.onnx"], "batch size"),
        (["--against", "other.onnx"], "missing ['z']"),
        (["--batch-sizes", "1,x"], "expected whole numbers from 1 on, as 1,8,32; found '1,x'"),
        (["--batch-sizes", "0"], "--batch-sizes"),
        (["--batch-sizes", ""], "--batch-sizes"),
        (["--processes", "1"], "processes, for an interval of at least 2, found 1"),
        (["--threads", "0"], "threads of at least 1"),
        (["--rounds", "0"], "rounds of at least 1"),
        (["--picture", "p.gif"], "p.gif: a picture is written as .png or .svg"),
        (["--picture", "no/such/p.png"], "p.png: cannot write"),
        (["--data", "nothing.npz"], "nothing.npz: no such file"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    linear(tmp_path / "m.onnx", batch=3)
    linear(tmp_path / "wide.onnx", batch=2)
    onnx.save(ir.to_proto(identity([3, 4], "z")), tmp_path / "other.onnx")
    before = sorted(tmp_path.iterdir())
    assert main(["benchmark", "m.onnx", "--processes", "2", *arguments, "-q"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert told in err
    assert sorted(tmp_path.iterdir()) == before


def test_an_unusable_batch_is_told_in_one_line(tmp_path: Path) -> None:
    """A batch baked into a Reshape behind an input that claims to be open."""
    shape = numpy_helper.from_array(np.array([1, 4], np.int64), "shape")
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "baked",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [shape],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "b.onnx")
    with pytest.raises(UsageError, match="batch of 2: onnxruntime failed") as caught:
        ndonnx.benchmark(tmp_path / "b.onnx", batch_sizes=(2,), threads=1, processes=2, memory=False)
    assert "\n" not in str(caught.value)
