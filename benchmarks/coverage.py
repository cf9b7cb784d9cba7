"""Which teachers the method reaches: the corpus, and any ONNX files, taken through every stage but training.

    python -m benchmarks.coverage [MODEL_OR_DIR ...] --out coverage.json [--only NAME] [--cache DIR] [--steps N]

For each model: does it open; how long does the partition take and what share of its weights can
be distilled (embedding tables and the last classifier aside); does every slice answer in torch as
in onnxruntime, and does it train; is the teacher with its own slices spliced in bit for bit the
teacher; does a student of half the width run, with another batch size too. With `--steps` the
whole of `ndonnx compress` runs as well. Without MODEL_OR_DIR the corpus of `benchmarks.corpus` is
exported, both ways. Each export and each model has a process of its own and a time limit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from benchmarks.common import boundary, machine, machine_line, percent, positive, print_table, run, write_json
from ndonnx.convert import TorchSlice, check_parity, relative_error, to_torch
from ndonnx.data import InputSpec, input_specs
from ndonnx.errors import NdonnxError, SliceError, UsageError, VerificationError
from ndonnx.graph import load, save, slice_cost
from ndonnx.graph.costs import constant_of, is_weight
from ndonnx.graph.dataflow import reads
from ndonnx.partition import ChannelGroups, Neighbourhood, Partition
from ndonnx.pipeline import compress, partition_model
from ndonnx.recipe import Recipe
from ndonnx.splice import splice
from ndonnx.students import TeacherSlice
from ndonnx.students.width import check_by_zeroing, kept_width, shrink
from ndonnx.teacher import make_session
from ndonnx.verify import verify

PARITY = 1e-4
"""Largest error of a converted slice, relative to its output's scale."""
KEEP = 0.5
_PROBE = 2
"""Samples of the teacher's own batch; students are run on all there are as well."""
_TIME_LIMIT = 300
_GUESSED = {"images": 224, "tokens": 16}
_SAMPLES = 4
_ONE = "--one"
"""Hidden flag: measure one file in this process and print JSON."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass
class Failure:
    """Something that did not work, and where."""

    stage: str
    where: str
    reason: str
    operators: list[str] = field(default_factory=list)
    """Operators of the slice, most frequent first."""


@dataclass
class Kept:
    """A piece with weights that cannot be distilled."""

    name: str
    share: float
    reason: str
    operators: list[str]


@dataclass
class Coverage:
    """What became of one model. Shares are of weights, embeddings and the last classifier aside, 0 to 1."""

    model: str
    opens: bool = False
    seconds_to_partition: float | None = None
    nodes: int = 0
    neighbourhoods: int = 0
    distillable: int = 0
    share: float | None = None
    largest: float | None = None
    parity: int = 0
    trains: int = 0
    worst_error: float | None = None
    shrunk: int = 0
    identity: bool | None = None
    """Outputs of the teacher with its own slices spliced in equal the teacher's bit for bit, without optimisation."""
    identity_optimised: float | None = None
    """The same with onnxruntime's optimisations, which may fuse other nodes: largest difference, relative."""
    student_runs: bool | None = None
    other_batch: bool | None = None
    """None where the model fixes its batch."""
    ratio: float | None = None
    """Weights of all distillable neighbourhoods, student's over teacher's."""
    distilled: int | None = None
    """Neighbourhoods that `compress` distilled; None without `--steps`."""
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    def fail(self, stage: str, where: str, reason: object, nodes: Iterable[ir.Node] = ()) -> None:
        """Take note of something that did not work."""
        text = str(reason)
        if isinstance(reason, Exception) and not isinstance(reason, NdonnxError):
            last = traceback.extract_tb(reason.__traceback__)[-1:]
            ours = [frame for frame in traceback.extract_tb(reason.__traceback__) if "/ndonnx/" in frame.filename]
            at = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in ours[-1:] or last)
            text = f"{type(reason).__name__}{at}: {reason}"
        self.failures.append(Failure(stage, where, " ".join(text.split())[:400], _operators(nodes)))


