"""Raising the opset of a model that is too old for what is to be written into it."""

from __future__ import annotations

import onnx

from ndonnx.errors import SliceError, first_line
from ndonnx.graph.storage.opsets import ONNX_NAMES

_IR_VERSIONS = {11: 6, 13: 7}
"""Version of the file format that goes with an opset."""


def opset_of(proto: onnx.ModelProto) -> int:
    """Version of the ONNX operators that a model uses."""
    return max((int(entry.version) for entry in proto.opset_import if entry.domain in ONNX_NAMES), default=1)


def raise_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model at this opset, which is newer than its own.

    Raises:
        SliceError: ONNX does not convert it.
    """
    try:
        raised = onnx.version_converter.convert_version(proto, opset)
    except Exception as error:  # of the converter's own, without a common base
        raise SliceError(f"its opset {opset_of(proto)} cannot be raised to {opset}: {first_line(error)}") from error
    raised.ir_version = max(raised.ir_version, _IR_VERSIONS[opset])
    return raised
