"""Custom students: the user's own torch modules, made for each slice by a function and brought into ONNX.

They are exported by the tracing exporter of `torch.onnx` (`dynamo=False`): it needs nothing beyond
torch and onnx, and writes any opset from 7 to 20, where the newer exporter needs onnxscript and
begins at 18. A teacher beyond these opsets is reached by onnx's version converter.
"""

from __future__ import annotations

import inspect
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from onnx import version_converter
from torch import Tensor, nn

from ndonnx.config.recipe import Recipe
from ndonnx.convert import relative_error
from ndonnx.data.user_code import import_function
from ndonnx.errors import RecipeError, ShrinkError
from ndonnx.graph import fold_constants
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.working_copy import slice_batch
from ndonnx.runtime.fingerprints import fingerprint_file
from ndonnx.students.base import Candidate, Spelled, StudentMethod, TeacherSlice
from ndonnx.students.factors import fit_of
from ndonnx.students.features import from_matrix
from ndonnx.students.last_layer import find_last_layer
from ndonnx.students.least_squares import MOST_FEATURES, Regression
from ndonnx.students.linear import every_reader, set_weight
from ndonnx.students.starting import Init

_EXPORTED = range(7, 21)
"""Opsets that the exporter writes."""
_TRACED = 2
"""Samples with which a module is traced."""
_TOLERANCE = 1e-4
"""Largest difference between them, relative to the answer's scale."""
_PLAIN = {"Gelu", "HardSigmoid", "HardSwish", "Identity", "Mish", "Relu", "Sigmoid", "Softplus", "Tanh"}
"""Activations that are the same in student and teacher if their operator and attributes are."""

Arrays = Sequence[npt.NDArray[np.generic]]


@dataclass(frozen=True)
class ValueType:
    """What a student's function is told of an input or the output of its slice."""

    name: str
    """As in the ONNX file."""
    dtype: str
    """numpy's name of the element type: `float32`."""
    shape: tuple[int | str | None, ...]
    """Sizes; the name of a symbolic one, None where it has none."""


