"""Runs that go on: what the run directory keeps of an earlier one, how much disk that takes, damage, and kills."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import numpy_helper

from ndonnx.api.compress import compress
from ndonnx.config.recipe import Recipe
from ndonnx.distill.job import DistilJob
from ndonnx.errors import RunDirError, TrainingError
from ndonnx.flow import train
from ndonnx.runtime.executor import Executor, SerialExecutor
from tests.helpers.models import inputs_of, residual_cnn
from tests.helpers.runs import SMALL, UNITS, Bench, Recorder, activations, done_markers, statuses

pytestmark = pytest.mark.usefixtures("one_core")


# Again


def test_the_seed_decides_every_byte(bench: Bench) -> None:
    assert bench.bytes("one") == bench.bytes("two") != bench.bytes("three", seed=1)


def test_a_second_run_uses_what_the_first_one_left(bench: Bench) -> None:
    first = bench.bytes()
    times = {name: path.stat().st_mtime_ns for name, path in done_markers(bench.folder / "run").items()}
    assert times.keys() == UNITS
    recorder = Recorder()
    result = bench.compress(progress=recorder)
    assert bench.student.read_bytes() == first
    assert {name for name, status in statuses(result).items() if status == "reused"} == UNITS
    assert all(n.nmse is not None and n.candidate for n in result.report.neighbourhoods if n.status == "reused")
    assert not {"capture", "distil"} & set(recorder.stages)
    assert result.report.seconds.capture == result.report.seconds.distil == 0
    assert recorder.ends == dict.fromkeys(UNITS, "reused")
    assert {name: path.stat().st_mtime_ns for name, path in done_markers(bench.folder / "run").items()} == times


@pytest.mark.parametrize(
    "change",
    [
        {"keep": 0.25}, {"init": "teacher"}, {"round_to": 4}, {"steps": 7}, {"lr": 0.05}, {"batch_size": 8},
        {"warmup": 0.5}, {"holdout": 0.2}, {"seed": 5}, {"samples": 40}, {"parity": 1e-3}, {"precision": "bf16"},
        {"data": {"scale": 0.5}},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_student_depends_on_trains_it_anew(bench: Bench, change: dict[str, Any]) -> None:
    bench.compress()
    assert {n for n, status in statuses(bench.compress(**change)).items() if status == "distilled"} == UNITS
    assert {n for n, status in statuses(bench.compress()).items() if status == "reused"} == UNITS, "the first ones stay"


@pytest.mark.parametrize("change", [{"workers": 2}, {"executor": "process"}, {"cache_budget": 10**6}], ids=str)
def test_what_a_student_does_not_depend_on_leaves_it_alone(bench: Bench, change: dict[str, Any]) -> None:
    bench.compress()
    assert {n for n, status in statuses(bench.compress(**change)).items() if status == "reused"} == UNITS


def test_other_evaluation_data_leave_the_students_alone(bench: Bench) -> None:
    first = bench.compress()
    np.savez(bench.folder / "eval.npz", **inputs_of(residual_cnn(), 12, seed=9), label=np.arange(12) % 5)  # type: ignore[arg-type]
    result = compress(
        bench.model,
        data=str(bench.data),
        eval_data=str(bench.folder / "eval.npz"),
        output=bench.student,
        run_dir=bench.folder / "run",
        recipe=Recipe(**SMALL),
    )
    assert {n for n, status in statuses(result).items() if status == "reused"} == UNITS
    assert result.report.metrics["student"].samples == 12 != first.report.metrics["student"].samples
    assert result.report.metrics["student"].accuracy is not None and first.report.metrics["student"].accuracy is None


def test_other_data_train_anew(bench: Bench) -> None:
    bench.compress()
    np.savez(bench.data, **inputs_of(residual_cnn(), 48, seed=9))  # type: ignore[arg-type]
    assert {n for n, status in statuses(bench.compress()).items() if status == "distilled"} == UNITS


def test_other_weights_train_anew_even_if_they_lie_beside_the_model(bench: Bench) -> None:
    proto = residual_cnn()
    onnx.save(proto, bench.model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    bench.compress()
    before = bench.model.read_bytes()
    proto = residual_cnn()
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.1), tensor.name))
    (bench.folder / "weights.bin").unlink()
    onnx.save(proto, bench.model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert bench.model.read_bytes() == before
    assert {n for n, status in statuses(bench.compress()).items() if status == "distilled"} == UNITS


def test_one_run_directory_serves_several_widths(bench: Bench) -> None:
    wide, narrow = bench.bytes(keep=0.75), bench.bytes(keep=0.25)
    assert bench.bytes(keep=0.75) == wide != narrow
    assert len(list((bench.folder / "run" / "students").iterdir())) == 6


# The cache budget


SAMPLE = 2 * 8 * 8 * 8
"""Bytes of one value of `residual_cnn` for one sample; a unit needs two of them."""
USED = 44
"""Samples of a run's training: a tenth of 48 is compared on."""
MANIFESTS = 4096
"""Bytes that a store may take for its manifest and its files' headers."""


