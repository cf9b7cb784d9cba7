"""The gate: what can be required, that verdicts are right by hand-computed numbers, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import ndonnx
from ndonnx.distill.tasks.fidelity import OutputFidelity
from ndonnx.distill.tasks.intervals import of_mean, of_part
from ndonnx.errors import UsageError
from ndonnx.metrics.evaluation import Evaluation
from ndonnx.metrics.requirements import MEASURES, Requirement, read_requirements, verdicts_of
from ndonnx.report.junit import junit
from ndonnx_cli.main import main

SAMPLES = 20


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a teacher, a student that is wrong on one sample of twenty, and labelled data."""
    x = np.eye(4, dtype=np.float32)[np.arange(SAMPLES) % 4] * 5
    x[0, :2] = 3, 2.9
    linear(tmp_path / "teacher.onnx", np.eye(4))
    linear(tmp_path / "student.onnx", np.diag([0.9, 1, 1, 1]))
    np.savez(tmp_path / "data.npz", x=x, label=np.arange(SAMPLES) % 4)
    return tmp_path


def linear(path: Path, weight: Any) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(np.asarray(weight, np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def gate(folder: Path, *require: str, **settings: Any) -> Evaluation:
    return ndonnx.evaluate(
        folder / "student.onnx", str(folder / "data.npz"), teacher=folder / "teacher.onnx", require=require, **settings
    )


@pytest.mark.parametrize(
    ("text", "measure", "output", "sign", "value"),
    [
        ("agreement>=99%", "agreement", None, ">=", 0.99),
        (" latency <= 0.6 ", "latency", None, "<=", 0.6),
        ("drop<1.5 %", "drop", None, "<", 0.015),
        ("metric>-2e-3", "metric", None, ">", -0.002),
        ("cosine:a/b:0>=0.98", "cosine", "a/b:0", ">=", 0.98),
        ("agreement>=99.9%", "agreement", None, ">=", 0.999),
        ("Accuracy>=1", "accuracy", None, ">=", 1.0),
    ],
)
def test_forms(text: str, measure: str, output: str | None, sign: str, value: float) -> None:
    found = Requirement.parse(text)
    assert (found.measure, found.output, found.sign) == (measure, output, sign)
    assert found.value == value, "to the last bit: a part of the samples must be able to equal it"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("agreement", "expected METRIC>=VALUE"),
        ("agreement=99%", "expected METRIC>=VALUE"),
        ("agreement>=many", "'many'"),
        ("agreement>=nan", "finite"),
        ("speed>=2", "unknown metric 'speed'; known: accuracy"),
        ("agreement>=99", "write 99% for a part"),
        ("agreement>1", "cannot hold"),
        ("accuracy<0", "cannot hold"),
        ("latency<0%", "cannot hold"),
        ("size:y<=0.5", "not told of a single output"),
    ],
)
def test_what_cannot_be_required_is_one_line(text: str, told: str) -> None:
    with pytest.raises(UsageError) as error:
        Requirement.parse(text)
    assert told in str(error.value) and repr(text) in str(error.value) and "\n" not in str(error.value)


@given(st.sampled_from(sorted(MEASURES)), st.sampled_from([">=", "<=", ">", "<"]), st.floats(-2, 2))
def test_what_is_accepted_can_hold(measure: str, sign: str, value: float) -> None:
    try:
        requirement = Requirement.parse(f"{measure}{sign}{value!r}")
    except UsageError:
        return
    range_ = MEASURES[measure]
    assert requirement.holds(range_.high) or requirement.holds(range_.low)


def test_a_measure_that_needs_what_is_not_there_is_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="give --teacher"):
        read_requirements(["size<=0.5"], teacher=False, metric=False)
    with pytest.raises(UsageError, match="--metric MODULE:FUNCTION"):
        read_requirements(["metric>=0"], teacher=True, metric=False)
    assert read_requirements(["accuracy>=0.5"], teacher=False, metric=False)


def test_verdicts_by_hand(models: Path) -> None:
    found = gate(models, "agreement>=95%", "agreement>95%", "accuracy>=0.95", "drop<=5%", "drop<4.9%", "size<=1.0")
    assert found.agreement == found.accuracy == 0.95  # sample 0 alone: 2.7 < 2.9
    assert [verdict.kept for verdict in found.requirements] == [True, False, True, True, False, True]
    assert [verdict.requirement for verdict in found.missed] == ["agreement>95%", "drop<4.9%"]
    assert found.requirements[3].found == pytest.approx(0.05)
    assert found.requirements[0].interval == of_part(0.95, SAMPLES)
    assert "requirements" not in ndonnx.evaluate(models / "student.onnx", str(models / "data.npz")).to_json()