@dataclass(frozen=True)
class Custom(StudentMethod):
    """Students from `module:function`, called as `function(inputs, output)` for every slice.

    The function gets a tuple of `ValueType` and one more, and returns a `torch.nn.Module`, which is
    called with the slice's inputs in that order and answers with a tensor of the output's shape.
    torch is seeded before it is called. With `init` `least-squares`, the last linear operator is
    fitted to the teacher; otherwise the student begins as the module is. Make one with `Custom.made_by`.
    """

    name = "custom"
    usage = "custom MODULE:FUNCTION"
    may_grow = True

    student: str
    init: Init
    folder: str
    """Where the module is looked for besides the installed ones: a worker may run elsewhere."""
    source: str
    """Digest of the module's file, by which a changed student is known to be another."""

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The method with the recipe's `student` and `init`; see `made_by`."""
        return cls.made_by(recipe.student, recipe.init)

    @classmethod
    def spelled(cls, words: Sequence[str]) -> Spelled:
        """Words that are one `module:function`; what a user's module weighs is not known before it is built."""
        (student,) = words
        if ":" not in student:
            raise ValueError("expected MODULE:FUNCTION")
        return Spelled(f"{cls.name} {student}", {"student": student}, 1.0)

    @classmethod
    def made_by(cls, student: str | None, init: Init = "least-squares") -> Self:
        """Look the function up now, so that a misspelt one ends the run before it begins.

        Raises:
            RecipeError: there is no such module or function.
        """
        if student is None:
            raise RecipeError("method 'custom' needs a student: give --student module:function")
        folder = os.getcwd()
        function = _resolve(student, folder)
        file = inspect.getsourcefile(function)
        return cls(student, init, folder, fingerprint_file(file) if file is not None else "")

    def _build(self, teacher: TeacherSlice, rng: np.random.Generator) -> Candidate:
        where = f"{teacher.name}: {self.student}"
        module = self._module(teacher, where, int(rng.integers(2**31)))
        few = teacher.few()
        exit_ = teacher.model.graph.outputs[0].name or ""
        given = [few.samples[value.name or ""] for value in teacher.model.graph.inputs]
        expected = few.run(teacher.model, [exit_])[exit_]
        answer = _answer(module, given, where)
        if answer.shape != expected.shape or answer.dtype != expected.dtype:
            raise ShrinkError(
                f"{where} answers {len(expected)} samples with {answer.dtype} {answer.shape}; "
                f"'{exit_}' is {expected.dtype} {expected.shape}"
            )
        student = _export(module, teacher, where)
        difference = relative_error(few.run(student, [exit_])[exit_], answer)
        if not difference <= _TOLERANCE:
            raise ShrinkError(
                f"{where}: the exported module differs from the module by {difference:.2g} of its scale; "
                "its forward must not decide by the values or the number of samples"
            )
        if self.init == "least-squares":
            student = _fit_end(teacher, student)
        return Candidate(f"custom {self.student}", student)

    def _module(self, teacher: TeacherSlice, where: str, seed: int) -> nn.Module:
        function = _resolve(self.student, self.folder)
        graph = teacher.model.graph
        inputs = tuple(_type_of(value, teacher) for value in graph.inputs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                module = function(inputs, _type_of(graph.outputs[0], teacher))
            except Exception as error:  # the user's own code may raise anything
                raise ShrinkError(f"{where} raised {_told(error)}") from error
        if not isinstance(module, nn.Module):
            raise ShrinkError(f"{where} returned {type(module).__name__}; expected a torch.nn.Module")
        return module.to("cpu").eval()


def _resolve(student: str, folder: str) -> Callable[..., Any]:
    module, colon, function = student.partition(":")
    if not (module and colon and function):
        raise RecipeError(f"student '{student}': expected module:function")
    return import_function(student, folder, RecipeError)


def _type_of(value: ir.Value, teacher: TeacherSlice) -> ValueType:
    assert value.dtype is not None
    return ValueType(value.name or "", value.dtype.numpy().name, tuple(_dims(value, teacher)))


def _dims(value: ir.Value, teacher: TeacherSlice) -> list[int | str | None]:
    if value.shape is not None:
        return [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    rows = teacher.samples.get(value.name or "")
    rank = rows.ndim if rows is not None else 0
    return [None] * rank


def _answer(module: nn.Module, given: Arrays, where: str) -> npt.NDArray[np.generic]:
    with torch.no_grad():
        try:
            answer = module(*_tensors(given))
        except Exception as error:  # the user's own code may raise anything
            raise ShrinkError(f"{where}: the module raised {_told(error)}") from error
    if not isinstance(answer, Tensor):
        raise ShrinkError(f"{where}: the module answered with {type(answer).__name__}; expected one tensor")
    found: npt.NDArray[np.generic] = answer.numpy()
    return found


def _tensors(arrays: Arrays) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.array(array)) for array in arrays)


def _told(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _export(module: nn.Module, teacher: TeacherSlice, where: str) -> ir.Model:
    """The module as a slice: the teacher's names at its ends, names of its own inside, the teacher's opset."""
    graph = teacher.model.graph
    opset = teacher.model.opset_imports.get("", 1)
    few = teacher.first(slice_batch(teacher.model) or _TRACED)
    inputs = [f"input{number}" for number in range(len(graph.inputs))]
    free = {
        name: {axis: f"{name}_{axis}" for axis, dim in enumerate(_dims(value, teacher)) if not isinstance(dim, int)}
        for name, value in zip(inputs, graph.inputs, strict=True)
    }
    written = min(max(opset, _EXPORTED.start), _EXPORTED.stop - 1)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="ndonnx-") as folder:
            warnings.simplefilter("ignore")  # that this exporter is the older one
            path = Path(folder, "student.onnx")
            torch.onnx.export(
                module,
                _tensors([few.samples[value.name or ""] for value in graph.inputs]),
                path,
                input_names=inputs,
                output_names=["output"],
                dynamic_axes={name: axes for name, axes in free.items() if axes},
                opset_version=written,
                dynamo=False,
            )
            proto = onnx.load(path)
        if written != opset:
            proto = version_converter.convert_version(proto, opset)
        model = fold_constants(ir.from_proto(proto))
    except Exception as error:  # exporter and converter fail in many ways; all mean that this student is not had
        raise ShrinkError(f"{where}: cannot be exported at the teacher's opset {opset}: {_told(error)}") from error
    return _adapt(model, teacher)


