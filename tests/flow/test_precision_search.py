"""Precision as a part of the search: chosen bits are what the file holds, measured as a whole, and found again."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from ndonnx.api.compress import CompressResult
from ndonnx.errors import SearchError
from ndonnx.flow.composed import Composed, Corrections, everywhere_in_bits
from ndonnx.select import TEACHER, Choice, Option, Table, bits_of, nearest, solve
from ndonnx_cli.main import main
from tests.helpers.models import inputs_of, residual_cnn, run
from tests.helpers.runs import Bench, Recorder
from tests.helpers.searches import compressed, markers, searched

pytestmark = pytest.mark.usefixtures("one_core")

SEARCH = {"candidates": ("width 0.5",), "steps": 2, "samples": 32}


def put(folder: Path) -> Path:
    """A residual network that is large enough for 8 bits to make it smaller, and data for it."""
    model = residual_cnn(units=2, channels=32)
    onnx.save(model, folder / "teacher.onnx")
    np.savez(folder / "data.npz", **inputs_of(model, 160))  # type: ignore[arg-type]
    return folder


def reached(result: CompressResult, cost: str) -> float:
    assert result.report.target is not None
    return result.report.target.reached[cost]


# The file


def held_bits(path: Path) -> dict[str, int]:
    """Bits of the weight that each convolution of a file reads, by the value that it makes."""
    model = onnx.load(path)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    reads = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    convolutions = (node for node in model.graph.node if node.op_type == "Conv")
    return {
        node.output[0]: 8 if kinds[reads.get(node.input[1], node.input[1])] == TensorProto.INT8 else 32
        for node in convolutions
    }


def test_a_size_is_reached_by_bits_and_the_chosen_bits_are_what_the_file_holds(tmp_path: Path) -> None:
    result = compressed(put(tmp_path), target=("size=0.45",), bits=8, search=SEARCH)
    report, student = result.report, tmp_path / "student.onnx"
    assert report.target is not None and report.target.missed is None
    assert student.stat().st_size <= 0.45 * (tmp_path / "teacher.onnx").stat().st_size
    assert reached(result, "size") == student.stat().st_size / (tmp_path / "teacher.onnx").stat().st_size
    bits = {n.name: n.bits for n in report.neighbourhoods}
    assert {8, 32}.issuperset(bits.values()) and 8 in bits.values()
    units = {f"{place}{unit}": f"n0{unit + 1}" for unit in (1, 2) for place in ("first", "second")}
    found = held_bits(student)
    assert {value: found[value] for value in units} == {value: bits[name] for value, name in units.items()}
    assert report.quantised is not None and report.quantised.reason is None
    answers = run(onnx.load(student), inputs_of(residual_cnn(units=2, channels=32), 4))
    assert np.isfinite(answers["logits"]).all()


def test_what_is_not_chosen_runs_in_float(tmp_path: Path) -> None:
    """Between two pieces in 8 bits onnxruntime would quantise a convolution by itself."""
    put(tmp_path)
    names = ("width 0.5", "int8")
    result = compressed(tmp_path, target=("size=0.8",), search=SEARCH | {"candidates": names})
    bits = {n.name: n.bits for n in result.report.neighbourhoods}
    assert result.report.quantised is not None and 8 in bits.values()
    in_float = sum(held == 32 for held in held_bits(tmp_path / "student.onnx").values())
    dense = 1  # the classifier
    told = result.report.quantised
    assert told.float_nodes is not None and told.float_nodes >= in_float
    assert (told.quantised_nodes or 0) + told.float_nodes == 5 + dense


def test_candidates_of_a_search_in_8_bits_are_derived_and_not_trained(tmp_path: Path) -> None:
    put(tmp_path)
    planned = searched(tmp_path, dry_run=True, bits=8, search=SEARCH).report.options
    assert {o.candidate: o.status for o in planned} == {
        "width 0.5": "missing", "width 0.5 + int8": "derived", "int8": "derived",
    }  # fmt: skip
    report = searched(tmp_path, bits=8, output="out", pareto=2, search=SEARCH).report
    assert len(markers(tmp_path)) == 2, "one training for each unit"
    costs = {(o.neighbourhood, o.candidate): o.costs for o in report.options}
    for name in ("n02", "n03"):
        assert costs[name, "width 0.5 + int8"]["size"] < 0.5 * costs[name, "width 0.5"]["size"]
        assert costs[name, "width 0.5 + int8"]["params"] == costs[name, "width 0.5"]["params"]
    assert all(o.drop is not None and math.isfinite(o.drop) for o in report.options if o.status == "derived")
    names = {o.candidate for o in report.options}
    assert all(set(s.candidates.values()) <= {TEACHER, *names} for s in report.students)
    uniform = [s for s in report.students if s.source == "uniform"]
    assert {s.name for s in uniform} >= {"width 0.5", "width 0.5 + int8"}
    by_name = {s.name: s for s in uniform}
    assert by_name["width 0.5 + int8"].bytes < by_name["width 0.5"].bytes  # type: ignore[operator]
    assert (tmp_path / "out" / "search.png").exists()
    recorder = Recorder()
    again = searched(tmp_path, recorder, bits=8, output="out", pareto=2, search=SEARCH).report
    assert not {"capture", "distil", "calibrate", "held-out", "measure", "quantise"} & set(recorder.stages)
    assert [s.candidates for s in again.students] == [s.candidates for s in report.students]


def test_a_target_in_8_bits_that_is_not_met_is_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(put(tmp_path))
    (tmp_path / "r.toml").write_text('bits = 8\n[search]\ncandidates = "width 0.5"\nsteps = 1\nsamples = 32\n')
    given = ("compress", "teacher.onnx", "--data", "data.npz", "--recipe", "r.toml", "--steps", "1", "--samples", "64")
    assert main([*given, "--finetune-steps", "0", "--executor", "serial", "-q", "--target", "size=0.05"]) == 3
    told = capsys.readouterr()
    assert told.err.startswith("target missed: ") and told.err.count("\n") == 1 and "size" in told.err
    assert "bits" in told.out and 8 in held_bits(tmp_path / "teacher-student.onnx").values()


def test_a_promised_drop_holds_for_the_student_in_8_bits(tmp_path: Path) -> None:
    result = compressed(put(tmp_path), max_drop="30%", bits=8, search=SEARCH | {"attempts": 1})
    target = result.report.target
    assert target is not None and target.missed is None and target.bound is not None and target.bound <= 0.3


def test_nothing_to_quantise_is_one_line_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--candidates", "int8 + int8"], ["--candidates", "width 0.5 + int4"]):
        assert main(["search", str(put(tmp_path) / "teacher.onnx"), "--data", str(tmp_path / "data.npz"), *words]) == 2
        assert "int8" in capsys.readouterr().err.strip().splitlines()[-1]


def test_bits_and_a_time_budget(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(residual_cnn(units=2, channels=32), 160)
    report = bench.compress(bits=8, time_budget=4, keep=0.5).report
    assert report.quantised is not None and report.quantised.reason is None
    assert {n.bits for n in report.neighbourhoods} <= {8, 32, None}
    assert 8 in held_bits(bench.student).values()


# Corrections


def table(rounding: float = 0.4) -> Table:
    """Two neighbourhoods, of which 8 bits are predicted to lose more than half the width does."""

    def options(name: str) -> Iterator[Option]:
        yield Option(name, TEACHER, {"size": 100.0}, 0.0)
        yield Option(name, "width 0.5", {"size": 50.0}, 0.3)
        yield Option(name, "int8", {"size": 50.0}, rounding, rounding)
        yield Option(name, "width 0.5 + int8", {"size": 25.0}, 0.3 + rounding, rounding)

    return Table([*options("n1"), *options("n2")])


def real(choice: Choice) -> Composed:
    """What choices come to: 8 bits lose a tenth of what was predicted, and save as predicted."""
    names = list(choice.candidates.values())
    in_float = sum(0.3 for name in names if name.startswith("width"))
    bits = sum(0.04 for name in names if bits_of(name) < 32)
    return Composed(in_float + bits, in_float, choice.totals["size"], 1.0)


def chosen(shares: dict[str, float], attempts: int = 3) -> tuple[Choice, Composed]:
    bounds = table().bounds(shares)
    return Corrections(shares, real, attempts).best(
        table(), lambda t: solve(t, bounds=bounds), lambda t: nearest(t, bounds), [everywhere_in_bits(table())]
    )


def test_a_wrong_prediction_is_corrected_by_the_composed_student() -> None:
    predicted = solve(table(), bounds=table().bounds({"size": 0.5}))
    assert set(predicted.candidates.values()) == {"width 0.5"}, "by prediction 8 bits are the worse half"
    choice, found = chosen({"size": 0.5})
    assert set(choice.candidates.values()) == {"int8"} and found.loss == pytest.approx(0.08)
    mixed, found = chosen({"size": 0.375})
    assert sorted(mixed.candidates.values()) == ["int8", "width 0.5 + int8"] and found.loss == pytest.approx(0.38)


def test_a_choice_over_its_target_is_measured_and_left() -> None:
    """Bytes that the prediction does not know of push a choice over its target; the next one is within."""
    shares = {"size": 0.75}

    def heavier(choice: Choice) -> Composed:
        found = real(choice)
        return Composed(found.loss, found.loss_in_float, 200 - 0.8 * (200 - found.size), 1.0)

    corrections = Corrections(shares, heavier, 3)
    bounds = table().bounds(shares)
    choice, found = corrections.best(table(), lambda t: solve(t, bounds=bounds), lambda t: nearest(t, bounds))
    assert found.size <= 150 < heavier(solve(table(), bounds=bounds)).size
    assert corrections.over(table(), found) <= 1 and choice.totals["size"] < 150


def test_no_choice_at_all_is_told_and_what_cannot_be_had_is_never_best() -> None:
    with pytest.raises(SearchError, match="size"):
        chosen({"size": 0.2})
    gone = Composed(math.inf, 0.3, math.inf, math.inf)
    assert Composed.of_json(gone.to_json()) == gone

    def broken(choice: Choice) -> Composed:
        return gone if "int8" in choice.candidates.values() else real(choice)

    bounds = table(0.1).bounds({"size": 0.5})
    uniform = table(0.1).uniform("width 0.5")
    best, _ = Corrections({"size": 0.5}, broken, 1).best(
        table(0.1), lambda t: solve(t, bounds=bounds), lambda t: nearest(t, bounds), [uniform]
    )
    assert best == uniform


# Interrupted


CODE = """
import sys
from pathlib import Path
from tests.conftest import COUNTING
from tests.flow.test_precision_search import SEARCH
from tests.helpers.searches import compressed
for module in COUNTING:
    module.usable_cores = lambda: 1
compressed(Path(sys.argv[1]), target=("size=0.45",), bits=8, search=SEARCH)
"""


@pytest.mark.slow
def test_a_killed_search_keeps_what_it_has_measured(tmp_path: Path) -> None:
    put(tmp_path)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    kinds = ("slices-in-bits", "composed-choices")
    for kind in kinds:
        running = subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path)], env=env)
        while running.poll() is None and not list((tmp_path / "run").glob(f"{kind}/*/done.json")):
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
    done = {path: path.stat().st_mtime_ns for kind in kinds for path in (tmp_path / "run").glob(f"{kind}/*/done.json")}
    assert done and not (tmp_path / "student.onnx").exists()
    first = compressed(tmp_path, target=("size=0.45",), bits=8, search=SEARCH)
    assert all(path.stat().st_mtime_ns == before for path, before in done.items()), "nothing is measured again"
    bytes_ = (tmp_path / "student.onnx").read_bytes()
    again = compressed(tmp_path, target=("size=0.45",), bits=8, search=SEARCH)
    assert (tmp_path / "student.onnx").read_bytes() == bytes_ and again.report.quantised == first.report.quantised
