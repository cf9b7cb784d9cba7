"""One model through every stage: open, partition, the gates of a distillation, and two runs of `compress`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from benchmarks.coverage.findings import Coverage
from benchmarks.coverage.weights import shares
from ndonnx.api.compress import CompressResult, compress
from ndonnx.assemble.splice import splice
from ndonnx.config.recipe import Recipe
from ndonnx.convert import to_torch
from ndonnx.data import InputSpec, input_specs
from ndonnx.data.synthetic import made_up_samples
from ndonnx.distill.gate import free_batch
from ndonnx.errors import NdonnxError, SliceError
from ndonnx.flow.prepare import partition_model
from ndonnx.graph import load
from ndonnx.graph.dataflow import real_inputs
from ndonnx.metrics.check import boundary, check_neighbourhood
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.teacher import ActivationStore, CaptureSettings, capture, make_session

KEEP = 0.5
_SAMPLES = 4
"""Samples that slices are checked on."""
_COPIES = 4
"""Times that they are repeated for a run of `compress`, ..."""
_JITTER = 0.1
"""... floats with noise of this part of their deviation: what is held out must not be what was fitted."""
_BATCH = 4

Arrays = Mapping[str, NDArray[Any]]


def measure(path: Path, steps: int = 0) -> Coverage:
    """Take one model through the stages; a stage that fails is noted and ends what builds on it.

    Args:
        path: the model; samples of its inputs may lie beside it in a `.npz` of the same name.
        steps: of the student at half the width; 0 leaves both runs of `compress` out.
    """
    found = Coverage(path.stem)
    began = time.perf_counter()
    try:
        _measure(path, steps, found)
    except Exception as error:  # a tool that looks for bugs must survive them
        found.fail("crash", "", error)
    found.seconds = round(time.perf_counter() - began, 2)
    return found


def _measure(path: Path, steps: int, found: Coverage) -> None:
    try:
        teacher = load(path)
        specs = input_specs(make_session(path, threads=1))
    except NdonnxError as error:
        found.fail("open", "", error)
        return
    found.opens = True
    began = time.perf_counter()
    parts = partition_model(teacher, Recipe())
    found.seconds_to_partition = round(time.perf_counter() - began, 3)
    found.nodes = sum(1 for _ in parts.model.graph)
    shares(parts, found)
    batch = next((spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)), None)
    samples = _samples(path, specs, parts, batch)
    if parts.distillable:
        _slices(found, parts, samples, batch)
    _respliced(found, teacher, parts, _first(samples, batch or 2))
    if steps and parts.distillable:
        _identity(found, path, samples, batch)
        _student(found, path, parts, samples, batch, steps)


def _samples(path: Path, specs: Sequence[InputSpec], parts: Partition, batch: int | None) -> Arrays:
    """The samples beside the model, or made-up ones."""
    beside = path.with_suffix(".npz")
    if beside.is_file():
        with np.load(beside, allow_pickle=False) as arrays:
            return {spec.name: arrays[spec.name] for spec in specs}
    count = (batch or 1) * -(-_SAMPLES // (batch or 1))
    return made_up_samples(specs, parts.model.graph, Recipe().data, count)


def _first(samples: Arrays, count: int) -> dict[str, NDArray[Any]]:
    return {name: array[:count] for name, array in samples.items()}


def _slices(found: Coverage, parts: Partition, samples: Arrays, batch: int | None) -> None:
    """Take every slice through the gates, on captured activations."""
    count = len(next(iter(samples.values())))
    size = batch or count
    batches = [{name: rows[i : i + size] for name, rows in samples.items()} for i in range(0, count, size)]
    with tempfile.TemporaryDirectory(prefix="ndonnx-") as folder:
        names = boundary(parts.distillable)
        store = capture(
            parts.model,
            names,
            lambda: batches,
            Path(folder) / "store",
            samples=count,
            settings=CaptureSettings(threads=1),
        )
        for neighbourhood in parts.distillable:
            try:
                error = check_neighbourhood(parts, neighbourhood, store, Recipe())
            except SliceError as refused:
                found.fail("parity", neighbourhood.name, refused, neighbourhood.nodes)
            except Exception as bug:  # a tool that looks for bugs must survive them
                found.fail("bug in a gate", neighbourhood.name, bug, neighbourhood.nodes)
            else:
                found.parity += 1
                found.worst_error = max(error, found.worst_error or 0.0)
                found.trains += _trains(found, parts, neighbourhood, store)


def _trains(found: Coverage, parts: Partition, neighbourhood: Neighbourhood, store: ActivationStore) -> bool:
    """Whether a gradient reaches every weight of the slice."""
    names = boundary([neighbourhood])[:-1]
    model = free_batch(parts.slice_of(neighbourhood), [name for name in names if not store.is_constant(name)])
    module = to_torch(model)
    arrays = [np.array(store.array(name)) for name in module.input_names]
    floats = [array.astype(np.float32) if array.dtype.kind == "f" else array for array in arrays]
    try:
        (module(*map(torch.from_numpy, floats)) ** 2).mean().backward()
    except Exception as error:  # a converted graph may fail in as many ways as there are operators
        found.fail("gradient", neighbourhood.name, error, neighbourhood.nodes)
        return False
    named = zip(module.weight_names, module.weights, strict=True)
    without = [name for name, weight in named if weight.requires_grad and weight.grad is None]
    if without:
        found.fail("gradient", neighbourhood.name, f"no gradient reaches {', '.join(without)}", neighbourhood.nodes)
    return not without


def _respliced(found: Coverage, teacher: ir.Model, parts: Partition, probe: Arrays) -> None:
    """Splice the teacher's own slices in: bit for bit the same without onnxruntime's optimisations, which fuse."""
    try:
        same = splice(teacher, {n.name: parts.slice_of(n) for n in parts.distillable})
        ours, theirs = (_answers(make_session(m, threads=1, optimise=False), probe) for m in (same, teacher))
    except Exception as error:  # splicing works on graphs of any make: whatever it raises is the finding
        found.respliced = False
        found.fail("splice", "", error)
        return
    found.respliced = _equal(found, "splice", ours, theirs)


def _identity(found: Coverage, path: Path, samples: Arrays, batch: int | None) -> None:
    """`--keep 1.0 --steps 0`."""
    with tempfile.TemporaryDirectory(prefix="ndonnx-") as folder:
        done = _compress(found, "identity", path, samples, Path(folder), keep=1.0, steps=0)
        found.identity = False
        if done is not None:
            probe = _first(samples, batch or 2)
            student, teacher = (make_session(p, threads=1) for p in (Path(folder) / "student.onnx", path))
            found.identity = _equal(found, "identity", _answers(student, probe), _answers(teacher, probe))


def _student(
    found: Coverage, path: Path, parts: Partition, samples: Arrays, batch: int | None, steps: int
) -> None:  # fmt: skip
    """`--keep 0.5 --steps N`: how many are distilled, what they weigh, and whether the student is a drop-in."""
    with tempfile.TemporaryDirectory(prefix="ndonnx-") as folder:
        done = _compress(found, "compress", path, samples, Path(folder), keep=KEEP, steps=steps)
        found.student_runs = False
        if done is None:
            return
        before = {n.name: n.parameters for n in parts.distillable}
        reports = [n for n in done.report.neighbourhoods if n.name in before]
        found.ratio = sum(n.parameters for n in reports) / max(1, sum(before.values()))
        found.distilled = sum(n.status == "distilled" for n in reports)
        refused = {failure.where for failure in found.failures}
        for n in reports:
            if n.status != "distilled" and n.name not in refused:
                found.fail("compress", n.name, n.reason)
        student = Path(folder) / "student.onnx"
        found.interface = _interface(student) == _interface(path)
        if not found.interface:
            found.fail("interface", "", f"the student has {_interface(student)}, the teacher {_interface(path)}")
        try:
            session = make_session(student, threads=1)
            _answers(session, _first(samples, batch or 2))
            found.student_runs = True
            if batch is None:
                found.other_batch = False
                _answers(session, samples)
                _answers(session, _first(samples, 1))
                found.other_batch = True
        except Exception as error:  # onnxruntime's errors share no base class
            found.fail("student", "", error)


def _compress(
    found: Coverage, stage: str, path: Path, samples: Arrays, folder: Path, **settings: Any
) -> CompressResult | None:
    data = folder / "data.npz"
    np.savez(data, allow_pickle=False, **{name: _more(rows) for name, rows in samples.items()})
    recipe = Recipe(executor="serial", batch_size=_BATCH, device="cpu", **settings)
    try:
        return compress(path, data=str(data), recipe=recipe, output=folder / "student.onnx")
    except Exception as error:  # whatever it raises is the finding
        found.fail(stage, "", error)
        return None


def _more(rows: NDArray[Any]) -> NDArray[Any]:
    """Several times as many samples, alike but not the same where they are real numbers and vary at all."""
    copies = np.concatenate([rows] * _COPIES)
    if copies.dtype.kind == "f" and np.isfinite(copies).all():
        noise = np.random.default_rng(0).standard_normal(copies.shape) * (_JITTER * copies.std())
        noise[: len(rows)] = 0
        copies = (copies + noise).astype(rows.dtype)
    return copies


def _answers(session: Any, feeds: Arrays) -> dict[str, NDArray[Any]]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _equal(found: Coverage, stage: str, ours: Arrays, theirs: Arrays) -> bool:
    wrong = [name for name in theirs if not np.array_equal(ours[name], theirs[name], equal_nan=True)]
    if wrong:
        found.fail(stage, "", f"not bit for bit the teacher's: {', '.join(wrong)}")
    return not wrong


def _interface(path: Path) -> list[tuple[str | None, str, str]]:
    """Names, types and axes of inputs and outputs, as the file states them."""
    graph = load(path).graph
    return [(value.name, str(value.dtype), str(value.shape)) for value in (*real_inputs(graph), *graph.outputs)]
