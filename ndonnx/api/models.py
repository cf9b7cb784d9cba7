"""The model as users hold it: a path, an `onnx.ModelProto` or an `onnx_ir.Model`; and the student as they get it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir

from ndonnx.errors import ModelError, NdonnxError, RunDirError, SearchError, UsageError, first_line
from ndonnx.graph import save, serialise, to_proto
from ndonnx.graph.load import check_file
from ndonnx.graph.refusal import refusal
from ndonnx.graph.save import PROTOBUF_LIMIT, tensor_bytes
from ndonnx.graph.storage.external import external_tensors
from ndonnx.teacher.sessions import OrtError

Model: TypeAlias = str | Path | onnx.ModelProto | ir.Model
"""What the verbs take as a model; none of these is ever changed."""


@dataclass(frozen=True)
class Student:
    """The compressed model."""

    model: ir.Model
    path: Path | None
    """File that it was written to; None if no output was asked for."""

    def proto(self) -> onnx.ModelProto:
        """The student as a message of the `onnx` package, all weights inside; a new one each time.

        Raises:
            ValueError: it is above the 2 GB of a protobuf message; `save` writes such a model.
        """
        return to_proto(self.model)

    def save(self, path: str | Path) -> None:
        """Write the student under its final name only when it is complete.

        Raises:
            RunDirError: the folder is missing, unwritable or full.
        """
        save(self.model, path)


@dataclass(frozen=True)
class Placed:
    """A model as a file."""

    path: Path
    name: str
    """Name of the model in reports: its path as the user gave it, or the name of its graph."""
    run_dir: Path | None = None
    """Folder of the run's state; None: beside the output or the model."""
    temporary: bool = False
    """Whether the file and the run's state are deleted in the end."""

    def kept(self, model: ir.Model, path: str | Path | None) -> Student:
        """A student that outlives the files of the run."""
        if self.temporary and external_tensors(model):
            ir.external_data.load_to_model(model)
        return Student(model, None if path is None else Path(path))


@contextmanager
def placed(model: Model, run_dir: str | Path | None = None) -> Iterator[Placed]:
    """A model as a file, inside the `with` block.

    An error of the block that nobody foresaw is the file's where onnxruntime or ONNX's own checks refuse it.

    Args:
        model: a path; or an object, which is written into the run directory, or where there is none into a temporary
            folder, in which the run keeps its state too and which is deleted in the end.
        run_dir: folder of the run's state, if the user names one.

    Raises:
        ModelError: it is none of these, it keeps its weights in other files, or it is not valid and the block failed.
        RunDirError: it cannot be written.
    """
    folder = None if run_dir is None else Path(run_dir)
    if isinstance(model, str | Path):
        check_file(model)
        with _blamed(Path(model), str(model)):
            yield Placed(Path(model), str(model), folder)
        return
    name = (model.graph.name if isinstance(model, onnx.ModelProto | ir.Model) else None) or "model"
    with ExitStack() as stack:
        where = folder
        if where is None:
            where = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ndonnx-", ignore_cleanup_errors=True)))
        path = _written(model, where)
        with _blamed(path, name):
            yield Placed(path, name, folder or where / "run", temporary=folder is None)


@contextmanager
def _blamed(path: Path, name: str) -> Iterator[None]:
    """Tell whoever gave a model that is invalid, or does not run, that it is so, whatever it brought to fall."""
    try:
        yield
    except (UsageError, SearchError, MemoryError):
        raise
    except Exception as error:  # as many as there are ways to break a model
        reason = refusal(path)
        if reason is None and isinstance(error, OrtError):
            raise ModelError(f"{name}: onnxruntime fails on it: {first_line(error)}") from error
        if reason is None:
            raise
        told = f"{error}; and the model" if isinstance(error, NdonnxError) else "the model"
        raise ModelError(f"{name}: {told} is not valid, export it again: {reason}") from error


def _written(model: object, folder: Path) -> Path:
    """Write a model into a folder, under a name by its contents: no other run in that folder reads another one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, ir.Model) and tensor_bytes(model) > PROTOBUF_LIMIT:
            path = folder / "teacher.onnx"
            save(model, path)
            return path
        contents = _contents(model)
        path = folder / f"teacher-{blake2b(contents, digest_size=8).hexdigest()}.onnx"
        if not path.exists():
            with tempfile.TemporaryDirectory(prefix=".ndonnx-", dir=folder) as scratch:
                whole = Path(scratch) / path.name
                whole.write_bytes(contents)
                whole.replace(path)
        return path
    except OSError as error:
        raise RunDirError(f"{folder}: cannot write the model there: {error.strerror}") from error


def _contents(model: object) -> bytes:
    if isinstance(model, ir.Model):
        return serialise(model)
    if not isinstance(model, onnx.ModelProto):
        raise ModelError(
            f"expected a model as a path, an onnx.ModelProto or an onnx_ir.Model, found {type(model).__name__}"
        )
    outside = next((t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL), None)
    if outside is not None:
        raise ModelError(
            f"the weights of '{outside}' are in another file, which the model does not say the folder of; give the "
            "model's path, or load its weights with onnx.load"
        )
    return model.SerializeToString(deterministic=True)
