"""Attention and embedding as onnxruntime fuses them, in ONNX's own operators, so that heads and tables can shrink."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ndonnx.graph.costs import constant_of
from ndonnx.graph.passes.fused_writer import AXES_INPUTS_SINCE, Outputs, Writer, input_of, is_read, number_of

_BOOL, _INT32, _INT64 = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64
_SEQUENCE_RANK = 3
"""Samples, positions, channels."""
_RANGE_SINCE = 11
"""Opset."""
_HIDDEN = -10000.0
"""What onnxruntime adds to the scores of hidden positions unless an attribute says otherwise."""
_LATER = -1e30
"""What is added to the scores of later positions where each sees the earlier ones only."""


def attention(writer: Writer, node: ir.Node) -> Outputs:
    """`Attention` without a past: one packed projection, three here, and the product of what they give."""
    data, packed, shift = node.inputs[0], node.inputs[1], input_of(node, 2)
    weights = constant_of(packed)
    if data is None or packed is None or weights is None or _rank(data) != _SEQUENCE_RANK:
        return None
    if _any_given(node, 4, 6) or number_of(node, "do_rotary", 0) or not _is_constant(shift):
        return None
    widths = _widths(node, int(weights.shape.numpy()[1]))
    sides = [writer.op("MatMul", data, matrix) for matrix in _parts(writer, packed, widths)]
    return _attended(writer, node, _shifted(writer, sides, shift, widths), widths, input_of(node, 3), input_of(node, 5))


def multi_head_attention(writer: Writer, node: ir.Node) -> Outputs:
    """`MultiHeadAttention` of queries, keys and values that come apart, without a past."""
    sides = [value for position in range(3) if (value := input_of(node, position)) is not None]
    widths = [size for side in sides if isinstance(size := _last_size(side), int)]
    shift = input_of(node, 3)
    if len(widths) != 3 or any(_rank(side) != _SEQUENCE_RANK for side in sides):
        return None
    if _any_given(node, 6, 7, 8, 9) or not _is_constant(shift):
        return None
    return _attended(writer, node, _shifted(writer, sides, shift, widths), widths, input_of(node, 4), input_of(node, 5))


def embed_layer_norm(writer: Writer, node: ir.Node) -> Outputs:
    """`EmbedLayerNormalization`: rows of up to three tables, their sum, normalised; and how long each sample is."""
    ids, segments, words, places, kinds, scale, shift, mask, numbers = (input_of(node, i) for i in range(9))
    if ids is None or words is None or places is None or scale is None or number_of(node, "mask_index_type", 0):
        return None
    if (is_read(node, 1) and mask is None) or (segments is None) != (kinds is None):
        return None
    if numbers is None:
        length = writer.unsqueezed(writer.length(ids, 1), 0, dtype=_INT64)
        here = writer.op("Slice", places, writer.ints(0), length, writer.ints(0))
    else:
        here = writer.op("Gather", places, numbers)
    total = writer.op("Add", writer.op("Gather", words, ids), here)
    if kinds is not None:
        total = writer.op("Add", total, writer.op("Gather", kinds, segments))
    lengths = _sum_of(writer, mask) if mask is not None and is_read(node, 1) else None
    return writer.layer_norm(total, scale, shift, number_of(node, "epsilon", 1e-12)), lengths, total


def _sum_of(writer: Writer, mask: ir.Value) -> ir.Value:
    if writer.opset < AXES_INPUTS_SINCE:
        return writer.op("ReduceSum", mask, axes=[1], keepdims=0, dtype=_INT32)
    return writer.op("ReduceSum", mask, writer.ints(1), keepdims=0, dtype=_INT32)


def _attended(
    writer: Writer,
    node: ir.Node,
    sides: Sequence[ir.Value],
    widths: Sequence[int],
    mask: ir.Value | None,
    added: ir.Value | None,
) -> Outputs:
    """The values that each position attends to.

    Args:
        writer: of the operators.
        node: the fused operator.
        sides: queries, keys and values, [samples, positions, width].
        widths: of these.
        mask: which positions are seen, as the fused operator takes it.
        added: to the scores.
    """
    heads = int(number_of(node, "num_heads", 0))
    if any(is_read(node, position) for position in range(1, len(node.outputs))):
        return None
    if heads < 1 or any(width % heads for width in widths) or widths[0] != widths[1] or writer.opset < _RANGE_SINCE:
        return None
    hidden = _hidden(writer, node, sides[1], mask) if mask is not None else None
    if mask is not None and hidden is None:
        return None
    perms = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    queries, keys, values = (
        writer.op("Transpose", writer.op("Reshape", side, writer.ints(0, 0, heads, width // heads)), perm=perm)
        for side, width, perm in zip(sides, widths, perms, strict=True)
    )
    factor = number_of(node, "scale", 0) or 1 / math.sqrt(widths[0] // heads)
    scores = writer.op("Mul", writer.op("MatMul", queries, keys), writer.number(factor))
    later = _later(writer, sides[1]) if number_of(node, "unidirectional", 0) else None
    for summand in (added, hidden, later):
        scores = scores if summand is None else writer.op("Add", scores, summand)
    seen = writer.op("MatMul", writer.op("Softmax", scores, axis=-1), values)
    whole = writer.op("Transpose", seen, perm=[0, 2, 1, 3])
    return (writer.op("Reshape", whole, writer.ints(0, 0, widths[2])),)


def _hidden(writer: Writer, node: ir.Node, keys: ir.Value, mask: ir.Value) -> ir.Value | None:
    """What hides positions that a mask leaves out; None for a mask that is not known."""
    rank, low = _rank(mask), number_of(node, "mask_filter_value", _HIDDEN)
    samples = _first_size(node.inputs[0])
    if rank == 1 and samples is not None and _first_size(mask) == samples:  # how many positions each sample has
        places = writer.unsqueezed(_places(writer, keys), 0, dtype=_INT64)
        lengths = writer.unsqueezed(writer.op("Cast", mask, to=_INT64.value, dtype=_INT64), 1, dtype=_INT64)
        seen = writer.op("Less", places, lengths, dtype=_BOOL)
    elif rank in (2, 3):
        seen = writer.op("Greater", mask, writer.constant(np.array(0, np.int32)), dtype=_BOOL)
    else:
        return None
    bias = writer.op("Where", seen, writer.number(0), writer.number(low))
    return writer.unsqueezed(bias, 1) if rank == _SEQUENCE_RANK else writer.unsqueezed(bias, 1, 2)


def _later(writer: Writer, keys: ir.Value) -> ir.Value:
    """What hides the positions behind each one."""
    places = _places(writer, keys)
    one, other = (writer.unsqueezed(places, axis, dtype=_INT64) for axis in (0, 1))
    behind = writer.op("Greater", one, other, dtype=_BOOL)
    return writer.op("Where", behind, writer.number(_LATER), writer.number(0))


def _places(writer: Writer, keys: ir.Value) -> ir.Value:
    """0, 1, 2 ... for the positions."""
    zero, one = (writer.constant(np.array(number, np.int64)) for number in (0, 1))
    return writer.op("Range", zero, writer.length(keys, 1), one, dtype=_INT64)


def _shifted(
    writer: Writer, sides: Sequence[ir.Value], shift: ir.Value | None, widths: Sequence[int]
) -> list[ir.Value]:
    if shift is None:
        return list(sides)
    return [writer.op("Add", side, part) for side, part in zip(sides, _parts(writer, shift, widths), strict=True)]


def _parts(writer: Writer, whole: ir.Value, widths: Sequence[int]) -> list[ir.Value]:
    """A weight cut along its last axis."""
    tensor = constant_of(whole)
    assert tensor is not None
    arrays = np.split(tensor.numpy(), np.cumsum(widths)[:-1].tolist(), axis=-1)
    if [array.shape[-1] for array in arrays] != list(widths):
        raise ValueError(f"'{whole.name}' does not hold {widths}")
    return [writer.part(whole, position, np.ascontiguousarray(array)) for position, array in enumerate(arrays)]


def _widths(node: ir.Node, whole: int) -> list[int]:
    sizes = node.attributes.get("qkv_hidden_sizes")
    given = list(sizes.as_ints()) if sizes is not None else []
    return given or [whole // 3] * 3


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or constant_of(value) is not None


def _any_given(node: ir.Node, *positions: int) -> bool:
    return any(input_of(node, position) is not None for position in positions)


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _first_size(value: ir.Value | None) -> int | str | None:
    size = value.shape[0] if value is not None and value.shape else None
    return size.value if isinstance(size, ir.SymbolicDim) else size


def _last_size(value: ir.Value) -> int | str | None:
    size = value.shape[-1] if value.shape else None
    return size.value if isinstance(size, ir.SymbolicDim) else size
