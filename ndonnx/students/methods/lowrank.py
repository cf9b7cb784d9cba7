"""Low rank: linear operators and embedding tables become two smaller ones, with ranks where the slice loses least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.errors import ShrinkError
from ndonnx.graph.initializers import unique_name
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.students.base import Candidate, Spelled, StudentMethod, TeacherSlice, spelled_number
from ndonnx.students.factors import Cut, Fit, Form, Problem, fit_of, forms_of
from ndonnx.students.features import LinearReader, from_matrix, summed
from ndonnx.students.least_squares import MOST_FEATURES, Regression
from ndonnx.students.linear import add_weight, every_reader, set_weight
from ndonnx.students.starting import Init, randomise
from ndonnx.students.tables import Table, lookups, measure, split_table

_ROUNDED_FROM = 16
"""Widths from which a rank is rounded by default.

Measured with onnxruntime on one AVX-512 core, a ResNet-20 (16 to 64 channels) with half of its weights: 0.93 to 0.98
of the teacher's time at any rank, 0.74 to 0.78 at multiples of 8, 0.65 to 0.69 at multiples of 16.
"""
_ROUND_TO = 8
_UNITS = 4096
"""Parts of the budget in which weights are counted when ranks are chosen."""
_PROBE = 128
"""Samples on which an operator's error is followed to the exit."""
_NOTHING = 1e-9
"""Error of an operator, relative to its output's energy, that is too small to be followed."""


@dataclass(frozen=True)
class Option:
    """What can become of one operator: it stays (`rank` is 0), or is cut at a rank."""

    parameters: int
    error: float
    """Mean squared error of its output on the samples, times what the exit makes of it."""
    form: Form | None = None
    """One way to cut a linear operator in two."""
    rank: int = 0