def test_latency_is_a_ratio_to_the_teacher_with_an_interval(models: Path) -> None:
    (verdict,) = gate(models, "latency<=1000", threads=1, processes=2).requirements
    assert verdict.kept and verdict.interval is not None
    assert verdict.interval[0] <= verdict.found <= verdict.interval[1]


def test_of_several_outputs_the_worst_counts() -> None:
    outputs = {"a": OutputFidelity("embedding", cosine=0.9), "b": OutputFidelity("embedding", cosine=0.99)}
    evaluation = Evaluation(10, None, None, 0.1, 1.0, None, outputs=outputs)
    (worst,) = verdicts_of([Requirement.parse("cosine>=0.95")], evaluation, {})
    (named,) = verdicts_of([Requirement.parse("cosine:b>=0.95")], evaluation, {})
    assert (worst.output, worst.found, worst.kept) == ("a", 0.9, False)
    assert (named.output, named.found, named.kept) == ("b", 0.99, True)
    with pytest.raises(UsageError, match=r"'a' \(embedding\)"):
        verdicts_of([Requirement.parse("agreement>=0.5")], evaluation, {})
    with pytest.raises(UsageError, match="of output 'c'"):
        verdicts_of([Requirement.parse("cosine:c>=0.5")], evaluation, {})


def test_a_broken_model_keeps_nothing_and_is_json() -> None:
    evaluation = Evaluation(10, None, None, float("inf"), float("inf"), None)
    (verdict,) = verdicts_of([Requirement.parse("error<=0.1")], evaluation, {})
    assert not verdict.kept and verdict.to_json()["found"] is None


def test_intervals_by_hand() -> None:
    low, high = of_part(0.5, 100)  # Wilson: 0.4038 to 0.5962
    assert (low, high) == (pytest.approx(0.40383, abs=1e-5), pytest.approx(0.59617, abs=1e-5))
    assert of_part(1.0, 10) == (pytest.approx(0.72247, abs=1e-5), pytest.approx(1))
    values = np.array([1.0, 2.0, 4.0])
    reach = 1.959964 * values.std(ddof=1) / np.sqrt(3)
    found = of_mean(values.sum(), (values**2).sum(), 3)
    assert found == (pytest.approx(values.mean() - reach), pytest.approx(values.mean() + reach))
    assert of_mean(1.0, 1.0, 1) is None


def command(folder: Path, *more: str) -> list[str]:
    files = [
        str(folder / "student.onnx"),
        "--teacher",
        str(folder / "teacher.onnx"),
        "--data",
        str(folder / "data.npz"),
    ]
    return ["evaluate", *files, "-q", *more]


def test_exit_codes_and_the_table(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(models, "--require", "agreement>=95%")) == 0
    assert "all requirements kept" in capsys.readouterr().out
    assert main(command(models, "--require", "agreement>=99%", "--require", "size<=1")) == 3
    out = capsys.readouterr().out
    assert "1 of 2 requirements not kept" in out
    (row,) = [line for line in out.splitlines() if line.startswith("agreement>=99%")]
    assert "95.0%" in row and row.endswith("NO")
    assert main(command(models, "--require", "agreement>=99")) == 2
    assert main(command(models, "--junit", str(models / "j.xml"))) == 2
    assert main(command(models, "--require", "cosine>=0.9")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)


def test_json_and_junit_tell_the_same(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models / "gate.xml"
    more = ("--require", "agreement>=99%", "--require", "error<1", "--junit", str(path), "--json")
    assert main(command(models, *more)) == 3
    told = json.loads(capsys.readouterr().out)["metrics"]["requirements"]
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None and (suite.get("tests"), suite.get("failures")) == ("2", "1")
    cases = {case.get("name"): case.find("failure") is None for case in suite.findall("testcase")}
    assert (
        cases == {entry["requirement"]: entry["kept"] for entry in told} == {"agreement>=99%": False, "error<1": True}
    )


def test_junit_survives_hostile_names() -> None:
    verdicts = verdicts_of([Requirement.parse("cosine:a<&\x1b>=0.5")], hostile(), {})
    root = ElementTree.fromstring(junit('m"<\x00&.onnx', verdicts, 1.0))
    (case,) = root.iter("testcase")
    assert case.get("name") == "cosine:a<&\ufffd>=0.5"


def hostile() -> Evaluation:
    return Evaluation(2, None, None, 0.0, 0.0, None, outputs={"a<&\x1b": OutputFidelity("embedding", cosine=1.0)})
