"""Candidates by name: `width 0.5`, `sparsity 2:4`, `lowrank 0.5`, `activation`, `removal`, in any mixture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ndonnx.config.recipe import Recipe
from ndonnx.errors import RecipeError
from ndonnx.students.registry import method_class, method_names

DEFAULT_CANDIDATES = ("width 0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9", "lowrank 0.3,0.4,0.5,0.6,0.75")
"""The multipliers of the paper (section 5), whose 1.0 is the teacher and needs no training, and factorisations, which
lose less for the same weights on many slices."""


@dataclass(frozen=True)
class Candidate:
    """One way to shrink a slice."""

    spec: str
    """Name of the candidate, the same for all ways to write it: `width 0.50` is `width 0.5`."""
    overrides: Mapping[str, Any] = field(compare=False)
    """The recipe keys that make it."""
    size: float = field(compare=False)
    """Nominal part of the weights that is left: what is cheaper, before anything is built."""

    @property
    def method(self) -> str:
        """The recipe's name of the method."""
        return str(self.overrides["method"])

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe of a run with this candidate everywhere."""
        return base.with_settings(self.overrides)


def parse_candidates(specs: str | Iterable[str]) -> tuple[Candidate, ...]:
    """Read candidates, in one text or several; commas separate them, and a number alone has the method before it.

    `("width 0.25,0.5", "sparsity 2:4")` and `"0.25, 0.5, sparsity 2:4"` are the same: a first number is a width.

    Returns:
        The cheapest first (by `size`, then in the order given), each once. What is the teacher itself (width 1,
        sparsity 0) is left out, since every neighbourhood has the teacher's own slice to choose.

    Raises:
        RecipeError: an entry is none of these, or there is nothing to train.
    """
    found: dict[str, Candidate] = {}
    for text in [specs] if isinstance(specs, str) else specs:
        method = "width"
        for entry in text.split(","):
            words = entry.split()
            if words and words[0].isidentifier():
                method, *words = words
            candidate = _read(entry.strip(), method, words)
            if candidate is not None:
                found.setdefault(candidate.spec, candidate)
    if not found:
        raise RecipeError(f"candidates: there is nothing but the teacher itself; possible are {_possible()}")
    return tuple(sorted(found.values(), key=lambda candidate: candidate.size))


def _read(entry: str, method: str, words: list[str]) -> Candidate | None:
    """The candidate of an entry; None where it is the teacher."""
    try:
        found = method_class(method).spelled(words)
    except (RecipeError, ValueError) as error:
        raise RecipeError(f"candidate '{entry}': not one of {_possible()}") from error
    return None if found is None else Candidate(found.spec, {"method": method, **found.settings}, found.size)


def _possible() -> str:
    usages = ", ".join(method_class(name).usage for name in method_names())
    return f"{usages}; several numbers after one name by commas, as width 0.25,0.5"
