"""Candidates by name: `width 0.5`, `sparsity 2:4`, `lowrank 0.5`, `activation`, `removal`, in any mixture.

With `+ int8` behind it each of them is in 8 bits; `int8` alone is the teacher's own slice in 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ndonnx.config.recipe import Recipe
from ndonnx.errors import RecipeError
from ndonnx.select.table import BITS, INT8
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
    """Nominal part of the weights' bytes that is left: what is cheaper, before anything is built."""
    bits: int = 32
    """Bits of its weights and activations."""
    of: str = ""
    """The candidate in float that one in 8 bits is made of; empty where it is made of none."""

    @property
    def method(self) -> str:
        """The recipe's name of the method; empty where nothing is trained: the teacher's own slice in 8 bits."""
        return str(self.overrides.get("method", ""))

    @property
    def in_float(self) -> Candidate | None:
        """The candidate that is trained for it: itself, or what it is made of; None for the teacher's own slice."""
        if self.bits == 32:
            return self
        return replace(self, spec=self.of, size=self.size * 32 / self.bits, bits=32, of="") if self.of else None

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe of a run with this candidate everywhere."""
        return base.with_settings(self.overrides)


def parse_candidates(specs: str | Iterable[str], bits: int = 32) -> tuple[Candidate, ...]:
    """Read candidates, in one text or several; commas separate them, and a number alone has the method before it.

    `("width 0.25,0.5", "sparsity 2:4")` and `"0.25, 0.5, sparsity 2:4"` are the same: a first number is a width. An
    entry with `+ int8` behind it is in 8 bits, the others of its row are not.

    Args:
        specs: the texts.
        bits: 8 adds the same in 8 bits of every candidate, and of the teacher's own slice.

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
            words = entry.partition("+")[0].split()
            if words and words[0].isidentifier() and words[0] not in BITS:
                method = words[0]
            candidate = _read(entry.strip(), method)
            if candidate is not None:
                found.setdefault(candidate.spec, candidate)
    if not found and bits == 32:
        raise RecipeError(f"candidates: there is nothing but the teacher itself; possible are {_possible()}")
    if bits < 32:
        for candidate in (None, *[each for each in found.values() if each.bits == 32]):
            twin = in_bits(candidate, INT8)
            found.setdefault(twin.spec, twin)
    return tuple(sorted(found.values(), key=lambda candidate: candidate.size))


def in_bits(candidate: Candidate | None, precision: str) -> Candidate:
    """A candidate in 8 bits; None stands for the teacher's own slice."""
    bits = BITS[precision]
    if candidate is None:
        return Candidate(precision, {}, bits / 32, bits)
    size = candidate.size * bits / 32
    return replace(candidate, spec=f"{candidate.spec} + {precision}", size=size, bits=bits, of=candidate.spec)


def _read(entry: str, method: str) -> Candidate | None:
    """The candidate of an entry; None where it is the teacher."""
    first, *behind = (part.strip() for part in entry.split("+"))
    alone = first in BITS
    if len(behind) + alone > 1 or (behind and not first) or any(part not in BITS for part in behind):
        raise RecipeError(
            f"candidate '{entry}': behind + stands {INT8}, once and last, as width 0.5 + {INT8}; {INT8} alone is the "
            "teacher's own slice in 8 bits"
        )
    if alone:
        return in_bits(None, first)
    found = _spelled(entry, method, first.split())
    return in_bits(found, behind[0]) if behind else found


def _spelled(entry: str, method: str, words: list[str]) -> Candidate | None:
    """The candidate in float that these words mean; None where it is the teacher."""
    if words and words[0].isidentifier():
        words = words[1:]
    try:
        found = method_class(method).spelled(words)
    except (RecipeError, ValueError) as error:
        raise RecipeError(f"candidate '{entry}': not one of {_possible()}") from error
    return None if found is None else Candidate(found.spec, {"method": method, **found.settings}, found.size)


def _possible() -> str:
    usages = ", ".join(method_class(name).usage for name in method_names())
    return (
        f"{usages}, {INT8}; several numbers after one name by commas, as width 0.25,0.5; each in 8 bits with + {INT8}"
    )
