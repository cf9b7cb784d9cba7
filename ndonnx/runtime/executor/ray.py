"""Jobs on the machines of a Ray cluster, which need not see the run directory.

Files that jobs read go into Ray's object store once, and from there once to each node (`moving.py`); what a job wrote
comes back with its outcome. A job whose worker or node dies is started again, elsewhere where there is such a place.
Ray itself retries nothing: it would never tell how often a job has taken its worker with it.
"""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import secrets
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ndonnx.config.execution import Execution
from ndonnx.errors import RecipeError, RunDirError, UsageError, first_line
from ndonnx.runtime.executor.base import Demands, Executor, Job, MovableJob, OnStepNamed, Outcome
from ndonnx.runtime.executor.moving import Warehouse, pack, put_down
from ndonnx.runtime.executor.ray_worker import Board, Event, Order, Returned, clear, run_order
from ndonnx.runtime.executor.registry import register_configured
from ndonnx.runtime.executor.worker import Done, RunEnds, thread_variables
from ndonnx.runtime.faults import Fault, fault_of
from ndonnx.runtime.machine import usable_cores

ATTEMPTS = 3
"""Times that a job is started before it ends as lost."""
_LEAVING = 5.0
"""Seconds that nodes get to delete a run's files."""


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
        self._gone = session.warehouse.forget_deleted()

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def fill(self, waiting: Iterator[Job]) -> list[Outcome]:
        """Start jobs until there are enough; the outcomes of those that cannot be sent."""
        unsent: list[Outcome] = []
        while len(self._running) < self._workers and (job := next(waiting, None)) is not None:
            try:
                self._start(self._task(job))
            except Exception as error:  # as many as there are ways to write a job
                unsent.append(Outcome(job.name, None, fault_of(error)))
        return unsent

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