@pytest.mark.parametrize(("values", "sweeps"), [(4, 1), (3, 2), (2, 3)])
def test_a_small_cache_budget_makes_waves_and_the_same_student(bench: Bench, values: int, sweeps: int) -> None:
    reference = bench.bytes("reference")
    budget, sizes = USED * values * SAMPLE, []
    recorder = Recorder(lambda kind: sizes.append(activations(bench.folder / "run")))
    result = bench.compress(progress=recorder, cache_budget=budget)
    assert recorder.stages.count("capture") == recorder.stages.count("distil") == sweeps
    assert USED * 2 * SAMPLE <= max(sizes) <= budget + MANIFESTS
    assert bench.student.read_bytes() == reference
    assert all(status != "reused" for status in statuses(result).values())


def test_a_budget_below_one_neighbourhood_takes_fewer_samples_and_says_so(bench: Bench) -> None:
    budget, sizes = 20 * 2 * SAMPLE + 100, []
    recorder = Recorder(lambda kind: sizes.append(activations(bench.folder / "run")))
    result = bench.compress(progress=recorder, cache_budget=budget)
    assert max(sizes) <= budget + MANIFESTS
    (note,) = (note for note in recorder.notes if "--cache-budget" in note)
    assert f"holds 20 of {USED} samples" in note
    assert {n for n, status in statuses(result).items() if status == "distilled"} == UNITS


def test_a_chain_of_students_keeps_the_cache_budget(bench: Bench) -> None:
    """In order, what the students before give lies on the disk beside the teacher's exits."""
    reference = bench.bytes("reference", inputs="student")
    image, held = 4 * 3 * 8 * 8, []
    for values, sweeps in ((1, 3), (2, 2), (3, 1)):
        budget = 48 * (image + 2 * SAMPLE + values * SAMPLE)
        recorder = Recorder(lambda kind: held.append(activations(bench.folder / "run")))
        result = bench.compress(progress=recorder, inputs="student", cache_budget=budget)
        assert recorder.stages.count("capture") == sweeps
        assert max(held) <= budget + 4 * MANIFESTS
        assert bench.student.read_bytes() == reference
        assert all(status != "reused" for status in statuses(result).values())
        shutil.rmtree(bench.folder / "run")
        held.clear()


def test_who_stood_behind_one_that_failed_is_trained_again_when_it_does_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = bench.bytes("reference", inputs="student")
    work = DistilJob.__call__

    def failing(job: DistilJob, on_step: Any) -> Any:
        if job.name == "n03":
            raise TrainingError("out of memory")
        return work(job, on_step)

    with monkeypatch.context() as patched:
        patched.setattr(DistilJob, "__call__", failing)
        first = bench.compress(inputs="student")
        again = bench.compress(inputs="student")
    assert {statuses(first)[name] for name in ("n02", "n04")} == {"distilled"} and statuses(first)["n03"] == "kept"
    assert statuses(again)["n04"] == "reused"  # it stands behind the same as before
    last = bench.compress(inputs="student")
    assert {name: statuses(last)[name] for name in sorted(UNITS)} == {
        "n02": "reused",
        "n03": "distilled",
        "n04": "distilled",
    }
    assert bench.student.read_bytes() == reference


