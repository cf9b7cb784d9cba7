"""Runs on a simplified teacher: what is built, what is told, what is kept back, and that a continued run agrees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import ndonnx
from ndonnx.flow import simplification
from ndonnx.metrics.latency import Ratio
from tests.helpers.models import inputs_of, residual_cnn, run
from tests.helpers.runs import Bench, Recorder, done_markers

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture
def norms(bench: Bench) -> Bench:
    """A teacher with batch normalisations behind its convolutions."""
    return bench.put(residual_cnn(norm=True))


def _kinds(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def _decisions(bench: Bench) -> list[dict[str, object]]:
    return [json.loads(path.read_bytes())["meta"] for path in (bench.folder / "run" / "simplified").glob("*/done.json")]


def test_the_student_has_no_norms_and_the_report_says_so(norms: Bench) -> None:
    recorder = Recorder()
    before = norms.model.read_bytes()
    report = norms.compress(progress=recorder).report
    found = report.simplified
    assert found is not None and found.nodes_after < found.nodes_before
    assert found.difference is not None and found.difference < 1e-5
    assert "BatchNormalization" in _kinds(norms.model)
    assert "BatchNormalization" not in _kinds(norms.student)
    assert [note for note in recorder.notes if note.startswith("simplified: ")]
    assert report.to_json()["simplified"]["nodes_after"] == found.nodes_after
    assert report.teacher.parameters == ndonnx.inspect(norms.model, simplify=False).parameters
    assert norms.model.read_bytes() == before


def test_inspect_sees_the_partition_that_compress_uses(norms: Bench) -> None:
    found = [n.name for n in norms.compress().report.neighbourhoods]
    parts = ndonnx.partition_model(norms.model)
    assert [n.name for n in parts.neighbourhoods] == found
    assert not [node for n in parts.neighbourhoods for node in n.nodes if node.op_type == "BatchNormalization"]
    plain = ndonnx.partition_model(norms.model, simplify=False)
    assert [node for n in plain.neighbourhoods for node in n.nodes if node.op_type == "BatchNormalization"]


def test_a_run_that_changes_nothing_answers_to_the_last_bit(norms: Bench) -> None:
    feed = inputs_of(onnx.load(norms.model))
    for simplify in (True, False):
        norms.compress(f"run-{simplify}", keep=1.0, steps=0, simplify=simplify)
        theirs, ours = run(onnx.load(norms.model), feed), run(onnx.load(norms.student), feed)
        assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)
        assert "BatchNormalization" in _kinds(norms.student)


def test_values_that_the_recipe_names_stay(norms: Bench) -> None:
    norm = next(node for node in onnx.load(norms.model).graph.node if node.op_type == "BatchNormalization")
    inner = norm.input[0]
    assert inner not in _values(norms)
    norms.compress("cut", cut=(inner,))
    assert inner in {name for node in onnx.load(norms.student).graph.node for name in node.output}


def _values(bench: Bench) -> set[str]:
    bench.compress()
    return {name for node in onnx.load(bench.student).graph.node for name in node.output}


def test_without_it_the_norms_stay_and_other_students_are_trained(norms: Bench) -> None:
    norms.compress()
    keys = set(done_markers(norms.folder / "run").values())
    report = norms.compress(simplify=False).report
    assert report.simplified is None
    assert "BatchNormalization" in _kinds(norms.student)
    assert set(norms.folder.glob("run/students/*/done.json")) > keys


def test_slower_models_are_not_taken_and_a_continued_run_decides_the_same(
    norms: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simplification, "time_beside", lambda *_: Ratio(1.3, 1.2, 1.4, 0.95))
    recorder = Recorder()
    found = norms.compress(progress=recorder).report.simplified
    assert found is not None and found.rules == () and found.nodes_after == found.nodes_before
    assert "BatchNormalization" in _kinds(norms.student)
    assert [note for note in recorder.notes if "1.30 of the time" in note]
    first, decided = norms.student.read_bytes(), _decisions(norms)
    monkeypatch.setattr(simplification, "time_beside", lambda *_: Ratio(0.5, 0.5, 0.5, 0.95))
    again = norms.compress().report
    assert again.simplified == found
    assert {n.status for n in again.neighbourhoods} <= {"reused", "kept"}
    assert norms.student.read_bytes() == first
    assert _decisions(norms) == decided


def test_a_rule_that_answers_otherwise_is_left_out(norms: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = simplification.simplify

    def wrong(model, keep=(), rules=tuple(simplification.RULES)):  # type: ignore[no-untyped-def]
        found = real(model, keep, rules)
        if "chains" in rules and found is not model:
            weight = next(value for value in found.graph.initializers.values() if value.const_value.size > 1)
            weight.const_value = ir.tensor(weight.const_value.numpy() * 1.01)
        return found

    monkeypatch.setattr(simplification, "simplify", wrong)
    found = norms.compress().report.simplified
    assert found is not None and "behind" in found.rules and "chains" not in found.rules
    assert found.reason is not None and "chains" in found.reason
    assert "BatchNormalization" not in _kinds(norms.student)


def test_the_decision_is_of_the_model_and_what_is_named(norms: Bench) -> None:
    norms.compress()
    assert len(_decisions(norms)) == 1
    norms.compress(keep=0.25)
    assert len(_decisions(norms)) == 1
    norms.compress(freeze=(onnx.load(norms.model).graph.node[0].output[0],))
    assert len(_decisions(norms)) == 2
