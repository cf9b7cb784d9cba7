"""Jobs on a real Ray cluster of several nodes of this machine: the same students, whoever dies."""

from __future__ import annotations

import os
import signal
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

pytestmark = pytest.mark.slow
_STORE = 80 * 2**20
"""Bytes of a node's object store."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with two cores and two nodes with one each."""
    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": _STORE, "include_dashboard": False},
    )
    for _ in range(2):
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
