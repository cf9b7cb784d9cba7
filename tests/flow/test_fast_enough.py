"""How much is kept under a time budget: as much as makes the student fast enough, and what the user says if he does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from ndonnx.flow import fast_enough
from ndonnx.graph import load
from ndonnx.metrics.latency import time_beside
from tests.helpers.models import inputs_of, residual_cnn
from tests.helpers.runs import Bench, Recorder, statuses
from tests.helpers.sharing import towers


def weights_in(model: ir.Model | Path) -> int:
    found = load(model) if isinstance(model, Path) else model
    return sum(v.const_value.size for v in found.graph.initializers.values() if v.const_value is not None)


def in_bits(model: ir.Model) -> bool:
    return any("Quantize" in node.op_type or node.op_type.endswith("Integer") for node in model.graph)


@pytest.fixture
def timed_by_size(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of a model is its number of weights, and a little for nothing: what was measured, in order."""
    told: list[float] = []

    def beside(model: ir.Model, other: Path, feeds: Mapping[str, Any]) -> SimpleNamespace:
        assert feeds
        if in_bits(model):
            return SimpleNamespace(median=9.0)
        told.append(weights_in(model) / weights_in(other))
        return SimpleNamespace(median=told[-1])

    monkeypatch.setattr(fast_enough, "time_beside", beside)
    return told


def kept_of(result: Any) -> set[str]:
    return {n.candidate for n in result.report.neighbourhoods if n.status in ("distilled", "reused")}


@pytest.mark.parametrize(("limit", "keep"), [(0.2, "0.5"), (0.75, None), (2.0, "0.95")])
def test_as_much_is_kept_as_is_fast_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed_by_size: list[float], limit: float, keep: str | None
) -> None:
    monkeypatch.setattr(fast_enough, "FAST_ENOUGH", limit)
    recorder, bench = Recorder(), Bench(tmp_path).put(residual_cnn())
    result = bench.compress(time_budget=2, progress=recorder)
    (candidate,) = kept_of(result)
    share = weights_in(bench.student) / weights_in(bench.model)
    assert any(note.startswith("keep ") for note in recorder.notes) == (candidate != "width k=0.5")
    if keep is None:
        assert 0.5 * limit < share <= limit and candidate not in ("width k=0.5", "width k=0.95")
        assert min(t for t in timed_by_size if t > limit) > share, "more was tried, and too slow"
    else:
        assert candidate == f"width k={keep}"
    assert len(timed_by_size) <= 5
    # What was decided is not decided anew.
    timed_by_size.clear()
    assert kept_of(bench.compress(time_budget=2)) == {candidate} and not timed_by_size


def test_what_the_user_says_is_kept_and_counted_steps_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed_by_size: list[float]
) -> None:
    monkeypatch.setattr(fast_enough, "FAST_ENOUGH", 2.0)
    bench = Bench(tmp_path).put(residual_cnn())
    assert kept_of(bench.compress("one", time_budget=2, keep=0.4)) == {"width k=0.4"}
    assert kept_of(bench.compress("two")) == {"width k=0.5"}
    assert kept_of(bench.compress("three", method="lowrank", time_budget=2)) == {"lowrank k=0.5"}
    assert not timed_by_size


def test_a_student_in_8_bits_is_timed_in_8_bits_and_may_be_the_whole_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cutting what 8 bits alone make fast enough would only lose quality."""
    told = []

    def beside(model: ir.Model, other: Path, feeds: Mapping[str, Any]) -> SimpleNamespace:
        del other, feeds
        told.append({node.op_type for node in model.graph})
        return SimpleNamespace(median=0.5)

    monkeypatch.setattr(fast_enough, "time_beside", beside)
    recorder, bench = Recorder(), Bench(tmp_path).put(residual_cnn())
    result = bench.compress(time_budget=2, bits=8, progress=recorder)
    assert kept_of(result) == {"width k=1"}
    assert any("ConvInteger" in types or "MatMulInteger" in types for types in told)
    assert any("QuantizeLinear" in types for types in told)
    assert any(note.startswith("keep 1:") for note in recorder.notes)
    assert result.report.quantised is not None and result.report.quantised.reason is None
    assert result.report.finetune is None, "floats that are the teacher's have nothing to learn"


def test_a_student_in_float_is_told_of_8_bits_that_are_as_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for time, told in ((0.4, True), (0.7, False)):
        of_bits = SimpleNamespace(median=time)
        monkeypatch.setattr(
            fast_enough, "time_beside", lambda m, *_, t=of_bits: t if in_bits(m) else SimpleNamespace(median=0.9)
        )
        recorder, bench = Recorder(), Bench(tmp_path).put(residual_cnn())
        assert kept_of(bench.compress(str(time), time_budget=2, progress=recorder)) == {"width k=0.5"}
        assert any("--bits 8" in note and "0.40" in note for note in recorder.notes) == told


@pytest.mark.parametrize("fails", ["time_beside", "any_units", "splice"])
def test_what_cannot_be_timed_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def broken(*_: object) -> None:
        raise KeyError("of a student that nobody foresaw")

    monkeypatch.setattr(fast_enough, fails, broken)
    if fails == "any_units":
        monkeypatch.setattr(fast_enough, "FAST_ENOUGH", 0.0)
    bench = Bench(tmp_path).put(residual_cnn())
    assert kept_of(bench.compress(time_budget=2)) == {"width k=0.5"}


def test_places_of_one_student_are_timed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed_by_size: list[float]
) -> None:
    monkeypatch.setattr(fast_enough, "FAST_ENOUGH", 0.01)
    bench = Bench(tmp_path).put(towers())
    result = bench.compress(time_budget=2)
    assert "distilled" in statuses(result).values()
    assert timed_by_size == [pytest.approx(weights_in(bench.student) / weights_in(bench.model))]


def test_a_model_beside_itself_takes_its_own_time(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(residual_cnn())
    found = time_beside(load(bench.model), bench.model, inputs_of(residual_cnn(), 1))
    assert 0 < found.low <= found.median <= found.high