def measure(path: Path, steps: int = 0) -> Coverage:
    """Take one model through the stages; a stage that fails is noted and ends what builds on it."""
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
        session = make_session(path, threads=1)
    except NdonnxError as error:
        found.fail("open", "", error)
        return
    found.opens = True
    specs = input_specs(session)
    samples = _samples(path, specs)
    began = time.perf_counter()
    parts = partition_model(teacher, Recipe())
    found.seconds_to_partition = round(time.perf_counter() - began, 3)
    found.nodes = sum(1 for _ in parts.model.graph)
    _shares(parts, found)
    fixed = any(isinstance(spec.shape[0], int) for spec in specs if spec.shape)
    probe = samples if fixed else {name: array[:_PROBE] for name, array in samples.items()}
    captured = _captured(parts, probe)
    students, twins = {}, {}
    for neighbourhood in parts.distillable:
        model = parts.slice_of(neighbourhood)
        twins[neighbourhood.name] = model
        if _converts(found, neighbourhood, model, captured):
            found.parity += 1
        if (student := _shrunk(found, neighbourhood, model, captured)) is not None:
            students[neighbourhood.name] = student
    found.shrunk = len(students)
    _identity(found, teacher, twins, probe)
    _student(found, teacher, parts, students, probe, None if fixed else samples)
    if steps:
        _compress(found, path, samples, steps, {n.name for n in parts.distillable})


def _samples(path: Path, specs: Sequence[InputSpec]) -> dict[str, NDArray[Any]]:
    """The samples beside the model, or random ones of the shapes that its inputs state."""
    beside = path.with_suffix(".npz")
    if beside.is_file():
        with np.load(beside, allow_pickle=False) as arrays:
            return {spec.name: arrays[spec.name] for spec in specs}
    rng = np.random.default_rng(0)
    return {spec.name: _drawn(spec, rng) for spec in specs}


def _drawn(spec: InputSpec, rng: np.random.Generator) -> NDArray[Any]:
    guess = _GUESSED["images"] if len(spec.shape) == 4 else _GUESSED["tokens"]
    sizes = [size if isinstance(size, int) else (guess if axis else _SAMPLES) for axis, size in enumerate(spec.shape)]
    if spec.is_float:
        return rng.standard_normal(sizes).astype(spec.dtype)
    return rng.integers(0, 2, sizes).astype(spec.dtype)


def _shares(parts: Partition, found: Coverage) -> None:
    """Which part of the weights lies in distillable neighbourhoods, and what is kept."""
    aside = _embeddings(parts.model.graph) | _classifiers(parts.model.graph)
    total = _size(_weights(parts.model.graph) - aside)
    found.neighbourhoods, found.distillable = len(parts.neighbourhoods), len(parts.distillable)
    sizes = {n.name: _size(_weights(n.nodes) - aside) for n in parts.neighbourhoods}
    inside = set().union(*(_weights(n.nodes) for n in parts.distillable)) - aside
    found.share = _size(inside) / total if total else 0.0
    found.largest = max((sizes[n.name] for n in parts.distillable), default=0) / total if total else 0.0
    for n in sorted(parts.neighbourhoods, key=lambda n: -sizes[n.name]):
        if not n.distillable and total and sizes[n.name] > 0.001 * total:
            found.kept.append(Kept(n.name, sizes[n.name] / total, n.reason or "", _operators(n.nodes)))


