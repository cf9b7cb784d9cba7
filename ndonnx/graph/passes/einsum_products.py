"""An `Einsum` of two operands that is a matrix product, written as one."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

from ndonnx.graph.costs import constant_of
from ndonnx.graph.passes.fused_writer import Outputs, Writer


def einsum(writer: Writer, node: ir.Node) -> Outputs:
    """A product of matrices that share their leading axes, or of a tensor and one matrix.

    Of the matrix, several axes may be summed over and several may be carried on (the heads of attention), where their
    lengths are known. Sums over one operand alone, and diagonals, are no such product.
    """
    sides = list(node.inputs)
    left, right, out = _terms(node.attributes["equation"].as_string(), [_rank(side) for side in sides])
    apart = not any(letter in left and letter in right for letter in out)
    if apart and _is_constant(sides[0]) and not _is_constant(sides[1]):
        sides, left, right = sides[::-1], right, left
    if not all(len(set(term)) == len(term) for term in (left, right, out)):
        return None
    shared, rows, columns, summed = _parts(left, right, out)
    known = len(shared + rows + columns) == len(out) and set(left + right) == set(out + summed)
    if not known or not rows or not columns or not summed:
        return None
    if not shared and len(summed + columns) > 2:
        return _several_axes(writer, sides, (left, right, out), (rows, columns, summed))
    if len(columns) > 1 or len(summed) > 1 or (shared and len(rows) != 1):
        return None
    product = writer.op(
        "MatMul",
        _turned(writer, sides[0], left, shared + rows + summed),
        _turned(writer, sides[1], right, shared + summed + columns),
    )
    return (_turned(writer, product, shared + rows + columns, out),)


def _terms(equation: str, ranks: Sequence[int]) -> tuple[str, str, str]:
    """Both operands' letters and those of the result, with letters in the place of an ellipsis.

    Raises:
        ValueError: there are not two operands, or an ellipsis stands for other axes in each.
    """
    given, arrow, out = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    lengths = {rank - len(term) + 3 for term, rank in zip(terms, ranks, strict=True) if "..." in term}
    if len(terms) != 2 or len(lengths) > 1:
        raise ValueError(f"einsum: '{equation}' is no product of two operands with the same ellipsis")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    rest = "".join(free[: lengths.pop()]) if lengths else ""
    left, right = (term.replace("...", rest) for term in terms)
    if not arrow:
        counts = Counter(left + right)
        return left, right, rest + "".join(sorted(one for one in counts if counts[one] == 1 and one not in rest))
    return left, right, out.replace("...", rest)


def _parts(left: str, right: str, out: str) -> tuple[str, str, str, str]:
    """Letters of the leading axes that both have, of the rows, of the columns, and of those that are summed over."""
    shared = "".join(letter for letter in out if letter in left and letter in right)
    rows = "".join(letter for letter in out if letter in left and letter not in right)
    columns = "".join(letter for letter in out if letter in right and letter not in left)
    return shared, rows, columns, "".join(letter for letter in right if letter in left and letter not in out)


def _several_axes(
    writer: Writer, sides: Sequence[ir.Value | None], terms: tuple[str, str, str], parts: tuple[str, str, str]
) -> Outputs:
    """The product of a tensor and a constant whose axes are joined to those of a matrix."""
    (left, right, out), (rows, columns, summed) = terms, parts
    weight = sides[1]
    if (tensor := constant_of(weight)) is None or weight is None or not weight.is_initializer():
        return None
    size = dict(zip(right, tensor.shape.numpy(), strict=True))
    carried = "".join(letter for letter in right if letter in columns)
    turned = right == carried + summed
    if not turned and right != summed + carried:
        return None
    split = len(carried if turned else summed)
    joined = tensor.numpy().reshape(
        math.prod(size[one] for one in right[:split]), math.prod(size[one] for one in right[split:])
    )
    matrix = writer.part(weight, split, joined)
    data = _turned(writer, sides[0], left, rows + summed)
    if len(summed) > 1:
        data = writer.op("Reshape", data, writer.ints(*[0] * len(rows), math.prod(size[one] for one in summed)))
    product = writer.op("MatMul", data, writer.op("Transpose", matrix, perm=[1, 0]) if turned else matrix)
    if len(carried) > 1:
        product = writer.op("Reshape", product, writer.ints(*[0] * len(rows), *(size[letter] for letter in carried)))
    return (_turned(writer, product, rows + carried, out),)


def _turned(writer: Writer, value: ir.Value | None, letters: str, wanted: str) -> ir.Value:
    assert value is not None
    return value if letters == wanted else writer.op("Transpose", value, perm=[letters.index(one) for one in wanted])


def _rank(value: ir.Value | None) -> int:
    return len(value.shape) if value is not None and value.shape is not None else 0


def _is_constant(value: ir.Value | None) -> bool:
    return constant_of(value) is not None
