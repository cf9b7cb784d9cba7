"""Which neighbourhoods are captured together: in as few and as even waves as the cache budget allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ndonnx.data import DataSource
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.pipeline.batches import sample_bytes
from ndonnx.progress import Progress


@dataclass
class Waves:
    """The plan of the sweeps.

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
    """Bytes of one sample that lie on the disk in any wave."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of one sample of a value in the store, as far as it was asked for."""

    def plan(self, samples: int) -> tuple[int, list[list[Neighbourhood]]]:
        """As many of the samples as the budget holds, and the waves."""
        open_ = self.parts.distillable
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
        while low < high:  # the smallest limit that needs no more waves makes them even
            middle = (low + high) // 2
            if len(self._fill(open_, middle)) == fewest:
                high = middle
            else:
                low = middle + 1
        return samples, self._fill(open_, low)

    def estimate(self, waves: Sequence[Sequence[Neighbourhood]], samples: int) -> None:
        """Tell what the sweeps that are left take on the disk."""
        sizes = [(self._bytes(wave) + self.beside) * samples for wave in waves]
        if sizes:
            sweeps = f"in {len(sizes)} sweeps of at most " if len(sizes) > 1 else ""
            self.progress.note(
                f"activations of {samples} samples take {sweeps}{gigabytes(max(sizes))} on disk "
                f"(cache budget {gigabytes(self.budget)})"
            )

    def _fill(self, neighbourhoods: Iterable[Neighbourhood], limit: int) -> list[list[Neighbourhood]]:
        """Runs of neighbours whose boundaries take at most `limit` bytes a sample."""
        waves: list[list[Neighbourhood]] = []
        held: set[str] = set()
        for neighbourhood in neighbourhoods:
            wanted = held | set(self.wanted([neighbourhood]))
            if waves and sum(self.sizes[name] for name in wanted) + self.beside <= limit:
                waves[-1].append(neighbourhood)
                held = wanted
            else:
                waves.append([neighbourhood])
                held = set(self.wanted([neighbourhood]))
        return waves

    def _bytes(self, neighbourhoods: Sequence[Neighbourhood]) -> int:
        """Bytes that one sample of these neighbourhoods' boundaries takes in the store."""
        names = self.wanted(neighbourhoods)
        for name in names:
            if name not in self.sizes:
                self.sizes[name] = sample_bytes(self.parts.model, [name], self.source)
        return sum(self.sizes[name] for name in names)


def gigabytes(count: float) -> str:
    """A number of bytes to read."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
