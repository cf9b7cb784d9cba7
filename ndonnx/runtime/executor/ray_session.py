"""A connection to a Ray cluster, and the files of this process that went there."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ndonnx.errors import RecipeError, RunDirError, UsageError, first_line
from ndonnx.runtime.executor.moving import Warehouse
from ndonnx.runtime.executor.ray_worker import Board, Order, clear, make_ready, run_order
from ndonnx.runtime.executor.worker import thread_variables
from ndonnx.runtime.machine import usable_cores

_LEAVING = 5.0
"""Seconds that nodes get to delete a run's files."""


class Session:
    """A connection to a cluster, with the files that went there; it lasts as long as this process."""

    _opened: Session | None = None

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self.run = secrets.token_hex(8)
        self.job = ray.get_runtime_context().get_job_id()
        self.warehouse = Warehouse(ray.put)
        self._task = ray.remote(run_order)
        self._ready: dict[tuple[int, int], list[Any]] = {}
        """References of workers that were started before there was a job for them, by threads and number."""
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

    def make_ready(self, module: str, places: Sequence[str], threads: int, workers: int) -> None:
        """Start workers, once of each number, and let them import what a job needs while its files are sent.

        Args:
            module: in which the job's class is found.
            places: folders in which code of the user's own is found.
            threads: of a job.
            workers: that many.
        """
        if (threads, workers) not in self._ready:
            task = self.ray.remote(make_ready).options(**self._demands(threads), scheduling_strategy="SPREAD")
            self._ready[threads, workers] = [task.remote(module, places) for _ in range(workers)]

    def submit(self, order: Order, threads: int, gpus: float, avoided: Sequence[str]) -> Any:
        """Start a job, if possible not on these nodes; the reference of what it will return."""
        return self._task.options(
            **self._demands(threads),
            num_gpus=gpus,
            scheduling_strategy=self._elsewhere(avoided) if avoided else "SPREAD",
        ).remote(order, self._board)

    def _demands(self, threads: int) -> dict[str, Any]:
        """What a task of so many threads asks of Ray, which retries nothing."""
        return {
            "num_cpus": min(threads, max(self.cores, default=1)),
            "max_retries": 0,
            "runtime_env": {"env_vars": thread_variables(threads)},
        }

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
