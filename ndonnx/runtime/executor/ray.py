"""Jobs on the machines of a Ray cluster, which need not see the run directory.

Files that jobs read go into Ray's object store once, and from there once to each node (`moving.py`); what a job wrote
comes back with its outcome. A job whose worker or node dies is started again, elsewhere where there is such a place.
Ray itself retries nothing: it would never tell how often a job has taken its worker with it.
"""

from __future__ import annotations

import os
import pickle
import secrets
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ndonnx.config.execution import Execution
from ndonnx.errors import RunDirError, first_line
from ndonnx.runtime.executor.base import Demands, Executor, Job, MovableJob, OnStepNamed, Outcome
from ndonnx.runtime.executor.moving import pack, put_down
from ndonnx.runtime.executor.ray_session import Session
from ndonnx.runtime.executor.ray_worker import Event, Order, Returned
from ndonnx.runtime.executor.registry import register_configured
from ndonnx.runtime.executor.worker import Done, RunEnds
from ndonnx.runtime.faults import Fault, fault_of

ATTEMPTS = 3
"""Times that a job is started before it ends as lost."""


def machines(execution: Execution) -> list[int]:
    """Cores of each node of the cluster.

    Raises:
        UsageError: there is no such cluster.
    """
    return Session.open(execution.ray_address).cores


def check(execution: Execution) -> None:
    """Refuse a cluster that is not there.

    Raises:
        UsageError: there is none, or Ray is not installed.
    """
    Session.open(execution.ray_address)


@register_configured("ray", "on the nodes of a Ray cluster", check=check, machines=machines)
class RayExecutor(Executor):
    """Runs up to `workers` jobs at the same time, each as a task that asks for its threads as CPUs."""

    def __init__(self, workers: int, execution: Execution) -> None:
        self._workers = workers
        self._session = Session.open(execution.ray_address)
        self._peaks: dict[str, int] = {}

    @property
    def peak_rss_bytes(self) -> int:
        """The sum of the largest peaks of as many worker processes as there are jobs at a time, in bytes."""
        return sum(sorted(self._peaks.values())[-self._workers :])

    def run(self, jobs: Iterable[Job], on_step: OnStepNamed) -> Iterator[Outcome]:
        waiting, shift = iter(jobs), _Shift(self._session, self._workers, self._peaks)
        try:
            yield from shift.fill(waiting)
            while shift.busy:
                steps, ended = shift.listen()
                for step in steps:
                    on_step(*step)
                yield from [*ended, *shift.fill(waiting)]
        finally:
            shift.cancel()


@dataclass
class _Task:
    """A job on the cluster, seen from here."""

    name: str
    order: Order
    demands: Demands = field(default_factory=Demands)
    writes: Path | None = None
    losses: int = 0
    avoided: list[str] = field(default_factory=list)
    """Nodes on which it was lost."""


class _Shift:
    """The jobs of one `run`, of which so many are on the cluster at a time."""

    def __init__(self, session: Session, workers: int, peaks: dict[str, int]) -> None:
        self._session, self._workers, self._peaks = session, workers, peaks
        self._running: dict[Any, _Task] = {}
        self._ahead: _Task | None = None
        """The next one, whose files are sent while the others run."""
        self._gone = session.warehouse.forget_deleted()

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def fill(self, waiting: Iterator[Job]) -> list[Outcome]:
        """Start jobs until there are enough, and send what the next one reads.

        Returns:
            Outcomes of jobs that cannot be sent.
        """
        unsent: list[Outcome] = []
        while len(self._running) < self._workers and (task := self._ahead or self._sent(waiting, unsent)) is not None:
            self._ahead = None
            try:
                self._start(task)
            except Exception as error:  # of Ray's
                unsent.append(Outcome(task.name, None, fault_of(error)))
        self._ahead = self._ahead or self._sent(waiting, unsent)
        return unsent

    def _sent(self, waiting: Iterator[Job], unsent: list[Outcome]) -> _Task | None:
        """The next job that can be sent, with its files on the way; None when there is none left."""
        for job in waiting:
            try:
                return self._task(job)
            except Exception as error:  # as many as there are ways to write a job
                unsent.append(Outcome(job.name, None, fault_of(error)))
        return None

    def listen(self) -> tuple[list[Event], list[Outcome]]:
        """Wait until something happens: steps that jobs of this run have told, and how some have ended."""
        ready = self._session.wait(self._running)
        names = {task.order.key: task.name for task in self._running.values()}
        steps = [(names[key], *step) for key, *step in self._session.news() if key in names]
        ended = []
        for task, reference in [(self._running.pop(reference), reference) for reference in ready]:
            try:
                returned = self._session.ray.get(reference)
            except self._session.ray.exceptions.RayError as error:
                ended += self._lost(task, error)
            else:
                steps += [] if returned.last is None else [(task.name, *returned.last)]
                ended += self._returned(task, returned)
        return steps, ended

    def cancel(self) -> None:
        """Stop whatever still runs."""
        for reference in self._running:
            self._session.ray.cancel(reference, force=True)
        self._running.clear()

    def _task(self, job: Job) -> _Task:
        places = [os.path.abspath(place) for place in (*sys.path, os.curdir)]
        order = Order(secrets.token_hex(8), self._session.run, pack(job), gone=self._gone, places=places)
        if not isinstance(job, MovableJob):
            return _Task(job.name, order)
        if not job.demands.cuda:  # a card is not to be held by who has no job for it
            self._session.make_ready(type(job).__module__, places, job.demands.threads, self._workers)
        writes = job.writes.absolute()
        order = replace(order, files=self._session.send(job.reads), writes=str(writes))
        return _Task(job.name, order, job.demands, writes)

    def _start(self, task: _Task) -> None:
        share = self._session.gpus / self._workers if task.demands.cuda else 0
        self._running[self._session.submit(task.order, task.demands.threads, min(1, share), task.avoided)] = task

    def _returned(self, task: _Task, returned: Returned) -> list[Outcome]:
        """How a job ended; nothing where it is started again."""
        try:
            message = pickle.loads(returned.message)
        except Exception as error:  # a result of a job's own making
            return [Outcome(task.name, None, fault_of(error))]
        self._peaks[returned.process] = max(self._peaks.get(returned.process, 0), message.peak_rss)
        match message:
            case RunEnds(ending):
                return self._lost(task, ending)  # the disk of a node, not of this machine
            case Done(outcome):
                if task.writes is not None and outcome.fault is None:
                    put_down(returned.files, task.writes)
                return [replace(outcome, name=task.name)]
        raise AssertionError(message)

    def _lost(self, task: _Task, error: Exception) -> list[Outcome]:
        """Start a job again whose worker or node is gone, or end it where that has happened too often."""
        error = self._session.cause(error)
        task.losses += 1
        if task.losses < ATTEMPTS:
            task.avoided += self._session.node_of(task.order)
            self._start(task)
            return []
        if isinstance(error, RunDirError):
            raise error
        reason = (
            f"lost {task.losses} times with the worker or node that ran it ({first_line(error)}); "
            "use a smaller --batch-size, or nodes with more memory"
        )
        return [Outcome(task.name, None, Fault(reason, foreseen=False))]
