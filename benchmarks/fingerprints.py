"""Fingerprints: whether a change of the code changes what comes out.

    python -m benchmarks.fingerprints [--out FILE]

Five runs of the command on the demo teacher with fixed steps, on one core and in 32 bits, and the sha256 of the student
that each writes: the demo, k=0.5 in parallel with a fine-tuning, in order, sparsity by layer, and a search with a
target. Written down before a rebuilding and compared after it; processors of other kinds give other numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ndonnx import demo

_COMMAND = "from ndonnx_cli.main import main; main()"
_ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_FIXED = ("--precision", "fp32", "--executor", "serial", "--device", "cpu", "--quiet")
_RECIPE = 'seed = 1\n[search]\nsteps = 20\nsamples = 200\ncandidates = ["width 0.3,0.5,0.8", "lowrank 0.5"]\n'
RUNS: dict[str, tuple[str, ...]] = {
    "parallel": ("--keep", "0.5", "--steps", "40", "--finetune-steps", "40", "--inputs", "teacher"),
    "sequential": ("--keep", "0.5", "--steps", "40", "--finetune-steps", "0", "--inputs", "student"),
    "sparsity": ("--method", "sparsity", "--granularity", "layer", "--steps", "20", "--finetune-steps", "20"),
    "target": ("--recipe", "{recipe}", "--target", "params=0.6", "--steps", "20", "--finetune-steps", "20"),
}


def fingerprints(folder: Path) -> dict[str, str]:
    """The sha256 of each run's student, by the run's name; each file lies in `folder` afterwards.

    Raises:
        subprocess.CalledProcessError: a run failed; what it said is on stderr.
    """
    recipe = folder / "recipe.toml"
    recipe.write_text(_RECIPE, encoding="utf-8")
    model, data = str(demo.teacher_path()), str(demo.data_path("train"))
    _command("demo", "--quiet", "-o", str(folder / "demo.onnx"))
    for name, flags in RUNS.items():
        chosen = [flag.format(recipe=recipe) for flag in flags]
        _command("compress", model, "--data", data, *_FIXED, *chosen, "-o", str(folder / f"{name}.onnx"))
    return {name: hashlib.sha256((folder / f"{name}.onnx").read_bytes()).hexdigest() for name in ("demo", *RUNS)}


def _command(*arguments: str) -> None:
    one_core = {**os.environ, **_ONE_CORE}
    subprocess.run([sys.executable, "-c", _COMMAND, *arguments], check=True, env=one_core, stdout=subprocess.DEVNULL)


def main() -> None:
    """Reads the arguments, and prints a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the lines here")
    out = parser.parse_args().out
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"{digest}  {name}\n" for name, digest in fingerprints(Path(folder)).items()]
    print("".join(lines), end="")
    if out:
        out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