def _adapt(model: ir.Model, teacher: TeacherSlice) -> ir.Model:
    graph = model.graph
    ends = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    for value in list(ir.convenience.create_value_mapping(graph).values()):
        value.name = f"{teacher.name}/{value.name}"
        if value.producer() is not None:
            value.shape = None
    for node in graph:
        node.name = f"{teacher.name}/{node.name}"
    graph.inputs.clear()
    for number, theirs in enumerate(teacher.model.graph.inputs):
        ours = ends.get(f"input{number}") or ir.Value()
        ours.name, ours.type, ours.shape = theirs.name, theirs.type, theirs.shape
        graph.inputs.append(ours)
    output, theirs = ends["output"], teacher.model.graph.outputs[0]
    output.name, output.shape = theirs.name, theirs.shape
    model.ir_version = teacher.model.ir_version
    return infer_shapes(model)


def _fit_end(teacher: TeacherSlice, student: ir.Model) -> ir.Model:
    """Fit the last linear operator by least squares, where its answer can be told from the teacher's.

    What the operator is added to is made up for, and an activation behind it that ends the teacher too
    is looked through. Otherwise the student is returned as it is.
    """
    end = find_last_layer(student)
    target = _same_place(student, teacher.model, end.total) if end is not None else None
    reader = next((r for r in every_reader(student) if end is not None and r.node is end.node), None)
    if end is None or target is None or reader is None or reader.features > MOST_FEATURES:
        return student
    problem = Regression(reader.node, teacher.count)
    names = (end.data, reader.output, end.total)
    for samples, (theirs, ours) in teacher.batches((teacher.model, [target]), (student, names)):
        wanted = theirs[target]
        if ours[end.total].shape != wanted.shape or ours[reader.output].shape != wanted.shape:
            return student
        problem.add(samples, ours[end.data], ours[reader.output] + (wanted - ours[end.total]))
    fit = fit_of(reader, problem)
    weights = fit.problem.weights
    copy = student.clone()
    old = copy.graph.initializers[reader.weight].shape
    assert old is not None
    set_weight(copy, reader.weight, from_matrix(reader.node, weights, tuple(int(dim) for dim in old.numpy())))
    if reader.bias is not None:
        bias = copy.graph.initializers[reader.bias].shape
        assert bias is not None
        set_weight(copy, reader.bias, fit.offset(weights).reshape(tuple(int(dim) for dim in bias.numpy())))
    return copy


def _same_place(student: ir.Model, teacher: ir.Model, total: str) -> str | None:
    """The teacher's value before the activations that stand behind `total` in the student; None if it has others."""
    ours, theirs = student.graph.outputs[0], teacher.graph.outputs[0]
    while ours.name != total:
        one, other = ours.producer(), theirs.producer()
        if one is None or other is None or one.op_type not in _PLAIN or one.op_type != other.op_type:
            return None
        if {name: a.value for name, a in one.attributes.items()} != {n: a.value for n, a in other.attributes.items()}:
            return None
        before, wanted = one.inputs[0], other.inputs[0]
        if before is None or wanted is None:
            return None
        ours, theirs = before, wanted
    return theirs.name
