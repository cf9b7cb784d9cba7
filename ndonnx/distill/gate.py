"""The gate before any training: a slice must keep samples apart, and answer in torch as it does in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from ndonnx.convert import TorchSlice, check_parity, relative_error, to_torch
from ndonnx.errors import ParityError, first_line
from ndonnx.graph.dataflow import sub_graphs
from ndonnx.graph.shapes.declared import copy_of
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.working_copy import slice_batch
from ndonnx.teacher import input_type, make_session
from ndonnx.teacher.probe import run_held
from ndonnx.teacher.sessions import REFUSALS

Arrays = Mapping[str, npt.NDArray[Any]]
"""Inputs of a slice by name, float32 where floating; the first axis is the sample."""

_SAME = 1e-3
"""Largest difference, relative to the answer's scale, that the size of the batch alone may make."""


def free_batch(model: ir.Model, inputs: Sequence[str]) -> ir.Model:
    """Let a slice take any number of samples along the first axis of these inputs, whatever the teacher takes.

    Works in place and returns the slice.
    """
    fixed = [v for v in model.graph.inputs if v.name in inputs and v.shape and isinstance(v.shape[0], int)]
    if not fixed:
        return model
    for value in fixed:
        assert value.shape is not None
        value.shape = ir.Shape(["samples", *value.shape[1:]])
    _forget_shapes(model)
    return infer_shapes(model)


def free_sizes(model: ir.Model, examples: Sequence[Arrays]) -> ir.Model:
    """Let a slice take inputs of all these sizes: an axis that is not as long in each of them becomes a free one.

    Works in place and returns the slice.
    """
    changed = False
    for value in model.graph.inputs:
        shapes = [example[value.name or ""].shape[1:] for example in examples]
        free = {axis for axis, sizes in enumerate(zip(*shapes, strict=True), 1) if len(set(sizes)) > 1}
        if free and value.shape is not None:
            sizes = [f"{value.name}/{axis}" if axis in free else size for axis, size in enumerate(value.shape)]
            value.shape, changed = ir.Shape(sizes), True
    if not changed:
        return model
    _forget_shapes(model)
    return infer_shapes(model)


def of_sizes(model: ir.Model, probe: Arrays) -> ir.Model:
    """A model with control flow for inputs of these very sizes, samples aside, so that what asks for sizes is known.

    Args:
        model: with the samples along the first axis of its inputs; not changed.
        probe: several samples of its inputs.

    Returns:
        A copy; the model itself where it holds no control flow.
    """
    if not any(True for node in model.graph for _ in sub_graphs(node)):
        return model
    copy = copy_of(model)
    for value in copy.graph.inputs:
        rows = probe.get(value.name or "")
        if rows is not None and value.shape is not None and len(value.shape) == rows.ndim:
            value.shape = ir.Shape([value.shape[0], *rows.shape[1:]])
    _forget_shapes(copy)
    return infer_shapes(copy)


def _forget_shapes(model: ir.Model) -> None:
    for node in model.graph:
        for value in node.outputs:
            value.shape = None


def open_slice(model: ir.Model, inputs: Sequence[str], probe: Arrays, threads: int = 1) -> ir.Model:
    """A slice as it is run: with any number of samples at once, where it then answers each as it does alone.

    Args:
        model: a slice, perhaps of a teacher that takes a fixed number of samples at a time.
        inputs: those with samples along the first axis.
        probe: several samples of all inputs.
        threads: for onnxruntime.

    Returns:
        The slice; with the teacher's own batch at its inputs where its numbers hold that.

    Raises:
        ParityError: onnxruntime does not run the slice as the teacher does.
    """
    if slice_batch(model) is None:
        return free_batch(model, inputs)
    freed = free_batch(model.clone(), inputs)
    expected = answer(model, probe, threads)
    try:
        found = answer(freed, probe, threads)
    except ParityError:
        return model
    apart = found.shape == expected.shape and relative_error(found, expected) <= _SAME
    return freed if apart else model


def answer(model: ir.Model, probe: Arrays, threads: int = 1) -> npt.NDArray[Any]:
    """What onnxruntime makes of the probe, in the types of the slice's inputs: its one output.

    Raises:
        ParityError: onnxruntime does not run the slice.
    """
    try:
        session = make_session(model, threads=threads)
        names = [model.graph.outputs[0].name or ""]
        inputs = {value.name or "": value for value in model.graph.inputs}  # old files list their weights among them
        feeds = {name: rows.astype(input_type(inputs[name], rows)) for name, rows in probe.items() if name in inputs}
        found: npt.NDArray[Any] = run_held(session, names, feeds, slice_batch(model))[0]
    except REFUSALS as error:
        raise ParityError(f"onnxruntime does not run the slice: {first_line(error)}") from error
    return found


def pass_gate(
    model: ir.Model,
    probe: Arrays,
    tolerance: float,
    threads: int = 1,
    shape: tuple[int, ...] | None = None,
    sampled: Sequence[str] = (),
) -> tuple[TorchSlice, float]:
    """The slice as a torch module, and the largest error of its answer relative to the output's scale.

    Args:
        model: a slice (constants folded, one output).
        probe: several samples of its inputs.
        tolerance: largest relative error that passes; a larger one does where it is rounding (`check_parity`).
        threads: for onnxruntime.
        shape: what the teacher's activations have for these samples, where that is to be checked too.
        sampled: inputs with samples along the first axis, where it is to be checked that none of them changes the
            answer to another.

    Raises:
        ConversionError: an operator does not convert, or a value is no float32.
        ParityError: onnxruntime does not run the slice, torch answers differently, or the slice does not
            keep the samples of a batch apart.
    """
    module = to_torch(model)
    expected = answer(model, probe, threads)
    error = check_parity(module, _in_order(model, probe), expected, tolerance, strict=False)
    if shape is not None and expected.shape != shape:
        raise ParityError(
            f"several samples at once give '{model.graph.outputs[0].name}' the shape {expected.shape} instead of "
            f"{shape}; export the teacher with a dynamic batch dimension"
        )
    if sampled:
        _check_apart(model, probe, expected, sampled, threads)
    return module, error


def _check_apart(
    model: ir.Model, probe: Arrays, expected: npt.NDArray[Any], sampled: Sequence[str], threads: int
) -> None:
    """Compare the answers to some samples alone with those that they have among all.

    Raises:
        ParityError: they differ: trained on samples in other company, a student would learn something else.
    """
    some = slice(None, None, 2)
    alone = answer(model, {name: rows[some] if name in sampled else rows for name, rows in probe.items()}, threads)
    name, count = model.graph.outputs[0].name, min(len(probe[name]) for name in sampled)
    if expected.ndim == 0 or len(expected) != count or alone.shape != expected[some].shape:
        raise ParityError(f"'{name}' holds no answer of its own for each sample of a batch: {list(expected.shape)}")
    if not relative_error(alone, expected[some]) <= _SAME:
        raise ParityError(
            f"'{name}' mixes the samples of a batch: a sample's answer depends on which others come with it"
        )


def check_answer(module: TorchSlice, model: ir.Model, probe: Arrays, tolerance: float, threads: int = 1) -> float:
    """Compare a module with the ONNX slice that was written from it; the relative error.

    Raises:
        ParityError: as `pass_gate`.
    """
    expected = answer(model, probe, threads)
    return check_parity(module, _in_order(model, probe), expected, tolerance, strict=False)


def _in_order(model: ir.Model, probe: Arrays) -> list[npt.NDArray[Any]]:
    return [probe[value.name or ""] for value in model.graph.inputs]
