"""Trace: the modules and functions that a compression of the demo teacher runs through.

    python -m benchmarks.trace [--target]

Counted by `sys.setprofile` with the serial executor: every function of `ndonnx` that is called, once each, methods and
nested functions among them, comprehensions and the bodies of modules and classes not. A reader who wants to follow a
run has so many things to understand at most. Figures to stay under: 8 files of `flow/`, 1,000 functions for
`compress`, 1,150 with a target. `--functions` lists them.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import ndonnx
from ndonnx import demo

_ROOT = Path(ndonnx.__file__).parent
_STEPS = 10
MOST_FLOW_FILES, MOST_FUNCTIONS, MOST_FUNCTIONS_TO_TARGET = 8, 1000, 1150


@contextmanager
def traced() -> Iterator[set[CodeType]]:
    """The code of every function of `ndonnx` that is called inside the `with` block, in any thread."""
    seen: set[CodeType] = set()

    def on_event(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # bodies of modules and classes are not
            seen.add(frame.f_code)

    threading.setprofile(on_event)
    sys.setprofile(on_event)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def functions_of(seen: set[CodeType]) -> dict[str, list[str]]:
    """Names of the functions of each module, both sorted; modules as paths below `ndonnx/`."""
    found: dict[str, set[str]] = defaultdict(set)
    for code in seen:
        path = Path(code.co_filename)
        if path.is_relative_to(_ROOT) and (not code.co_name.startswith("<") or code.co_name == "<lambda>"):
            found[path.relative_to(_ROOT).as_posix()].add(f"{code.co_qualname}:{code.co_firstlineno}")
    return {module: sorted(found[module]) for module in sorted(found)}


def trace(*, target: bool) -> dict[str, list[str]]:
    """The functions that a compression of the demo teacher calls, by module."""
    asked: dict[str, Any] = {"target": ("params=0.6",)} if target else {}
    search = {"steps": _STEPS, "samples": 100, "candidates": ("width 0.3,0.5,0.8",)} if target else {}
    recipe = ndonnx.load_recipe(steps=_STEPS, finetune_steps=_STEPS, executor="serial", **asked, search=search)
    data = str(demo.data_path("train"))
    with tempfile.TemporaryDirectory() as folder, traced() as seen:
        ndonnx.compress(demo.teacher_path(), data=data, recipe=recipe, output=Path(folder) / "student.onnx")
    return functions_of(seen)


def main() -> None:
    """Print the counts, by room and in all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="store_true", help="search for a target instead of one width for all")
    parser.add_argument("--functions", action="store_true", help="list the functions too")
    options = parser.parse_args()
    found = trace(target=options.target)
    rooms: Counter[str] = Counter()
    for module, names in found.items():
        rooms[module.partition("/")[0]] += len(names)
        if options.functions:
            print(module, *(f"    {name}" for name in names), sep="\n")
    for room, count in sorted(rooms.items()):
        modules = sum(module.partition("/")[0] == room for module in found)
        print(f"{room:<12} {modules:>3} modules {count:>5} functions")
    flow = sum(module.startswith("flow/") for module in found)
    most = MOST_FUNCTIONS_TO_TARGET if options.target else MOST_FUNCTIONS
    print(f"in all {len(found)} modules, {sum(rooms.values())} functions (at most {most}); flow/: {flow} files")


if __name__ == "__main__":
    main()
