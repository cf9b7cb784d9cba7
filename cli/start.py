"""Where the command starts: whether `ndonnx` here is this library at all, then everything else.

A distribution called `ndonnx`, somebody else's, has an import package of the same name. In one environment each
overwrites files of the other, and whatever is imported then fails far from the cause.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

_OURS = "ndonnx-compress"
_THEIRS = "ndonnx"


def main() -> int:
    """Run the command with the arguments of this process and return its exit code; 2 where it is installed wrongly."""
    fault = _fault()
    if fault is not None:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    from .main import main as run  # noqa: PLC0415 - it imports `ndonnx`

    return run()


def _fault() -> str | None:
    """What is wrong with the installed package, and the way out, in one line; None where nothing is."""
    spec = find_spec("ndonnx")
    if spec is None or spec.origin is None:
        return (
            "files of the package 'ndonnx' are missing, as after another distribution of that name was removed: "
            f"pip install --force-reinstall --no-deps {_OURS}"
        )
    other = _theirs()
    if other is not None and other.exists() and other.samefile(spec.origin):
        return (
            f"the distribution '{_THEIRS}' is installed here too, and its files and those of '{_OURS}' overwrite each "
            f"other: pip uninstall -y {_THEIRS} {_OURS}; pip install {_OURS}; keep '{_THEIRS}' in another environment"
        )
    return None


def _theirs() -> Path | None:
    """Where the other distribution puts its package, if it is installed; looked up by name, no package is read."""
    try:
        return Path(str(distribution(_THEIRS).locate_file("ndonnx/__init__.py")))
    except PackageNotFoundError:
        return None
