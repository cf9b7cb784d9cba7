"""Small models that once failed, compressed as a user would: the right value beside the value found.

    python -m benchmarks.cases FOLDER [--only NAME,NAME] [--jobs N] [--out FILE]

FOLDER holds pairs `NAME.onnx` and `NAME.npz` (valid inputs). Each model is compressed by the command line three
times: to half its width without and with fine-tuning, and by nothing at all (`--keep 1.0 --steps 0`). Every run has to
end with an exit code that is right for the case and without a traceback, no student may be larger than its teacher, and
the third one has to answer as the teacher does, bit for bit. What a case has to show beyond that stands in `CASES`; a
model that is not named there is held to what all of them are.

"left" is the float weights in the student's file over the teacher's, the larger one of the two students. The command
ends with exit code 1 if a line is not right.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.external_data_helper import uses_external_data

from benchmarks import common
from ndonnx.errors import UsageError

Arrays = Mapping[str, NDArray[np.generic]]

HALVED = ("--keep", "0.5", "--steps", "3", "--samples", "64")
RUNS = {
    "apart": (*HALVED, "--finetune-steps", "0"),
    "fine-tuned": (*HALVED, "--finetune-steps", "3"),
    "identity": ("--keep", "1.0", "--steps", "0", "--samples", "64"),
}
"""Options of each of the three runs."""
LIMIT_S = 600
"""Seconds after which a run counts as hung."""
_SEED = 7
"""Seed of operators that draw at random inside a model, so that two sessions draw alike."""
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}

_LINE = "{:<24}{:>10}{:>10}  {}"
_COMMAND = "import sys; from ndonnx_cli.main import main; sys.exit(main())"


@dataclass(frozen=True)
class Built:
    """A model file, loaded whole, and its answers to the case's inputs in onnxruntime."""

    path: Path

    @property
    def proto(self) -> onnx.ModelProto:
        """The model with its weights."""
        return onnx.load(self.path)

    def answers(self, feeds: Arrays) -> list[NDArray[np.generic]]:
        """The outputs for these inputs, in the model's order."""
        ort.set_seed(_SEED)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        found = session.run(None, {name: array for name, array in feeds.items() if name in names})
        return [np.asarray(array) for array in found]


Check = Callable[[Built, Built, Arrays], str | None]
"""What is wrong with a student (teacher, student, inputs), or None."""


@dataclass(frozen=True)
class Case:
    """What is right for one model.

    Attributes:
        left: most float weights that may be left, as a part of the teacher's.
        codes: exit codes that are right.
        options: options that every run is given.
        check: what has to hold of both halved students.
    """

    left: float = 1.0
    codes: tuple[int, ...] = (0,)
    options: tuple[str, ...] = ()
    check: Check | None = None


@dataclass
class Finding:
    """What became of one case.

    Attributes:
        name: the case's name, a model's without `.onnx`.
        case: what would be right.
        left: float weights in the student over the teacher's, for each run that wrote one.
        wrong: what is not right, a phrase each.
    """

    name: str
    case: Case
    left: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def _distances(teacher: Built, student: Built, feeds: Arrays) -> str | None:
    """The distance of a thing to itself is 0, and to another one the same from both sides."""
    a, b = feeds["a"], feeds["b"]
    (itself,), (there,), (back,) = (student.answers({"a": x, "b": y}) for x, y in ((a, a), (a, b), (b, a)))
    if np.any(itself):
        return f"d(a, a) is {float(np.abs(itself).max()):.3g}"
    worst = float(np.abs(there.astype(float) - back.astype(float)).max())
    return (
        f"d(a, b) and d(b, a) differ by {worst:.3g}"
        if worst > 1e-5 * float(np.abs(there.astype(float)).max())
        else None
    )


def _ties(teacher: Built, student: Built, feeds: Arrays) -> str | None:
    """As many matrices with several readers as the teacher has."""
    had, has = _shared_matrices(teacher.proto), _shared_matrices(student.proto)
    return None if has >= had else f"{has} of {had} shared matrices are still shared"


def _shared_matrices(model: onnx.ModelProto) -> int:
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) > 1}
    aliases = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type in ("Identity", "Transpose") and node.input[0] in matrices
    }
    readers = Counter(
        aliases.get(name, name) for node in model.graph.node for name in node.input if node.output[0] not in aliases
    )
    return sum(readers[name] > 1 for name in matrices)


def _types(teacher: Built, student: Built, feeds: Arrays) -> str | None:
    """The student's weights have the types that the teacher's have."""
    had, has = (_weights_by_type(model.proto) for model in (teacher, student))
    return None if set(has) == set(had) else f"weights of {sorted(set(had) - set(has))} are gone"


