"""The last gate before a student gets its name: valid, loadable, and what was trained."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ndonnx.convert import check_parity, to_torch
from ndonnx.errors import ParityError, VerificationError
from ndonnx.graph import save
from ndonnx.graph.dataflow import real_inputs
from ndonnx.partition import Partition
from ndonnx.teacher import make_session
from ndonnx.teacher.sessions import REFUSALS, first_line


def verify(
    teacher: ir.Model,
    student: ir.Model,
    parts: Partition,
    students: Mapping[str, ir.Model],
    probe: Mapping[str, np.ndarray],
    tolerance: float,
) -> None:
    """Check a spliced student.

    Inputs, outputs and opset are the teacher's; `onnx.checker` accepts it; onnxruntime runs it
    on the probe; and inside it every neighbourhood answers as its torch student does.

    Raises:
        VerificationError: with the first check that failed.
    """
    _check_interface(teacher, student)
    _check_file(student)
    by_name = {n.name: n for n in parts.distillable}
    watched = [by_name[name] for name in students]
    names = list(dict.fromkeys(v.name or "" for n in watched for v in (n.entry, *n.context, n.exit) if v is not None))
    values = _run(student, names, probe)
    for neighbourhood in watched:
        assert neighbourhood.entry is not None and neighbourhood.exit is not None
        inputs = [values[value.name or ""] for value in (neighbourhood.entry, *neighbourhood.context)]
        try:
            check_parity(
                to_torch(students[neighbourhood.name]), inputs, values[neighbourhood.exit.name or ""], tolerance
            )
        except ParityError as error:
            raise VerificationError(
                f"{neighbourhood.name}: in the spliced student, {error}", neighbourhood.name
            ) from error


def _check_interface(teacher: ir.Model, student: ir.Model) -> None:
    for side in ("inputs", "outputs"):
        old, new = (_interface(model, side) for model in (teacher, student))
        if old != new:
            raise VerificationError(f"the student's {side} {new} are not the teacher's {old}")
    if {d: v for d, v in student.opset_imports.items() if d in teacher.opset_imports} != dict(teacher.opset_imports):
        raise VerificationError(f"the student's opset {student.opset_imports} is not the teacher's")


def _interface(model: ir.Model, side: str) -> list[tuple[str | None, str, str]]:
    values = real_inputs(model.graph) if side == "inputs" else model.graph.outputs
    return [(value.name, str(value.dtype), str(value.shape)) for value in values]


def _check_file(student: ir.Model) -> None:
    with tempfile.TemporaryDirectory(prefix="ndonnx-") as folder:
        path = Path(folder) / "student.onnx"
        save(student, path)
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise VerificationError(f"onnx.checker refuses the student: {first}") from error


def _run(student: ir.Model, names: list[str], probe: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values inside the student, computed by onnxruntime."""
    opened = student.clone()
    values = ir.convenience.create_value_mapping(opened.graph)
    outputs = {value.name for value in opened.graph.outputs}
    inputs = {value.name for value in opened.graph.inputs}
    if missing := [name for name in names if name not in values and name not in inputs]:
        raise VerificationError(f"the student has no value '{missing[0]}', where a neighbourhood begins or ends")
    opened.graph.outputs.extend(values[name] for name in names if name not in outputs | inputs)
    try:
        session = make_session(opened)
        wanted = [output.name for output in session.get_outputs()]
        found = dict(zip(wanted, session.run(wanted, dict(probe)), strict=True))
    except REFUSALS as error:
        raise VerificationError(f"onnxruntime does not run the student: {first_line(error)}") from error
    return found | {name: probe[name] for name in names if name in inputs}