def test_what_is_looked_through_decides_whether_a_student_is_used_again(bench: Bench) -> None:
    bench.compress(look_ahead=1)
    assert {statuses(bench.compress(look_ahead=1))[name] for name in UNITS} == {"reused"}
    found = statuses(bench.compress(look_ahead=1, freeze=("unit3",)))
    assert (found["n02"], found["n03"]) == ("reused", "distilled")  # n03 looks as far as the output now


def test_the_activations_are_gone_afterwards_and_nothing_else_is_left(bench: Bench) -> None:
    bench.compress()
    run_dir = bench.folder / "run"
    assert activations(run_dir) == 0 and not list(run_dir.glob("activations/*"))
    files = sorted(
        re.sub(r"-[0-9a-f]{32}", "", str(path.relative_to(run_dir))) for path in run_dir.rglob("*") if path.is_file()
    )
    pictures = [file for file in files if file.startswith("worst/")]
    assert [file for file in files if file not in pictures] == sorted(
        ["lock", "recipe.toml", "report.json"]
        + [f"slices/{name}.onnx" for name in UNITS]
        + [f"students/{name}/{file}" for name in UNITS for file in ("done.json", "student.onnx")]
    )
    assert 0 < len(pictures) <= 8
    assert sorted(path.name for path in bench.folder.iterdir()) == ["data.npz", "run", "student.onnx", "teacher.onnx"]


# Damage, and two at once


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "marker"])
def test_a_damaged_student_is_trained_again(bench: Bench, damage: str) -> None:
    reference = bench.bytes()
    marker = done_markers(bench.folder / "run")["n03"]
    student = marker.with_name("student.onnx")
    data = student.read_bytes()
    if damage == "flipped":
        student.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    elif damage == "cut":
        student.write_bytes(data[:-1])
    elif damage == "gone":
        student.unlink()
    else:
        marker.write_text("{")
    result = bench.compress()
    assert {name: statuses(result)[name] for name in UNITS} == {"n02": "reused", "n03": "distilled", "n04": "reused"}
    assert bench.student.read_bytes() == reference


def test_a_run_that_is_stopped_continues_where_it_was(bench: Bench) -> None:
    reference = bench.bytes("reference")

    def stop(kind: str) -> None:
        if kind == "finished":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.compress(progress=Recorder(stop))
    (done,) = done_markers(bench.folder / "run").values()
    before = done.stat().st_mtime_ns
    recorder = Recorder()
    result = bench.compress(progress=recorder)
    assert sorted(statuses(result).values()) == ["distilled", "distilled", "kept", "kept", "reused"]
    assert done.stat().st_mtime_ns == before
    assert "capture" not in recorder.stages, "the activations were there"
    assert bench.student.read_bytes() == reference
    assert activations(bench.folder / "run") == 0


def test_damaged_activations_are_captured_again(bench: Bench) -> None:
    reference = bench.bytes("reference")

    def stop(kind: str) -> None:
        if kind == "finished":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.compress(progress=Recorder(stop))
    value = next((bench.folder / "run").glob("activations/*/store/*.npy"))
    data = bytearray(value.read_bytes())
    data[-5] ^= 1
    value.write_bytes(data)
    recorder = Recorder()
    bench.compress(progress=recorder)
    assert any("damaged" in note for note in recorder.notes) and "capture" in recorder.stages
    assert bench.student.read_bytes() == reference