class Session:
    """A connection to a cluster, with the files that went there; it lasts as long as this process."""

    _opened: Session | None = None

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self.run = secrets.token_hex(8)
        self.job = ray.get_runtime_context().get_job_id()
        self.warehouse = Warehouse(ray.put)
        self._task = ray.remote(run_order)
        self._board = ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()
        self._news = self._board.take.remote()
        atexit.register(self._leave)

    @classmethod
    def open(cls, address: str | None) -> Session:
        """The session of this process; a program that has connected to Ray itself is not connected once more.

        Args:
            address: of the cluster, as Ray writes it. None: what `RAY_ADDRESS` says, else the one that runs on this
                machine, else one that is started here and ends with this process.

        Raises:
            UsageError: there is no such cluster, or Ray is not installed.
        """
        ray = _ray()
        if not ray.is_initialized():
            _connect(ray, address or os.environ.get("RAY_ADDRESS"))
        if cls._opened is None or cls._opened.job != ray.get_runtime_context().get_job_id():
            cls._opened = cls(ray)
        return cls._opened

    @property
    def cores(self) -> list[int]:
        """Cores of each node that has any."""
        return [cores for node in self._nodes() if (cores := int(node["Resources"].get("CPU", 0)))]

    @property
    def gpus(self) -> float:
        """Graphics cards of all nodes."""
        return float(sum(node["Resources"].get("GPU", 0) for node in self._nodes()))

    def send(self, files: Sequence[Path]) -> list[Any]:
        """Put what has not been put into the object store.

        Raises:
            RunDirError: the store is full, and so is the disk that it spills to.
        """
        full = self.ray.exceptions
        try:
            return list(self.warehouse.send(files))
        except (full.ObjectStoreFullError, full.OutOfDiskError) as error:
            raise RunDirError(
                f"Ray's object store is full ({first_line(error)}); lower --cache-budget, or start Ray with more"
            ) from error

    def submit(self, order: Order, threads: int, gpus: float, avoided: Sequence[str]) -> Any:
        """Start a job, if possible not on these nodes; the reference of what it will return."""
        return self._task.options(
            num_cpus=min(threads, max(self.cores, default=1)),
            num_gpus=gpus,
            max_retries=0,
            runtime_env={"env_vars": thread_variables(threads)},
            scheduling_strategy=self._elsewhere(avoided) if avoided else "SPREAD",
        ).remote(order, self._board)

    def wait(self, running: Iterable[Any]) -> list[Any]:
        """Wait until one of these has ended, or a job has told a step; those that have ended."""
        references = [*running, self._news]
        self.ray.wait(references)
        ready, _ = self.ray.wait(references, num_returns=len(references), timeout=0)
        return [reference for reference in ready if reference is not self._news]

    def news(self) -> list[tuple[Any, ...]]:
        """Steps that have been told since, none where nothing is known."""
        ready, _ = self.ray.wait([self._news], timeout=0)
        if not ready:
            return []
        told, self._news = self._news, self._board.take.remote()
        try:
            return list(self.ray.get(told))
        except self.ray.exceptions.RayError:  # its node is gone; it starts anew on another
            return []

    def node_of(self, order: Order) -> list[str]:
        """The node that an order began on last, if that is known."""
        try:
            node = self.ray.get(self._board.node_of.remote(order.key), timeout=_LEAVING)
        except self.ray.exceptions.RayError:
            return []
        return [] if node is None else [node]

    def cause(self, error: Exception) -> Exception:
        """What was raised on the node, where something was raised there.

        Raises:
            UsageError: nodes of this cluster cannot run jobs at all.
        """
        found = getattr(error, "cause", None)
        if isinstance(found, ImportError) or isinstance(error, self.ray.exceptions.RuntimeEnvSetupError):
            raise UsageError(
                f"--executor ray: a node cannot run jobs: {first_line(found or error)}; "
                "install the same ndonnx-compress[ray] on every node"
            ) from error
        return found if isinstance(found, Exception) else error

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _elsewhere(self, avoided: Sequence[str]) -> Any:
        strategies = import_module("ray.util.scheduling_strategies")
        return strategies.NodeLabelSchedulingStrategy({}, soft={_NODE_LABEL: strategies.NotIn(*avoided)})

    def _leave(self) -> None:
        """Let the nodes delete what they hold."""
        with suppress(Exception):  # the process ends anyway, and what is left behind goes with the next run
            on = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
            env = {"env_vars": thread_variables(1)}
            task = self.ray.remote(clear).options(num_cpus=0, max_retries=0, runtime_env=env)
            nodes = [node["NodeID"] for node in self._nodes()]
            sent = [task.options(scheduling_strategy=on(node, soft=False)).remote(self.run, node) for node in nodes]
            self.ray.wait(sent, num_returns=len(sent), timeout=_LEAVING)


_NODE_LABEL = "ray.io/node-id"
"""Label under which Ray keeps the name of each node."""


@cache
def _ray() -> Any:
    """The package.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        return import_module("ray")
    except ImportError as error:
        raise RecipeError(
            f"recipe: 'executor' = 'ray': Ray cannot be imported ({first_line(error)}); "
            "pip install 'ndonnx-compress[ray]', or use --executor process"
        ) from error


def _connect(ray: Any, address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            _reach(address)
            ray.init(address, **quiet)
            return
        with suppress(ConnectionError):
            ray.init("auto", **quiet)
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=usable_cores(), include_dashboard=False, **quiet)
    except Exception as error:  # Ray raises many kinds, its plain base among them
        raise UsageError(
            f"--executor ray: no Ray cluster at {address or 'this machine'}: {first_line(error)}; start one with "
            "`ray start --head`, and give its address with --ray-address or RAY_ADDRESS"
        ) from error


def _reach(address: str) -> None:
    """See that somebody listens there; Ray itself would try for many minutes.

    Raises:
        OSError: nobody does.
        ValueError: it is no HOST:PORT, with or without `ray://`.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError("expected HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), _REACHED_WITHIN).close()


_REACHED_WITHIN = 10.0
"""Seconds."""
