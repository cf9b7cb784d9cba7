"""Embedding tables as two factors, fitted with the frequencies of the ids that the data hold.

A `Gather` of rows of a table E (ids, width) becomes a `Gather` from A (ids, rank) and a product with B (rank, width).
With p the part that each id has in the data, the error that the reader sees is the sum of p |e - a B|^2 over the rows.
For any B with orthonormal rows the best A is E B^T, whatever p is; the best B spans the leading eigenvectors of
E^T diag(p) E: a weighted singular value decomposition. Every id counts once beside what was seen of it (Laplace's
rule), so that the directions of ids that the data lack are not lost where there is room for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.graph.costs import constant_of, is_weight
from ndonnx.graph.initializers import unique_name
from ndonnx.students.base import TeacherSlice
from ndonnx.students.features import Matrix
from ndonnx.students.linear import add_weight

_ROWS = 2**14
"""Rows of a table that are in memory as float64 at a time."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """A `Gather` of the rows of a float table that nothing else reads."""

    ids: str
    """Name of the value that holds the ids; those below zero count from the table's end."""
    output: str
    weight: str
    rows: npt.NDArray[np.float32]
    """The table (ids, width)."""


def lookups(model: ir.Model, held: Collection[str] = ()) -> list[Lookup]:
    """The embedding tables of a slice, in topological order, but for weights that have to stay as they are."""
    found = (_lookup(node) for node in model.graph)
    return [lookup for lookup in found if lookup is not None and lookup.weight not in held]


def _lookup(node: ir.Node) -> Lookup | None:
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx") or constant_of(node.inputs[1]) is not None:
        return None
    weight, ids, axis = node.inputs[0], node.inputs[1], node.attributes.get("axis")
    if weight is None or ids is None or not is_weight(weight) or len(weight.uses()) != 1:
        return None
    tensor = constant_of(weight)
    if tensor is None or len(tensor.shape) != 2 or (axis is not None and axis.as_int() != 0):
        return None
    return Lookup(ids.name or "", node.outputs[0].name or "", weight.name or "", tensor.numpy())


@dataclass(frozen=True, eq=False)
class Table:
    """One table and how often the data ask for each of its rows."""

    lookup: Lookup
    shares: Matrix
    """Part of all look-ups (ids,), every id counted once more than it was seen."""

    @property
    def weight(self) -> str:
        """Name of the table."""
        return self.lookup.weight

    @property
    def size(self) -> int:
        """Weights of the whole table."""
        return self.lookup.rows.size

    @property
    def cost(self) -> int:
        """Weights of both factors per rank."""
        return sum(self.lookup.rows.shape)

    @cached_property
    def _spectrum(self) -> tuple[Matrix, Matrix]:
        """Energies (width,) and directions (width, width) of the rows as the data ask for them, strongest first."""
        rows, shares = self.lookup.rows, self.shares
        square = np.zeros((rows.shape[1], rows.shape[1]))
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS].astype(np.float64)
            square += (some * shares[start : start + _ROWS, None]).T @ some
        energies, directions = np.linalg.eigh(square)
        return np.maximum(energies[::-1], 0.0), directions[:, ::-1]

    @property
    def energy(self) -> float:
        """Mean square of what is looked up, summed over the width."""
        return float(self._spectrum[0].sum())

    def errors(self) -> Matrix:
        """Mean squared error at ranks 1, 2, ... as long as both factors are smaller than the table."""
        energies = self._spectrum[0]
        left = energies.sum() - energies.cumsum()
        found: Matrix = np.maximum(left[: min(len(energies), (self.size - 1) // self.cost)], 0.0)
        return found

    def factors(self, rank: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """A (ids, rank) and B (rank, width)."""
        directions = self._spectrum[1][:, :rank].astype(np.float32)
        return self.lookup.rows @ directions, directions.T


def measure(teacher: TeacherSlice, found: Iterable[Lookup]) -> list[Table]:
    """The tables with the frequencies of the ids on the samples.

    Raises:
        ShrinkError: onnxruntime does not run the slice.
    """
    found = list(found)
    counts = [np.ones(len(lookup.rows)) for lookup in found]
    names = list(dict.fromkeys(lookup.ids for lookup in found))
    for _, (values,) in teacher.batches((teacher.model, names)) if names else ():
        for lookup, count in zip(found, counts, strict=True):
            np.add.at(count, values[lookup.ids].reshape(-1) % len(count), 1)
    return [Table(lookup, count / count.sum()) for lookup, count in zip(found, counts, strict=True)]


def split_table(model: ir.Model, table: Table, rank: int) -> None:
    """Look up in a table of this rank and widen what is found by a product; in place."""
    graph = model.graph
    node = next(node for node in graph if node.outputs[0].name == table.lookup.output)
    a, b = table.factors(rank)
    narrow, wide = (add_weight(graph, f"{table.weight}/{part}", array) for part, array in (("a", a), ("b", b)))
    output = node.outputs[0]
    found = ir.Value(name=unique_name(graph, f"{output.name}/a"), type=output.type)
    gather = ir.Node(
        "", "Gather", [narrow, node.inputs[1]], attributes=list(node.attributes.values()), outputs=[found],
        name=unique_name(graph, f"{node.name or 'Gather'}/a"),
    )  # fmt: skip
    product = ir.node("MatMul", [found, wide], name=unique_name(graph, f"{node.name or 'Gather'}/b"))
    made = product.outputs[0]
    made.type, made.shape = output.type, output.shape
    graph.insert_before(node, [gather, product])
    output.replace_all_uses_with(made, replace_graph_outputs=True)
    name, output.name = output.name, unique_name(graph, f"{output.name}/old")
    made.name = name
    graph.remove(node, safe=True)
    del graph.initializers[table.weight]