class Watching(Executor):
    """Runs jobs one after the other and remembers how many threads each was given."""

    def __init__(self, threads: dict[str, int]) -> None:
        self.threads = threads

    def run(self, jobs: Any, on_step: Any) -> Any:
        def watched() -> Iterator[DistilJob]:
            for job in jobs:
                self.threads[job.name] = job.threads
                yield job

        return SerialExecutor().run(watched(), on_step)

    @property
    def peak_rss_bytes(self) -> int:
        return 0


@pytest.mark.parametrize("workers", [None, 2])
def test_a_continued_run_gives_its_jobs_as_many_threads_as_before(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, workers: int | None
) -> None:
    """The number of threads decides the last bits, so it may not depend on what is left to do."""
    threads: dict[str, int] = {}
    crews: list[int] = []
    monkeypatch.setattr(train, "usable_cores", lambda: 6)

    def watching(kind: str, crew: int, recipe: Recipe) -> Watching:
        crews.append(crew)
        return Watching(threads)

    monkeypatch.setattr(train, "make_executor", watching)
    bench.compress(executor="process", workers=workers, steps=1)
    assert threads == dict.fromkeys(UNITS, 2 if workers is None else 3)
    first = dict(threads)
    threads.clear()
    done_markers(bench.folder / "run")["n03"].unlink()
    bench.compress(executor="process", workers=workers, steps=1)
    assert threads == {"n03": first["n03"]}
    assert len(set(crews)) == 1


def test_two_runs_on_one_directory(bench: Bench) -> None:
    refusals: list[str] = []

    def intrude(kind: str) -> None:
        if kind == "step" and not refusals:
            with pytest.raises(RunDirError) as caught:
                bench.compress()
            refusals.append(str(caught.value))

    result = bench.compress(progress=Recorder(intrude))
    assert re.search(rf"in use by process {os.getpid()} on .*--run-dir", refusals[0])
    assert {n for n, status in statuses(result).items() if status == "distilled"} == UNITS


SCRIPT = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from ndonnx.api.compress import compress
from ndonnx.config.recipe import Recipe
model, data, output, run_dir, recipe = sys.argv[1:]
compress(model, data=data, output=output, run_dir=run_dir, recipe=Recipe.model_validate_json(recipe))
"""


def killed_in_the_middle(bench: Bench, recipe: dict[str, Any]) -> None:
    """A run in a process of its own, killed as soon as its first student is done; tries to enter beside it, too."""
    words = [bench.model, bench.data, bench.student, bench.folder / "run", Recipe(**(SMALL | recipe)).model_dump_json()]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, words)], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        while not done_markers(bench.folder / "run"):
            assert process.poll() is None, "it ended before its first student"
            time.sleep(0.002)
        with pytest.raises(RunDirError, match=f"in use by process {process.pid} "):
            bench.compress(**recipe)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        code = process.wait()
    assert code == -signal.SIGKILL, "it ended before it was killed"
    # Workers notice that their parent is gone, and leave the run directory alone.
    assert not psutil.wait_procs(family, timeout=60)[1]


def continues_after_kill(bench: Bench, units: set[str], **recipe: Any) -> None:
    reference = bench.bytes("reference", **recipe)
    bench.student.unlink()
    killed_in_the_middle(bench, recipe)
    before = {name: path.stat().st_mtime_ns for name, path in done_markers(bench.folder / "run").items()}
    assert before and not bench.student.exists()
    result = bench.compress(**recipe)
    assert {n for n, status in statuses(result).items() if status == "reused"} == set(before)
    after = {name: path.stat().st_mtime_ns for name, path in done_markers(bench.folder / "run").items()}
    assert after.keys() == units and before.items() <= after.items()
    assert bench.student.read_bytes() == reference
    assert activations(bench.folder / "run") == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_killed_run_continues_to_the_same_bytes(bench: Bench) -> None:
    continues_after_kill(bench, UNITS, steps=400)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_killed_run_with_workers_continues_to_the_same_bytes(bench: Bench) -> None:
    bench.put(residual_cnn(5))
    continues_after_kill(bench, UNITS | {"n05", "n06"}, steps=400, executor="process", workers=2)