def _weights(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    return {value for node in nodes for value in reads(node) if is_weight(value)}


def _size(values: Iterable[ir.Value]) -> int:
    return sum(int(tensor.size) for value in values if (tensor := constant_of(value)) is not None)


def _embeddings(graph: ir.Graph) -> set[ir.Value]:
    """Tables that a `Gather` reads rows of."""
    heads = (node.inputs[0] for node in graph if node.op_type == "Gather")
    return {value for value in heads if value is not None and is_weight(value)}


_LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_PASS = {
    "Add", "Cast", "Concat", "Div", "Flatten", "Identity", "LogSoftmax", "Mul", "Reshape", "Resize", "Sigmoid",
    "Slice", "Softmax", "Squeeze", "Tanh", "Transpose", "Unsqueeze",
}  # fmt: skip


def _classifiers(graph: ir.Graph) -> set[ir.Value]:
    """Weights of linear operators whose output is the model's, but for a change of form."""
    found: set[ir.Value] = set()
    stack, seen = list(graph.outputs), set()
    while stack:
        value = stack.pop()
        node = value.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in _LINEAR:
            found |= _weights([node])
            continue
        inputs = [v for v in node.inputs if v is not None and constant_of(v) is None]
        # A sum of two activations closes a residual unit: what is behind it is no classifier.
        if node.op_type == "Concat" or (node.op_type in _PASS and len(inputs) == 1):
            stack += inputs
            found |= _weights([node])
    return found


def _captured(parts: Partition, probe: Arrays) -> dict[str, NDArray[Any]]:
    """What goes in and out of every distillable neighbourhood, from one run of the teacher."""
    opened = parts.model.clone()
    values = ir.convenience.create_value_mapping(opened.graph)
    present = {value.name for value in (*opened.graph.outputs, *opened.graph.inputs)}
    wanted = boundary(parts.distillable)
    opened.graph.outputs.extend(values[name] for name in wanted if name not in present)
    names = [name for name in wanted if name not in probe]
    if not names:
        return dict(probe)
    answers = make_session(opened, threads=1).run(names, dict(probe))
    return dict(zip(names, answers, strict=True)) | dict(probe)


def _converts(found: Coverage, neighbourhood: Neighbourhood, model: ir.Model, captured: Arrays) -> bool:
    """Whether the slice answers in torch as in onnxruntime; notes too whether all its weights get a gradient."""
    names = [value.name or "" for value in model.graph.inputs]
    inputs = [captured[name] for name in names]
    try:
        expected = make_session(model, threads=1).run(None, dict(zip(names, inputs, strict=True)))[0]
    except Exception as error:  # onnxruntime's errors share no base class
        found.fail("slice runs", neighbourhood.name, error, neighbourhood.nodes)
        return False
    try:
        module = to_torch(model)
        difference = check_parity(module, inputs, expected, PARITY)
    except SliceError as refused:
        found.fail("parity", neighbourhood.name, refused, neighbourhood.nodes)
        return False
    found.worst_error = max(difference, found.worst_error or 0.0)
    found.trains += _trains(found, neighbourhood, module, inputs)
    return True


def _trains(found: Coverage, neighbourhood: Neighbourhood, module: TorchSlice, inputs: list[NDArray[Any]]) -> bool:
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs]
    try:
        (module(*tensors) ** 2).mean().backward()
    except Exception as error:  # a converted graph may fail in as many ways as there are operators
        found.fail("gradient", neighbourhood.name, error, neighbourhood.nodes)
        return False
    named = zip(module.weight_names, module.weights, strict=True)
    without = [name for name, weight in named if weight.requires_grad and weight.grad is None]
    if without:
        found.fail("gradient", neighbourhood.name, f"no gradient reaches {', '.join(without)}", neighbourhood.nodes)
    return not without


def _shrunk(found: Coverage, neighbourhood: Neighbourhood, model: ir.Model, captured: Arrays) -> ir.Model | None:
    """The slice at half its width, with the teacher's weights; None when it cannot be had."""
    assert neighbourhood.groups is not None
    samples = {value.name or "": captured[value.name or ""] for value in model.graph.inputs}
    teacher = TeacherSlice(neighbourhood.name, model, neighbourhood.groups, samples)
    try:
        # Any units will do: ranking them takes longest, and an arbitrary choice tests the groups harder.
        kept = _any_units(neighbourhood.groups, np.random.default_rng(0))
        student = shrink(model, neighbourhood.groups, kept)
        check_by_zeroing(teacher, student, kept)
        expected = make_session(student, threads=1).run(None, dict(samples))[0]
    except Exception as error:  # shrinking works on graphs of any make: whatever it raises is the finding
        found.fail("shrink", neighbourhood.name, error, neighbourhood.nodes)
        return None
    try:
        check_parity(to_torch(student), list(samples.values()), expected, PARITY)
    except SliceError as error:
        # Where the slice itself does not convert, that has been said.
        if not any(f.stage == "parity" and f.where == neighbourhood.name for f in found.failures):
            found.fail("shrunk parity", neighbourhood.name, error, neighbourhood.nodes)
    return student


