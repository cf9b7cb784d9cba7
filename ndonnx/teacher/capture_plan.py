"""Which neighbourhoods are captured together: in as few and as even sweeps as the cache budget allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ndonnx.data import DataSource
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.runtime.progress import Estimate, Progress
from ndonnx.teacher.batches import value_bytes


@dataclass
class CapturePlan:
    """Sweeps of the teacher, each for some of the neighbourhoods.

    It depends on the recipe alone, not on what is done, so that a continued run captures the same.
    """

    parts: Partition
    source: DataSource
    budget: int
    """Bytes of activations on the disk at a time."""
    wanted: Callable[[Iterable[Neighbourhood]], list[str]]
    """Names of the values to capture for neighbourhoods."""
    progress: Progress
    beside: int = 0
    """Bytes of one sample that lie on the disk in any sweep."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of one sample of each value in the store, known once there is a plan."""

    def plan(self, samples: int) -> tuple[int, list[list[Neighbourhood]]]:
        """As many of the samples as the budget holds, and the sweeps."""
        open_ = self.parts.trained
        self.sizes |= value_bytes(self.parts.model, self.wanted(open_), self.source)
        one = [self._bytes([n]) + self.beside for n in open_]
        if open_ and max(one) * samples > self.budget:
            held = max(2, self.budget // max(one))
            self.progress.note(
                f"the cache budget of {gigabytes(self.budget)} holds {held} of {samples} samples of the largest "
                f"neighbourhood; raise --cache-budget to use them all"
            )
            samples = held
        low, high = max(one, default=0), self.budget // samples
        fewest = len(self._fill(open_, high))
        while low < high:  # the smallest limit that needs no more sweeps makes them even
            middle = (low + high) // 2
            if len(self._fill(open_, middle)) == fewest:
                high = middle
            else:
                low = middle + 1
        return samples, self._fill(open_, low)

    def estimate(self, sweeps: Sequence[Sequence[Neighbourhood]], samples: int) -> None:
        """Tell what the sweeps that are left take on the disk."""
        sizes = [(self._bytes(sweep) + self.beside) * samples for sweep in sweeps]
        if sizes:
            parts = f"in {len(sizes)} sweeps of at most " if len(sizes) > 1 else ""
            told = f"activations of {samples} samples take {parts}{gigabytes(max(sizes))} on disk"
            self.progress.note(Estimate(f"{told} (cache budget {gigabytes(self.budget)})"))

    def _fill(self, neighbourhoods: Iterable[Neighbourhood], limit: int) -> list[list[Neighbourhood]]:
        """Runs of neighbours whose boundaries take at most `limit` bytes a sample."""
        sweeps: list[list[Neighbourhood]] = []
        held: set[str] = set()
        total = 0
        for neighbourhood in neighbourhoods:
            wanted = set(self.wanted([neighbourhood]))
            further = sum(self.sizes.get(name, 0) for name in wanted - held)
            if sweeps and total + further + self.beside <= limit:
                sweeps[-1].append(neighbourhood)
                held |= wanted
                total += further
            else:
                sweeps.append([neighbourhood])
                held, total = wanted, sum(self.sizes.get(name, 0) for name in wanted)
        return sweeps

    def _bytes(self, neighbourhoods: Sequence[Neighbourhood]) -> int:
        """Bytes that one sample of these neighbourhoods' boundaries takes in the store."""
        return sum(self.sizes.get(name, 0) for name in self.wanted(neighbourhoods))


def gigabytes(count: float) -> str:
    """A number of bytes to read."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
