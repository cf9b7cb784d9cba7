"""The far end of Ray: what runs on a node of the cluster. Imported there with nothing heavy, as in `worker.py`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from ndonnx.runtime.executor.base import OnStep
from ndonnx.runtime.executor.moving import Sent, Store, collect, under, unpack
from ndonnx.runtime.executor.worker import give_back, perform

Told = tuple[int, int, float]
"""Step, steps and held-out NMSE of a job."""
Event = tuple[str, int, int, float]
"""The same behind the job's name, or the key of its order."""


@dataclass(frozen=True)
class Order:
    """A job on its way to a node."""

    key: str
    """Names it, and no other order ever."""
    run: str
    """Names the run of which it is one, for the files that its jobs share."""
    packed: bytes
    """By `moving.pack`."""
    files: Sequence[Sent] = ()
    writes: str | None = None
    """Absolute path of the folder that comes back, at home; None: nothing does."""
    gone: Sequence[str] = ()
    """Digests of files that no job of the run reads any more."""
    places: Sequence[str] = ()
    """Folders in which code of the user's own is found at home, and on nodes that have the same folders."""


@dataclass(frozen=True)
class Returned:
    """What a node sends back."""

    message: bytes
    """Pickled `Done` or `RunEnds`."""
    files: dict[str, bytes]
    """Of the folder that the job filled."""
    last: Told | None
    """What the job told last."""
    process: str
    """The node and the process that ran it."""


def make_ready(module: str, places: Sequence[str]) -> None:
    """Import what a job needs where this is called.

    Args:
        module: in which the job's class is found.
        places: folders in which code of the user's own is found.
    """
    sys.path.extend(place for place in places if place not in sys.path)
    import_module(module)


def run_order(order: Order, board: Any) -> Returned:
    """Run a job where this is called, with the files that it reads.

    Args:
        order: the job.
        board: handle of the `Board` to which its steps are told.
    """
    ray: Any = import_module("ray")  # an extra
    sys.path.extend(place for place in order.places if place not in sys.path)
    context = ray.get_runtime_context()
    node, process = context.get_node_id(), context.get_worker_id()
    board.began.remote(order.key, node)
    steps = _Steps(order.key, board)
    try:
        message, files = _in_tree(order, _store(order.run, node), steps, ray.get)
    finally:
        give_back()
    return Returned(message, files, steps.last, f"{node}-{process}")


def _in_tree(
    order: Order, store: Store, on_step: OnStep, fetch: Callable[[Any], Any]
) -> tuple[bytes, dict[str, bytes]]:
    """The job's message, and the files that it wrote."""
    store.drop(order.gone)
    with store.tree(order.files, fetch) as root:
        message = perform(lambda: unpack(order.packed, root), on_step)
        return message, {} if order.writes is None else collect(under(root, order.writes))


@cache
def _store(run: str, node: str) -> Store:
    return Store(run, node)


def clear(run: str, node: str) -> None:
    """Delete what a run has left on this node."""
    _store(run, node).close()
    _store.cache_clear()


class _Steps:
    """Tells a job's steps, and remembers the last."""

    def __init__(self, key: str, board: Any) -> None:
        self.last: Told | None = None
        self._key, self._board = key, board

    def __call__(self, step: int, steps: int, nmse: float) -> None:
        self.last = step, steps, nmse
        self._board.tell.remote((self._key, step, steps, nmse))


class Board:
    """An actor to which all jobs of a run tell their steps, and from which the run takes them."""

    def __init__(self) -> None:
        self._steps: dict[str, Event] = {}
        self._nodes: dict[str, str] = {}
        self._news = asyncio.Event()

    async def began(self, key: str, node: str) -> None:
        """An order has begun on a node."""
        self._nodes[key] = node

    async def node_of(self, key: str) -> str | None:
        """The node on which an order began last."""
        return self._nodes.get(key)

    async def tell(self, event: Event) -> None:
        """A job has come to a step."""
        self._steps[event[0]] = event
        self._news.set()

    async def take(self) -> list[Event]:
        """The newest step of each job that has told one since this was asked for last; waits until there is one."""
        await self._news.wait()
        self._news.clear()
        events, self._steps = list(self._steps.values()), {}
        return events
