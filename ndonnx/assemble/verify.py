"""The last gate before a student gets its name: valid, loadable, and what was trained."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ndonnx.assemble.splice import splice
from ndonnx.convert import check_parity, to_torch
from ndonnx.errors import ParityError, VerificationError, first_line
from ndonnx.graph import save
from ndonnx.graph.costs import held_weights
from ndonnx.graph.dataflow import real_inputs, sub_graphs
from ndonnx.graph.interface import sample_axis, samples_first, set_sample_axis
from ndonnx.graph.precision import in_float32, rounding_error
from ndonnx.partition import Partition
from ndonnx.teacher import make_session
from ndonnx.teacher.sessions import REFUSALS


def verify(
    teacher: ir.Model,
    student: ir.Model,
    parts: Partition,
    students: Mapping[str, ir.Model],
    probe: Mapping[str, np.ndarray],
    tolerance: float,
) -> None:
    """Check a spliced student.

    Inputs, outputs and opset are the teacher's; `onnx.checker` accepts it, or refuses in it only what it refuses in the
    teacher; onnxruntime runs it on the probe; and inside it every neighbourhood answers as its torch student does.

    Raises:
        VerificationError: with the first check that failed.
    """
    _check_interface(teacher, student)
    check_file(teacher, student)
    by_name = {n.name: n for n in parts.distillable}
    watched = [by_name[name] for name in students]
    names = list(dict.fromkeys(v.name or "" for n in watched for v in (n.entry, *n.context, n.exit) if v is not None))
    values = _run(student, parts, names, probe)
    for neighbourhood in watched:
        assert neighbourhood.entry is not None and neighbourhood.exit is not None
        inputs = [_float32(values[value.name or ""]) for value in (neighbourhood.entry, *neighbourhood.context)]
        own, found = students[neighbourhood.name], values[neighbourhood.exit.name or ""]
        try:
            check_parity(to_torch(in_float32(own)), inputs, found, max(tolerance, rounding_error(own)))
        except ParityError as error:
            raise VerificationError(
                f"{neighbourhood.name}: in the spliced student, {error}", neighbourhood.name
            ) from error


def _float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def check_no_larger(
    teacher: ir.Model, student: ir.Model, students: Mapping[str, ir.Model], shared: Mapping[str, str]
) -> None:
    """Refuse students with which the file would hold more weights than the teacher's, in number or in bytes.

    A student may be smaller than its neighbourhood and the model larger all the same: where the teacher's weight has
    to stay beside it, because something else reads it, or where the teacher keeps it in fewer bytes.

    Args:
        teacher: as loaded.
        student: the teacher with these students in it, and no others.
        students: by the name of the neighbourhood, for `splice`.
        shared: as for `splice`.

    Raises:
        VerificationError: naming the neighbourhood whose student adds most.
    """
    before = held_weights(teacher)
    growth = _growth(before, held_weights(student))
    if growth <= 0:
        return
    alone: dict[str, float] = {}
    for first in dict.fromkeys(shared.get(name, name) for name in students):
        these = {name: student for name, student in students.items() if shared.get(name, name) == first}
        alone[first] = _growth(before, held_weights(splice(teacher, these, shared)))
    worst = max(alone, key=lambda name: alone[name])
    raise VerificationError(
        f"{worst}: with its student the model would be larger, by {max(growth, alone[worst]):.2g} of its weights", worst
    )


def _growth(before: tuple[int, int], after: tuple[int, int]) -> float:
    """By which part of it the number of weights grows, or their bytes, whichever grows more."""
    return max((new - old) / max(1, old) for old, new in zip(before, after, strict=True))


def _check_interface(teacher: ir.Model, student: ir.Model) -> None:
    check_ends(teacher, student)
    if {d: v for d, v in student.opset_imports.items() if d in teacher.opset_imports} != dict(teacher.opset_imports):
        raise VerificationError(f"the student's opset {student.opset_imports} is not the teacher's")


def check_ends(teacher: ir.Model, student: ir.Model) -> None:
    """Refuse a student whose inputs or outputs are not the teacher's, in name, type or shape.

    Raises:
        VerificationError: naming them.
    """
    for side in ("inputs", "outputs"):
        old, new = (_interface(model, side) for model in (teacher, student))
        if old != new:
            raise VerificationError(f"the student's {side} {new} are not the teacher's {old}")


def _interface(model: ir.Model, side: str) -> list[tuple[str | None, str, str]]:
    values = real_inputs(model.graph) if side == "inputs" else model.graph.outputs
    return [(value.name, str(value.dtype), str(value.shape)) for value in values]


def check_file(teacher: ir.Model, student: ir.Model) -> None:
    """Refuse what `onnx.checker` refuses, unless it says so of the teacher, too.

    Raises:
        VerificationError: with the checker's words.
    """
    found = _verdict(student)
    if found is None:
        return
    excused = {_verdict(teacher), *_verdicts_on_nodes(teacher)}
    for verdict in (found, *_verdicts_on_nodes(student)):
        if verdict not in excused:
            raise VerificationError(f"onnx.checker refuses the student: {verdict}")


def _verdict(model: ir.Model) -> str | None:
    """The first complaint of `onnx.checker` about a whole model; None where it has none."""
    with tempfile.TemporaryDirectory(prefix="ndonnx-") as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            return first_line(error)
    return None


def _verdicts_on_nodes(model: ir.Model) -> Iterator[str]:
    """The complaints of `onnx.checker` about single nodes: of a whole model it tells the first one only."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = dict(model.opset_imports)
    for graph in model.graphs():
        for node in graph:
            if any(True for _ in sub_graphs(node)):
                continue  # its branches read values that lie outside the node; their own nodes are looked at alone
            try:
                onnx.checker.check_node(ir.to_proto(node), context)
            except onnx.checker.ValidationError as error:
                yield first_line(error)


def _run(
    student: ir.Model, parts: Partition, names: list[str], probe: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Values inside the student, computed by onnxruntime, samples first."""
    opened = student.clone()
    values = ir.convenience.create_value_mapping(opened.graph)
    outputs = {value.name for value in opened.graph.outputs}
    inputs = {value.name for value in opened.graph.inputs}
    if missing := [name for name in names if name not in values and name not in inputs]:
        raise VerificationError(f"the student has no value '{missing[0]}', where a neighbourhood begins or ends")
    opened.graph.outputs.extend(values[name] for name in names if name not in outputs | inputs)
    located = ir.convenience.create_value_mapping(parts.model.graph, include_subgraphs=False)
    for value in opened.graph.outputs:
        if value.name in located:
            set_sample_axis(value, sample_axis(located[value.name]))
            value.shape = value.shape or located[value.name].shape
    try:
        session = make_session(samples_first(parts.interface.applied(opened)))
        wanted = [output.name for output in session.get_outputs()]
        found = dict(zip(wanted, session.run(wanted, dict(probe)), strict=True))
    except REFUSALS as error:
        raise VerificationError(f"onnxruntime does not run the student: {first_line(error)}") from error
    return found | {name: probe[name] for name in names if name in inputs}