@dataclass(frozen=True)
class LowRank(StudentMethod):
    """Keep the part `keep` of the slice's linear weights, as products of two factors; see `Recipe` for the fields.

    Counted are the operators that can be cut: `Conv` without groups over two axes, `Gemm`, `MatMul` with a matrix, and
    `Gather` of the rows of a table, each with a weight of its own that two factors can undercut. Ranks are shared out
    among them by the smallest sum of errors at the exit.
    """

    name = "lowrank"
    usage = "lowrank K (K above 0 and at most 1)"
    around = frozenset({"Conv", "Gather", "Gemm", "MatMul"})

    keep: float
    init: Init = "least-squares"
    round_to: int | None = None
    """Ranks become multiples of this. None: 8 where the operator is at least 16 wide on both sides, else 1."""

    @classmethod
    def spelled(cls, words: Sequence[str]) -> Spelled | None:
        """Words that are one multiplier."""
        return spelled_number(cls.name, words)

    def _build(self, teacher: TeacherSlice, rng: np.random.Generator) -> Candidate:
        spec = f"lowrank k={self.keep:g}"
        readers = [r for r in every_reader(teacher.model, teacher.held) if r.features <= MOST_FEATURES]
        fits = self._fits(teacher, teacher.model, readers)
        pieces: list[Linear | Table] = [*measure(teacher, lookups(teacher.model, teacher.held))]
        pieces += [Linear(reader, fits[reader].problem) for reader in readers]
        plans = [plan for piece in pieces if len((plan := _plan(piece, self.round_to)).menu) > 1]
        if not plans:
            raise ShrinkError(f"{teacher.name}: no linear operator and no table gets smaller as two factors")
        if self.keep == 1:
            return Candidate(spec, teacher.model.clone())
        if len(plans) > 1:
            plans = _as_at_exit(teacher, plans, self.keep)
        budget = round(self.keep * sum(plan.whole for plan in plans))
        found = choose([plan.menu for plan in plans], budget)
        chosen = {plan.piece.weight: option for plan, option in zip(plans, found, strict=True) if option.rank}
        student = self._factorise(teacher, fits, [p for p in pieces if isinstance(p, Table)], chosen)
        return Candidate(spec, randomise(student, rng, teacher.held) if self.init == "random" else student)

    def _fits(self, teacher: TeacherSlice, model: ir.Model, readers: Sequence[LinearReader]) -> dict[LinearReader, Fit]:
        """The problem of each operator: its output in the teacher's slice, on what it reads in `model`."""
        problems = {reader: Regression(reader.node, teacher.count) for reader in readers}
        outputs, inputs = (
            [name for name in dict.fromkeys(names)]
            for names in ((reader.output for reader in readers), (reader.data for reader in readers))
        )
        if readers:
            for samples, (theirs, ours) in teacher.batches((teacher.model, outputs), (model, inputs)):
                for reader, problem in problems.items():
                    output = summed(reader.node, theirs[reader.output], offset=reader.has_bias)
                    problem.add(samples, ours[reader.data], output)
        return {reader: fit_of(reader, problem) for reader, problem in problems.items()}

    def _factorise(
        self,
        teacher: TeacherSlice,
        fits: Mapping[LinearReader, Fit],
        tables: Sequence[Table],
        chosen: Mapping[str, Option],
    ) -> ir.Model:
        """A copy of the slice with the chosen operators cut, each fitted to what the earlier ones now give it."""
        copy = teacher.model.clone()
        cut_tables = [table for table in tables if table.weight in chosen]
        for table in cut_tables:
            split_table(copy, table, chosen[table.weight].rank)
        nodes = {node.outputs[0].name: node for node in copy.graph}
        changed = bool(cut_tables)
        for reader, as_teacher in fits.items():
            option = chosen.get(reader.weight)
            again = changed and self.init == "least-squares"
            if option is None and not again:
                continue
            fit = self._fits(teacher, copy, [reader])[reader] if again else as_teacher
            if option is not None and option.form is not None:
                cut = Cut(fit.problem, option.form)
                _set_bias(copy, reader, fit, _as_features(cut.product(option.rank)))
                _split(copy, nodes[reader.output], option.form, *cut.factors(option.rank))
                changed = True
            else:
                weights = fit.problem.weights
                _set_bias(copy, reader, fit, weights)
                shape = copy.graph.initializers[reader.weight].const_value.shape.numpy()  # type: ignore[union-attr]
                set_weight(copy, reader.weight, from_matrix(reader.node, weights, tuple(int(d) for d in shape)))
        return infer_shapes(copy)


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear operator and its problem."""

    reader: LinearReader
    problem: Problem

    @property
    def weight(self) -> str:
        """Name of its weight."""
        return self.reader.weight

    @property
    def energy(self) -> float:
        """Mean square of its output, summed over the outputs."""
        return self.problem.energy


@dataclass(frozen=True, eq=False)
class Plan:
    """One operator, and what can become of it: first of all, to stay."""

    piece: Linear | Table
    menu: list[Option]

    @property
    def whole(self) -> int:
        """Weights of the operator as it is."""
        return self.menu[0].parameters


def _plan(piece: Linear | Table, round_to: int | None) -> Plan:
    problem = piece if isinstance(piece, Table) else piece.problem
    narrow = (
        min(piece.lookup.rows.shape) if isinstance(piece, Table) else min(piece.problem.channels, piece.problem.outputs)
    )
    step = round_to if round_to is not None else (_ROUND_TO if narrow >= _ROUNDED_FROM else 1)
    menu = [Option(problem.size, 0.0)]
    for form, cost, errors in _ways(piece):
        menu += [
            Option(cost * rank, float(errors[rank - 1]), form, rank) for rank in range(step, len(errors) + 1, step)
        ]
    return Plan(piece, menu)


def _ways(piece: Linear | Table) -> Iterator[tuple[Form | None, int, npt.NDArray[np.float64]]]:
    """The ways to cut an operator: the form, weights per rank, and the errors at ranks 1, 2, ..."""
    if isinstance(piece, Table):
        yield None, piece.cost, piece.errors()
        return
    problem = piece.problem
    for form in forms_of(problem.kernel):
        errors = Cut(problem, form).errors() - problem.unexplained
        yield form, form.cost(problem.channels, problem.outputs), errors


def choose(menus: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """One option of each menu: the smallest sum of errors within so many parameters.

    By dynamic programming over the budget in 4,096 parts. Where nothing fits, the smallest of each.
    """
    unit = max(1.0, budget / _UNITS)
    parts = int(budget / unit)
    best = np.zeros(parts + 1)
    picks: list[npt.NDArray[np.int64]] = []
    for menu in menus:
        reached = np.full((len(menu), parts + 1), np.inf)
        for row, option in zip(reached, menu, strict=True):
            size = int(np.ceil(option.parameters / unit))
            if size <= parts:
                row[size:] = best[: parts + 1 - size] + option.error
        picks.append(reached.argmin(axis=0))
        best = reached.min(axis=0)
    if not np.isfinite(best[parts]):
        return [min(menu, key=lambda option: (option.parameters, option.error)) for menu in menus]
    found: list[Option] = []
    left = parts
    for menu, pick in zip(reversed(menus), reversed(picks), strict=True):
        option = menu[pick[left]]
        left -= int(np.ceil(option.parameters / unit))
        found.append(option)
    return found[::-1]


def _as_at_exit(teacher: TeacherSlice, plans: Sequence[Plan], keep: float) -> list[Plan]:
    """The plans with errors as the exit has them: each operator alone is cut once, and the rest scaled alike."""
    few = teacher.first(_PROBE)
    exit_ = teacher.model.graph.outputs[0].name or ""
    expected = few.run(teacher.model, [exit_])[exit_]
    found = []
    for plan in plans:
        option = _typical(plan, keep)
        copy = teacher.model.clone()
        _put_product(copy, plan.piece, option)
        error = float(np.square(few.run(copy, [exit_])[exit_] - expected, dtype=np.float64).mean())
        factor = error / option.error if option.error > 0 else 1.0
        found.append(replace(plan, menu=[replace(o, error=o.error * factor) for o in plan.menu]))
    return found


def _put_product(model: ir.Model, piece: Linear | Table, option: Option) -> None:
    """Give an operator the product of both factors for its weight; in place."""
    if isinstance(piece, Table):
        a, b = piece.factors(option.rank)
        set_weight(model, piece.weight, a @ b)
        return
    assert option.form is not None
    product = _as_features(Cut(piece.problem, option.form).product(option.rank))
    shape = model.graph.initializers[piece.weight].const_value.shape.numpy()  # type: ignore[union-attr]
    set_weight(model, piece.weight, from_matrix(piece.reader.node, product, tuple(int(d) for d in shape)))


def _typical(plan: Plan, keep: float) -> Option:
    """The best option of about the size that is asked for, or the smallest where that one has no error."""
    cuts = sorted(plan.menu[1:], key=lambda option: (option.error, option.parameters))
    fitting = next((option for option in cuts if option.parameters <= keep * plan.whole), cuts[-1])
    return fitting if fitting.error > _NOTHING * plan.piece.energy else cuts[-1]


def _as_features(weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(outputs, channels, *kernel) as (features, outputs)."""
    return weight.reshape(len(weight), -1).T


