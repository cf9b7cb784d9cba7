"""The last gate of a quantised student: valid, loadable, with the inputs and outputs of the one it was made of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ndonnx.assemble.verify import check_ends, check_file
from ndonnx.errors import VerificationError, first_line
from ndonnx.graph.interface import Interface
from ndonnx.teacher import make_session
from ndonnx.teacher.sessions import REFUSALS


def verify_quantised(
    teacher: ir.Model, before: ir.Model, after: ir.Model, interface: Interface, probe: Mapping[str, np.ndarray]
) -> None:
    """Check a quantised student; how near its answers are is measured elsewhere.

    Inputs and outputs are those of the student in float; `onnx.checker` accepts it, or refuses in it only what it
    refuses in the teacher; onnxruntime runs it, and its answers have the same shapes and are finite where they were.

    Raises:
        VerificationError: with the first check that failed.
    """
    check_ends(before, after)
    check_file(teacher, after)
    try:
        found = [make_session(interface.applied(model)).run(None, dict(probe)) for model in (before, after)]
    except REFUSALS as error:
        raise VerificationError(f"onnxruntime does not run the quantised student: {first_line(error)}") from error
    for value, old, new in zip(before.graph.outputs, *found, strict=True):
        if isinstance(old, np.ndarray) and not _is_like(old, new):
            raise VerificationError(
                f"the quantised student's output '{value.name}' has another shape or type, or is not finite"
            )


def _is_like(old: np.ndarray, new: np.ndarray) -> bool:
    if old.shape != new.shape or old.dtype != new.dtype:
        return False
    return old.dtype.kind != "f" or bool(np.isfinite(new[np.isfinite(old)]).all())
