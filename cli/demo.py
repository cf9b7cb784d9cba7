"""`ndonnx demo`: the main job on the small teacher and the data that ship inside the package."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import ndonnx
from ndonnx.demo import data_path, teacher_path

from . import options
from .outcome import job, verdict

_KEEP = 0.5
_ROUND_TO = 8
"""What processors like; it costs no size here, since it rounds both ways."""
_STEPS = 300
"""Enough for the demo's accuracy, and well under a minute on two cores."""
_TIMED_BATCH = 64
_TIMED_PROCESSES = 5


def demo(
    output: Annotated[str | None, options.output("nowhere, it is thrown away")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Compress a small digit classifier that ships with ndonnx, and compare the two: under a minute."""
    settings = ndonnx.load_recipe(keep=_KEEP, round_to=_ROUND_TO, steps=_STEPS, finetune_steps=_STEPS)

    from .tables import print_demo, print_json  # noqa: PLC0415 - rich is not for `--help`

    with TemporaryDirectory(prefix="ndonnx-demo-") as scratch:
        target = Path(output) if output is not None else Path(scratch) / "student.onnx"
        with job(quiet, verbose) as progress:
            report = ndonnx.compress(
                teacher_path(),
                data=str(data_path("train")),
                recipe=settings,
                output=target,
                eval_data=str(data_path("test")),
                run_dir=Path(scratch) / "student.run",
                progress=progress,
            ).report
            speed = ndonnx.benchmark(
                target,
                against=teacher_path(),
                data=str(data_path("test")),
                batch_sizes=[_TIMED_BATCH],
                processes=_TIMED_PROCESSES,
                memory=False,
                progress=progress,
            )
        if json:
            latency = speed.providers[0].batches[0].to_json()
            document = report.to_json() | {"latency": latency, "run_dir": None, "command": None}
            document["student"]["path"] = output
            print_json(document)
        else:
            print_demo(report, speed, output)
    return verdict(report)
