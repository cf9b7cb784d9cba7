"""One job after the other in this process: nothing to set up, and a debugger can follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from ndonnx.runtime.executor.base import Executor, Job, OnStepNamed, Outcome, attempt
from ndonnx.runtime.executor.registry import register_executor


class SerialExecutor(Executor):
    """Runs every job in the calling thread."""

    def run(self, jobs: Iterable[Job], on_step: OnStepNamed) -> Iterator[Outcome]:
        for job in jobs:
            yield attempt(job, partial(on_step, job.name))

    @property
    def peak_rss_bytes(self) -> int:
        """0: there are no workers."""
        return 0


@register_executor("serial", "one after the other in this process")
def _serial(workers: int) -> SerialExecutor:
    del workers
    return SerialExecutor()
