"""What the options of a block library cost and lose, as the table of a search."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property

import onnx_ir as ir

from ndonnx.distill.job import load_student
from ndonnx.errors import first_line
from ndonnx.flow.block_library import Library
from ndonnx.flow.quantise_trials import REFUSED
from ndonnx.graph import Cost
from ndonnx.graph.storage.files import file_bytes
from ndonnx.partition import Neighbourhood
from ndonnx.select import INT8, TEACHER, Option, Table, bits_of


class Tabulated:
    """Weighs and measures what a library holds."""

    def __init__(self, library: Library) -> None:
        """Take a library whose candidates have come to an end."""
        self._library = library

    def table(self, *, latency: bool) -> Table:
        """All options that there are. With `latency`, each slice is timed."""
        whole = self._costed(self._library.run.parts.whole, file_bytes(self._library.run.teacher.path))
        if latency:
            whole["latency"] = self._teacher_time
        options = []
        fixed = dict(whole)
        for n in self._library.run.parts.trained:
            slice_ = self._library.run.parts.slice_of(n)
            # What something else reads too is part of the rest: it stays, whatever becomes of this place.
            others, size = _held(slice_, n.elsewhere)
            cost = Cost(self._library.run.parts.cost(n).parameters - others, self._macs_of_places(n))
            own = self._costed(cost, weight_bytes(slice_) - size)
            students = self._library.students(n)
            times = self._library.measures.times_of(n, students) if latency else {}
            costs = own | _timed(times, TEACHER)
            fixed = {name: fixed[name] - costs[name] for name in fixed}
            options.append(Option(n.name, TEACHER, costs, 0.0))
            for spec in students:
                loss = self._loss(n, spec)
                if spec in self._library.listed and math.isfinite(loss):
                    costs = self._costs(n, spec, own) | _timed(times, spec)
                    options.append(Option(n.name, spec, costs, loss, self._rounding(n, spec, loss)))
        if self._library.precision is None:
            return Table(options, fixed, self._library.aliases)
        aliases = dict(self._library.aliases)
        for kept in self._kept_pieces(fixed, aliases, timed=latency):
            options.append(kept)
        table = Table(options, fixed, aliases)
        return table.sped_up(self._library.precision.way.time) if latency else table

    def _kept_pieces(
        self, fixed: dict[str, float], aliases: dict[tuple[str, str], str], *, timed: bool
    ) -> Iterator[Option]:
        """Options of the kept pieces of the teacher that can be in 8 bits; what they cost leaves the rest's costs.

        Only what 8 bits change is told of them: the larger of the two has it, the other 0.
        """
        assert self._library.precision is not None
        if INT8 not in self._library.listed:
            return
        for name in self._library.precision.kept_pieces:
            try:
                found = self._library.precision.of_kept(name, timed=timed)
            except REFUSED as error:
                self._library.run.progress.note(f"{name} stays in float: {first_line(error)}")
                continue
            more = {"size": found.size, "latency": found.time * (self._teacher_time if timed else 0.0)}
            own, other = ({cost: max(0.0, sign * more.get(cost, 0.0)) for cost in fixed} for sign in (-1, 1))
            fixed.update({cost: fixed[cost] - own[cost] for cost in fixed})
            loss = found.loss.drop if self._library.run.recipe.search.quality == "metric" else found.loss.divergence
            yield Option(name, TEACHER, own, 0.0)
            if math.isfinite(loss):
                yield Option(name, INT8, other, loss, loss)
            aliases.update({(name, each.spec): INT8 for each in self._library.in_bits if each.spec != INT8})

    @cached_property
    def _teacher_time(self) -> float:
        return self._library.measures.time_of_whole()[0]

    def _loss(self, n: Neighbourhood, spec: str) -> float:
        if bits_of(spec) < 32:
            made = self._library.entry_in_bits(n, spec)
            assert made is not None
            found = self._library.measures.of_candidate(n, made)
            return found.drop if self._library.run.recipe.search.quality == "metric" else found.divergence
        entry, ended = self._library.entry(n.name, spec), self._library.outcome(n.name, spec)
        assert entry is not None and ended is not None and ended.result is not None
        match self._library.run.recipe.search.quality:
            case "nmse":
                entries = [self._library.entry(n.name, name) for name in self._library.trained]
                largest = [each for each in entries if each is not None][-1]
                return ended.result.nmse * self._library.measures.sensitivity(n, largest)
            case "metric":
                return self._library.measures.of_candidate(n, entry).drop
            case _:
                return self._library.measures.of_candidate(n, entry).divergence

    def _rounding(self, n: Neighbourhood, spec: str, loss: float) -> float:
        """What of a candidate's loss comes of its 8 bits."""
        if bits_of(spec) == 32:
            return 0.0
        trained = self._library.in_float(n.name, spec)
        return loss - (0.0 if trained == TEACHER else max(0.0, self._loss(n, trained)))

    def _costs(self, n: Neighbourhood, spec: str, own: Mapping[str, float]) -> dict[str, float]:
        """What a candidate costs; of the teacher's slice, which it may be in 8 bits, what that costs is given."""
        if bits_of(spec) < 32:
            made, trained = self._library.entry_in_bits(n, spec), self._library.in_float(n.name, spec)
            assert made is not None and self._library.precision is not None
            entry = self._library.entry(n.name, trained)
            student = self._library.run.parts.slice_of(n) if entry is None else load_student(entry)
            costs = dict(own) if trained == TEACHER else self._costs(n, trained, own)
            more = self._library.precision.bytes_more(student, load_student(made))
            return costs | {"size": max(0.0, costs["size"] + more)}
        ended = self._library.outcome(n.name, spec)
        assert ended is not None and ended.result is not None and ended.entry is not None
        student, result = load_student(ended.entry), ended.result
        others, size = _held(student, n.held)
        return self._costed(
            Cost(result.parameters - others, self._in_places(n, result.macs)), weight_bytes(student) - size
        )

    def _macs_of_places(self, n: Neighbourhood) -> int | None:
        """Multiply-accumulates of the teacher's slice, summed over all places of its student; None where unknown."""
        return sum((self._library.run.parts.cost(use) for use in self._library.run.parts.uses(n)), Cost()).macs

    def _in_places(self, n: Neighbourhood, macs: int | None) -> int | None:
        """Multiply-accumulates of a student, summed over its places: where values are larger, both have more to do."""
        own, places = self._library.run.parts.cost(n).macs, self._macs_of_places(n)
        return macs if macs is None or own is None or places is None or own == 0 else round(macs * places / own)

    def _costed(self, cost: Cost, size: int) -> dict[str, float]:
        """Costs by name; MACs only where those of every option and of the whole can be told."""
        named = {"params": float(cost.parameters), "size": float(size)}
        return named | {"macs": float(cost.macs or 0)} if self._tells_macs else named

    @property
    def _tells_macs(self) -> bool:
        results = (ended.result for ended in self._library.distillation.outcomes.values() if ended.result is not None)
        return self._library.run.parts.whole.macs is not None and all(result.macs is not None for result in results)


def weight_bytes(model: ir.Model) -> int:
    """What the weights of a slice take in a file."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _held(model: ir.Model, names: Collection[str]) -> tuple[int, int]:
    """Parameters and bytes of the named weights, as far as a slice has them."""
    values = (value for name, value in model.graph.initializers.items() if name in names)
    tensors = [value.const_value for value in values if value.const_value is not None]
    return sum(int(tensor.size) for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


def _timed(times: Mapping[str, float], name: str) -> dict[str, float]:
    return {"latency": times[name]} if times else {}
