"""Runs of models that may never end: those with a `Loop`, whose number of rounds a file may state as it likes.

Nothing stops onnxruntime in the middle of a run, Ctrl-C no more than a signal. Everything else in ONNX is bounded by
the sizes of its inputs, so only models with a `Loop` are watched.
"""

from __future__ import annotations

import mmap
import threading
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from ndonnx.errors import ModelError

SECONDS = 20.0
"""What one run of a model with a `Loop` may take."""
_LOOP = b"Loop"


class WatchedSession(ort.InferenceSession):  # type: ignore[misc]  # onnxruntime has no types
    """A session of which no run takes longer than `SECONDS`."""

    def run(self, output_names: Any, input_feed: Any, run_options: Any = None) -> Any:
        """As onnxruntime's own.

        Raises:
            ModelError: it took too long and was stopped.
        """
        options = ort.RunOptions() if run_options is None else run_options
        late = threading.Event()

        def stop() -> None:
            late.set()
            options.terminate = True

        timer = threading.Timer(SECONDS, stop)
        timer.daemon = True
        timer.start()
        try:
            return super().run(output_names, input_feed, options)
        except Exception as error:
            if not late.is_set():
                raise
            raise ModelError(
                f"one run of the model was stopped after {SECONDS:.0f} s: it holds a Loop, which may have no end; if "
                "it has one, give it less at a time with --batch-size"
            ) from error
        finally:
            timer.cancel()


def may_be_endless(model: bytes | str | Path) -> bool:
    """Whether a serialised model, or the file with this path, holds a `Loop`. A file that cannot be read holds none.

    Weights and names may hold the same four letters: only where they stand is the model read.
    """
    try:
        if isinstance(model, bytes):
            return _LOOP in model and _holds_loop(onnx.load_from_string(model))
        with Path(model).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(_LOOP) < 0:
                return False
        return _holds_loop(onnx.load(model, format="protobuf", load_external_data=False))
    except (OSError, ValueError, DecodeError):
        return False


def _holds_loop(model: onnx.ModelProto) -> bool:
    stack = [model.graph.node, *(function.node for function in model.functions)]
    while stack:
        for node in stack.pop():
            if node.op_type == _LOOP.decode():
                return True
            for attribute in node.attribute:
                stack += [graph.node for graph in (attribute.g, *attribute.graphs) if graph.node]
    return False


def session_class(model: bytes | str | Path) -> type[ort.InferenceSession]:
    """The kind of session for a model: one whose runs are watched where they may have no end."""
    return WatchedSession if may_be_endless(model) else ort.InferenceSession
