"""Jobs on a real Ray cluster of several nodes of this machine: the same students, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="pip install 'ndonnx-compress[ray]'")

import ray
from ray.cluster_utils import Cluster

from ndonnx.runtime.executor import Demands, MovableJob, OnStep, Outcome, make_executor
from ndonnx.runtime.executor.ray import _Shift
from tests.helpers.models import residual_cnn
from tests.helpers.runs import UNITS, Bench, Recorder, statuses
from tests.helpers.searches import searched

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_core")]
_STORE = 80 * 2**20
"""Bytes of a node's object store."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes with a core each, and one for this process alone."""
    head = {"num_cpus": 0, "object_store_memory": _STORE, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(3):
        found.add_node(num_cpus=1, object_store_memory=_STORE)
    ray.init(found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


@dataclass(frozen=True)
class Copy(MovableJob):
    """Copies a file into its folder."""

    name: str
    source: Path
    target: Path

    @property
    def reads(self) -> list[Path]:
        return [self.source]

    @property
    def writes(self) -> Path:
        return self.target

    @property
    def demands(self) -> Demands:
        return Demands()

    def __call__(self, on_step: OnStep) -> str:
        self.target.mkdir(parents=True)
        (self.target / "copy").write_bytes(self.source.read_bytes())
        on_step(3, 3, 0.5)
        return str(self.source)


def test_a_job_finds_its_files_and_brings_back_what_it_wrote(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"values" * 1000)
    steps: list[Any] = []
    jobs = [Copy(f"copy {n}", tmp_path / "source", tmp_path / f"target{n}") for n in range(4)]
    outcomes = list(make_executor("ray", 4).run(jobs, lambda *step: steps.append(step)))
    assert {outcome.name for outcome in outcomes} == {job.name for job in jobs}
    assert [outcome.fault for outcome in outcomes] == [None] * 4
    assert str(tmp_path / "source") not in {outcome.result for outcome in outcomes}
    assert all((job.target / "copy").read_bytes() == b"values" * 1000 for job in jobs)
    assert {step[0] for step in steps} == {job.name for job in jobs} and steps[-1][1:] == (3, 3, 0.5)


@dataclass(frozen=True)
class Die:
    """Takes its worker with it so many times, then says how many times it has been started."""

    name: str
    log: str
    times: int

    def __call__(self, on_step: OnStep) -> int:
        with open(self.log, "a+", encoding="utf-8") as log:
            log.write(f"{ray.get_runtime_context().get_node_id()}\n")
            log.seek(0)
            started = len(log.read().splitlines())
        if started <= self.times:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return started


def _outcomes(jobs: list[Any], workers: int = 2) -> dict[str, Outcome]:
    outcomes = make_executor("ray", workers).run(jobs, lambda *_: None)
    return {outcome.name: outcome for outcome in outcomes}


def test_a_worker_that_dies_is_replaced_elsewhere_and_one_that_dies_always_ends_alone(
    cluster: Cluster, tmp_path: Path
) -> None:
    twice, always = (Die(name, str(tmp_path / name), times) for name, times in (("twice", 2), ("always", 99)))
    (tmp_path / "source").write_bytes(b"values")
    copy = Copy("copy", tmp_path / "source", tmp_path / "target")
    ended = _outcomes([twice, always, copy], workers=3)
    assert ended["twice"].result == 3 and ended["copy"].fault is None
    nodes = (tmp_path / "twice").read_text(encoding="utf-8").splitlines()
    assert len(set(nodes)) > 1, "the second and third time on other nodes"
    fault = ended["always"].fault
    assert fault is not None and not fault.foreseen and fault.reason.startswith("lost 3 times with the worker")


def test_a_node_is_killed_and_the_students_bytes_are_those_of_processes(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []
    end = _Shift._lost
    monkeypatch.setattr(_Shift, "_lost", lambda self, task, error: lost.append(task.name) or end(self, task, error))
    nodes = [node for node in cluster.list_all_nodes() if not node.head]

    def kill(kind: str) -> None:
        if kind == "step" and nodes:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.clear()

    bench = Bench(tmp_path).put(residual_cnn())
    settings = {"steps": 1500, "finetune_steps": 3, "workers": 3}
    result = bench.compress("cluster", Recorder(kill), executor="ray", **settings)
    assert {name for name, status in statuses(result).items() if status == "distilled"} == UNITS
    assert len(lost) == 1, "the job of the node that died, and no other"
    student = bench.student.read_bytes()
    assert bench.bytes("processes", executor="process", **settings) == student
    cluster.add_node(num_cpus=1, object_store_memory=_STORE)


def test_a_search_and_a_run_by_error_budgets_are_the_same_on_it(cluster: Cluster, tmp_path: Path) -> None:
    students = {}
    for executor in ("ray", "process"):
        bench = Bench(tmp_path / executor)
        bench.folder.mkdir()
        bench.put(residual_cnn(), 160)
        searched(bench.folder, executor=executor, workers=3)
        _budgets(bench.folder / "budgets.json")
        bench.compress("budgeted", executor=executor, workers=3, threshold=str(bench.folder / "budgets.json"))
        students[executor] = {
            path.parent.name: path.read_bytes() for path in sorted(bench.folder.glob("*/students/*/student.onnx"))
        }
    assert len(students["ray"]) == 12 and students["ray"] == students["process"]


def _budgets(path: Path) -> None:
    """What `ndonnx threshold` found, cut down to what is read."""
    entries = [{"name": name, "nmse": 0.5, "largest": 2.0} for name in sorted(UNITS)]
    found = {"max_drop": 0.01, "metric": "agreement", "tolerances": entries, "student_tolerances": []}
    path.write_text(json.dumps(found), encoding="utf-8")


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(residual_cnn())
    command = [sys.executable, "-c", "import sys; from ndonnx_cli.main import main; sys.exit(main())", "compress"]
    files = [str(bench.model), "--data", str(bench.data), "--executor", "ray", "--ray-address", "127.0.0.1:9", "-q"]
    ended = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: --executor ray: no Ray cluster at 127.0.0.1:9: ")