def _any_units(groups: ChannelGroups, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Half of every group's units, drawn at random."""
    kept = np.zeros(groups.units, dtype=bool)
    for group in groups.groups:
        kept[group.start + rng.permutation(group.width)[: kept_width(group.width, KEEP, None)]] = True
    return kept


def _identity(found: Coverage, teacher: ir.Model, twins: Mapping[str, ir.Model], probe: Arrays) -> None:
    try:
        same = splice(teacher, twins)
        ours, theirs = (
            make_session(model, threads=1, optimise=False).run(None, dict(probe)) for model in (same, teacher)
        )
        fused = [make_session(model, threads=1).run(None, dict(probe)) for model in (same, teacher)]
        found.identity_optimised = max(relative_error(*pair) for pair in zip(*fused, strict=True))
    except Exception as error:  # splicing works on graphs of any make: whatever it raises is the finding
        found.identity = False
        found.fail("identity splice", "", error)
        return
    names = [value.name for value in teacher.graph.outputs]
    wrong = [name for name, a, b in zip(names, ours, theirs, strict=True) if not np.array_equal(a, b, equal_nan=True)]
    found.identity = not wrong
    if wrong:
        found.fail("identity splice", "", f"not bit for bit the teacher's: {', '.join(map(str, wrong))}")


def _student(
    found: Coverage, teacher: ir.Model, parts: Partition, students: Mapping[str, ir.Model], probe: Arrays,
    others: Arrays | None,
) -> None:  # fmt: skip
    """Splice the shrunk slices in, and run the student as the teacher ran and with another batch size."""
    if not students:
        return
    by_name = {n.name: n for n in parts.distillable}
    before = sum(by_name[name].cost.parameters for name in students)
    found.ratio = sum(slice_cost(model).parameters for model in students.values()) / before
    try:
        spliced = splice(teacher, students)
        with tempfile.TemporaryDirectory(prefix="ndonnx-") as folder:
            path = Path(folder) / "student.onnx"
            save(spliced, path)
            session = make_session(path, threads=1)
            session.run(None, dict(probe))
        found.student_runs = True
        if others is not None:
            found.other_batch = False
            session.run(None, dict(others))
            session.run(None, {name: array[:1] for name, array in others.items()})
            found.other_batch = True
    except Exception as error:  # as above
        found.student_runs = bool(found.student_runs)
        found.fail("student", "", error)
        return
    at_parity = {
        name: model
        for name, model in students.items()
        if not any(f.where == name and "parity" in f.stage for f in found.failures)
    }
    try:
        verify(teacher, spliced, parts, at_parity, probe, PARITY)
    except VerificationError as error:
        found.fail("verify", "", error)


def _compress(found: Coverage, path: Path, samples: Arrays, steps: int, wanted: set[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="ndonnx-") as folder:
        data = Path(folder) / "data.npz"
        np.savez(data, allow_pickle=False, **{name: np.concatenate([array] * 8) for name, array in samples.items()})
        recipe = Recipe(keep=KEEP, steps=steps, executor="serial", batch_size=8, init="teacher", round_to=None)
        try:
            done = compress(path, data=str(data), recipe=recipe, output=Path(folder) / "student.onnx")
        except Exception as error:  # whatever it raises is the finding
            found.fail("compress", "", error)
            return
    found.distilled = sum(n.status == "distilled" for n in done.report.neighbourhoods)
    for n in done.report.neighbourhoods:
        if n.name in wanted and n.status != "distilled":
            found.fail("compress", n.name, n.reason)


def _operators(nodes: Iterable[ir.Node]) -> list[str]:
    return [name for name, _ in Counter(node.op_type for node in nodes).most_common()]


# ---- the run over many models ------------------------------------------------------------------


def cover(paths: Iterable[Path], steps: int, limit: int) -> list[Coverage]:
    """Measure files one after another, each in a process of its own."""
    found = []
    for path in paths:
        found.append(_in_process(path, steps, limit))
        print(_line(found[-1]), file=sys.stderr, flush=True)
    return found


def _in_process(path: Path, steps: int, limit: int) -> Coverage:
    command = [sys.executable, "-m", "benchmarks.coverage", _ONE, str(path), "--steps", str(steps)]
    done = _run(command, limit)
    if isinstance(done, str):
        lost = Coverage(path.stem)
        lost.fail("process", "", done)
        return lost
    return _read(json.loads(done.stdout.splitlines()[-1]))


def _run(command: list[str], limit: int) -> subprocess.CompletedProcess[str] | str:
    """A finished process, or why there is none."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=False, env={**os.environ, **threads}
        )
    except subprocess.TimeoutExpired:
        return f"not done after {limit} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return lines[-1]
    return done


def _read(document: dict[str, Any]) -> Coverage:
    document["failures"] = [Failure(**entry) for entry in document["failures"]]
    document["kept"] = [Kept(**entry) for entry in document["kept"]]
    return Coverage(**document)


def exported(only: Sequence[str], cache: Path, limit: int, skipped: dict[str, str]) -> Iterable[Path]:
    """The corpus as files, exported where the cache does not hold them; failed exports go into `skipped`."""
    try:
        from benchmarks.corpus import CORPUS, EXPORTERS  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(f"the corpus needs {error.name}: pip install 'ndonnx-compress[coverage]'") from error
    names = [name for name in CORPUS if not only or any(re.fullmatch(pattern, name) for pattern in only)]
    if not names:
        raise UsageError(f"--only {' '.join(only)}: no such model; known: {', '.join(CORPUS)}")
    for name in names:
        for exporter in EXPORTERS:
            path = cache / f"{name}.{exporter}.onnx"
            if not path.is_file():
                done = _run([sys.executable, "-m", "benchmarks.corpus", name, exporter, str(cache)], limit)
                if isinstance(done, str):
                    skipped[path.stem] = done
                    print(f"{path.stem}: not exported: {done}", file=sys.stderr, flush=True)
                    continue
            yield path


def files_of(given: Iterable[Path]) -> list[Path]:
    """The models named, and those in the folders named."""
    found: list[Path] = []
    for path in given:
        inside = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
        if not inside or not inside[0].is_file():
            raise UsageError(f"{path}: no such model, or a folder without one")
        found += inside
    return found


_COLUMNS = (
    "model", "opens", "s", "nodes", "pieces", "weights", "largest", "parity", "trains", "shrunk", "k=0.5", "identity",
    "fused", "runs", "batch",
)  # fmt: skip


def _row(c: Coverage) -> list[str]:
    return [
        c.model,
        _mark(c.opens),
        "-" if c.seconds_to_partition is None else f"{c.seconds_to_partition:.2f}",
        str(c.nodes),
        f"{c.distillable}/{c.neighbourhoods}",
        percent(c.share),
        percent(c.largest),
        *(f"{count}/{c.distillable}" for count in (c.parity, c.trains, c.shrunk)),
        "-" if c.ratio is None else f"{c.ratio:.3f}",
        _mark(c.identity),
        "-" if c.identity_optimised is None else f"{c.identity_optimised:.0e}",
        *(_mark(flag) for flag in (c.student_runs, c.other_batch)),
    ]


def _line(c: Coverage) -> str:
    return "  ".join(f"{name} {text}" for name, text in zip(_COLUMNS[1:], _row(c)[1:], strict=True)).join(
        (f"{c.model}: ", "")
    )


def _mark(flag: bool | None) -> str:
    return "-" if flag is None else "yes" if flag else "NO"


_OWN_WORDS = re.compile(r"'[^']*'|\bn\d+\b|\([\d, ]+\)|\d+(?:\.\d+)?(?:e-?\d+)?|\b(?:node|val|view|add)_\w+")


def causes(found: Iterable[Coverage]) -> list[tuple[str, int, str]]:
    """Failures that read alike, the most frequent first: stage and reason, how many, and an example."""
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    for c in found:
        for f in c.failures:
            key = f"{f.stage}: {_OWN_WORDS.sub('~', f.reason)[:160]}"
            counts[key] += 1
            example.setdefault(key, f"{c.model} {f.where}: {f.reason}")
    return [(key, count, example[key]) for key, count in counts.most_common()]


def summary(found: Sequence[Coverage]) -> dict[str, Any]:
    """Medians and minima over the models, and how many passed every check."""
    opened = [c for c in found if c.opens and c.share is not None]
    shares = [c.share for c in opened if c.share is not None]
    ratios = [c.ratio for c in opened if c.ratio is not None]
    parity = [c.parity / c.distillable for c in opened if c.distillable]
    return {
        "models": len(found),
        "clean": sum(c.opens and not c.failures for c in found),
        "open": sum(c.opens for c in found),
        "share_median": statistics.median(shares) if shares else None,
        "share_min": min(shares, default=None),
        "parity_median": statistics.median(parity) if parity else None,
        "parity_min": min(parity, default=None),
        "slices": sum(c.distillable for c in found),
        "slices_at_parity": sum(c.parity for c in found),
        "slices_shrunk": sum(c.shrunk for c in found),
        "largest_median": statistics.median(c.largest or 0.0 for c in opened) if opened else None,
        "ratio_median": statistics.median(ratios) if ratios else None,
        "identity": sum(c.identity is True for c in found),
        "student_runs": sum(c.student_runs is True for c in found),
    }


def _summary_line(s: Mapping[str, Any]) -> str:
    return (
        f"{s['models']} models, {s['open']} open, {s['clean']} without any failure; distillable weights: "
        f"median {percent(s['share_median'])}, least {percent(s['share_min'])}; slices at parity: "
        f"{s['slices_at_parity']} of {s['slices']} (least {percent(s['parity_min'])}), shrunk {s['slices_shrunk']}; "
        f"largest piece: median {percent(s['largest_median'])}; k=0.5 leaves {percent(s['ratio_median'])}; "
        f"identity {s['identity']}, student runs {s['student_runs']}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the files named, or the corpus; a table on stdout, everything in `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL_OR_DIR", help="ONNX files or folders of them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything found as JSON")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="models of the corpus (a pattern)")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where exports are kept (default: a temporary folder)"
    )
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="also run `compress` with N steps")
    parser.add_argument(
        "--time-limit", type=positive, default=_TIME_LIMIT, metavar="S", help="seconds for each process"
    )
    parser.add_argument(_ONE, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        torch.set_num_threads(1)
        print(json.dumps(asdict(measure(options.one, options.steps))))
        return
    skipped: dict[str, str] = {}
    found: list[Coverage] = []
    if options.models:
        found += cover(files_of(options.models), options.steps, options.time_limit)
    if options.only or not options.models:
        with tempfile.TemporaryDirectory(prefix="ndonnx-") as scratch:
            cache = options.cache or Path(scratch)
            cache.mkdir(parents=True, exist_ok=True)
            paths = exported(options.only, cache, options.time_limit, skipped)
            found += cover(paths, options.steps, options.time_limit)
    on = machine(Recipe())
    print_table(machine_line(on), _COLUMNS, [_row(c) for c in found])
    for key, count, example in causes(found):
        print(f"{count:4d} × {key}\n       {example}")
    for c in found:
        for piece in c.kept:
            print(f"kept {c.model} {piece.name} {piece.share:.1%}: {piece.reason} ({', '.join(piece.operators[:8])})")
    for name, reason in skipped.items():
        print(f"not exported {name}: {reason}")
    result = summary(found)
    print(_summary_line(result))
    if options.out is not None:
        document = {"machine": on, "summary": result, "models": [asdict(c) for c in found], "skipped": skipped}
        write_json(options.out, document)


if __name__ == "__main__":
    run(main)