CASES = {
    "albert": Case(left=0.75, check=_ties),
    "siamese": Case(left=0.75, check=_distances),
    "tied_ae": Case(left=0.8, check=_ties),
    "bert_ext": Case(left=0.65),
    "mha": Case(left=0.75),
    "alexnet": Case(left=0.7),
    "fp16_two": Case(codes=(0, 3), check=_types),
    "aionnx": Case(left=0.6),
    "groupnorm_native": Case(left=0.75),
    "mlp_ln": Case(left=0.75),
    "cbam": Case(left=0.75),
    "dwconvtr": Case(left=0.45),
    "vad": Case(options=("--input", "sr=16000")),
}
"""What is right for the models that are known by name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Try every case of a folder and print the table."""
    options = _parse(arguments)
    names = sorted(path.stem for path in options.folder.glob("*.onnx"))
    if options.only:
        names = [name for name in names if name in options.only.split(",")]
    if not names:
        raise UsageError(f"{options.folder}: no case here; expected NAME.onnx beside NAME.npz")
    print(_LINE.format("case", "right", "found", "verdict"))
    findings = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(lambda name: try_case(options.folder, name), names):
            print(_LINE.format(*_row(found)), flush=True)
            findings.append(found)
    right = sum(not found.wrong for found in findings)
    print(f"{right} of {len(findings)} right")
    if options.out:
        common.write_json(options.out, {f.name: {"left": f.left, "wrong": f.wrong} for f in findings})
    if right < len(findings):
        raise SystemExit(1)


def try_case(folder: Path, name: str) -> Finding:
    """Compress one model three times, as `RUNS` says, and compare with what is right for it."""
    case = CASES.get(name, Case())
    found = Finding(name, case)
    teacher, feeds = Built(folder / f"{name}.onnx"), dict(np.load(folder / f"{name}.npz"))
    with tempfile.TemporaryDirectory() as scratch:
        for run, options in RUNS.items():
            student = Built(Path(scratch) / f"{run}.onnx")
            problem = _compress(teacher.path, (*options, *case.options), student.path, case.codes)
            found.wrong += [f"{run}: {problem}"] if problem else []
            if student.path.exists():
                found.left[run] = float_weights(student.proto) / float_weights(teacher.proto)
                found.wrong += [f"{run}: {wrong}" for wrong in _wrong_of(run, case, teacher, student, feeds)]
    return found


def _compress(model: Path, options: Sequence[str], output: Path, codes: tuple[int, ...]) -> str | None:
    """Run `ndonnx compress`; what was wrong with how it ended, or None."""
    data = str(model.with_suffix(".npz"))
    command = [
        sys.executable,
        "-c",
        _COMMAND,
        "compress",
        str(model),
        "--data",
        data,
        *options,
        "-o",
        str(output),
        "-q",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, env=os.environ, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT_S} s"
    lines = done.stderr.strip().splitlines() or [""]
    if "Traceback (most recent call last)" in done.stderr:
        return f"traceback: {lines[-1]}"
    if done.returncode not in codes:
        return f"exit {done.returncode}: {lines[-1]}"
    return None if output.exists() else "no student was written"


def _wrong_of(run: str, case: Case, teacher: Built, student: Built, feeds: Arrays) -> list[str]:
    """What is not right with a student that was written."""
    if run == "identity":
        pairs = zip(teacher.answers(feeds), student.answers(feeds), strict=True)
        return [] if all(np.array_equal(a, b, equal_nan=True) for a, b in pairs) else ["not bit for bit the teacher"]
    wrong = []
    left = float_weights(student.proto) / float_weights(teacher.proto)
    if left > case.left:
        wrong.append(f"left {left:.3f}")
    if student.path.stat().st_size > 1.1 * teacher.path.stat().st_size and left > 1:
        wrong.append("the student is larger than the teacher")
    student.answers(feeds)  # it has to run on what the teacher runs on
    problem = case.check(teacher, student, feeds) if case.check else None
    return [*wrong, *([problem] if problem else [])]


def float_weights(model: onnx.ModelProto) -> int:
    """Float numbers that a model's file holds: initializers and constants of at least one element, each once."""
    return sum(_weights_by_type(model).values())


def _weights_by_type(model: onnx.ModelProto) -> Counter[str]:
    """Number of float weights by the name of their type."""
    found: Counter[str] = Counter()
    for tensor in _tensors(model.graph):
        if tensor.data_type in _FLOATS:
            assert not uses_external_data(tensor)  # `onnx.load` has read it
            found[onnx.TensorProto.DataType.Name(tensor.data_type)] += int(np.prod(tensor.dims))
    return found


def _tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """The tensors of a graph and of those inside its nodes."""
    found = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            found += [attribute.t] if attribute.HasField("t") else []
            found += _tensors(attribute.g) if attribute.HasField("g") else []
            found += [tensor for inner in attribute.graphs for tensor in _tensors(inner)]
    return found


def _row(found: Finding) -> tuple[str, ...]:
    left = [value for run, value in found.left.items() if run != "identity"]
    right = f"<= {found.case.left:g}"
    return found.name, right, f"{max(left):.3f}" if left else "-", "; ".join(found.wrong) or "right"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="pairs of NAME.onnx and NAME.npz")
    parser.add_argument("--only", metavar="NAME,NAME", help="these cases alone")
    parser.add_argument("--jobs", type=common.positive, default=1, help="cases tried at the same time")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what was found as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    common.run(main)