def _set_bias(model: ir.Model, reader: LinearReader, fit: Fit, weights: npt.NDArray[np.float64]) -> None:
    if reader.bias is not None:
        old = model.graph.initializers[reader.bias].const_value
        assert old is not None
        set_weight(model, reader.bias, fit.offset(weights).reshape(tuple(int(d) for d in old.shape.numpy())))


def _split(model: ir.Model, node: ir.Node, form: Form, a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> None:
    """Put an operator with weight `a` before a node, and give the node the weight `b`.

    Args:
        model: changed in place.
        node: keeps its name, output and bias.
        form: of a convolution.
        a: (rank, channels, *form.first).
        b: (outputs, rank, *form.second).
    """
    graph = model.graph
    data, weight = node.inputs[0], node.inputs[1]
    assert data is not None and weight is not None and weight.name
    is_conv = node.op_type == "Conv"
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    if not is_conv:
        a, b = a[:, :, 0, 0].T, b[:, :, 0, 0] if transposed else b[:, :, 0, 0].T
    first_weight, second_weight = (
        add_weight(graph, f"{weight.name}/{part}", array) for part, array in (("a", a), ("b", b))
    )
    first = ir.node(
        "Conv" if is_conv else "MatMul",
        [data, first_weight],
        attributes=_window(node, form, first=True) if is_conv else {},
        name=unique_name(graph, f"{node.name or node.op_type}/a"),
    )
    first.outputs[0].name = unique_name(graph, f"{node.outputs[0].name}/a")
    first.outputs[0].type = node.outputs[0].type
    graph.insert_before(node, first)
    if is_conv:
        node.attributes.update(_window(node, form, first=False))
    node.replace_input_with(0, first.outputs[0])
    node.replace_input_with(1, second_weight)
    del graph.initializers[weight.name]


def _window(node: ir.Node, form: Form, *, first: bool) -> dict[str, ir.Attr]:
    """Attributes of one factor: along each axis, the one with the window has its stride, padding and dilation.

    Zeros outside the image stay zeros behind the first factor, which has no offset.
    """
    mine = [(one >= other) == first for one, other in zip(form.first, form.second, strict=True)]
    found = {"kernel_shape": ir.AttrInt64s("kernel_shape", form.first if first else form.second)}
    for name, neutral in (("strides", 1), ("dilations", 1), ("pads", 0)):
        if name in node.attributes:
            values = node.attributes[name].as_ints()
            kept = [value if mine[axis % 2] else neutral for axis, value in enumerate(values)]
            found[name] = ir.AttrInt64s(name, kept)
    if "auto_pad" in node.attributes:
        found["auto_pad"] = node.attributes["auto_pad"]
    return found
