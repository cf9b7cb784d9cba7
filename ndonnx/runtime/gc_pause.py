"""Python's cyclic garbage collector, set aside while a graph is read or taken apart.

A graph of many nodes is millions of objects that all stay, and every sweep of the collector looks at all of
them again: half of the time that loading and partitioning 20,000 nodes took.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Let no cyclic garbage be collected for a while; also a decorator. Nested, the outermost one counts."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
