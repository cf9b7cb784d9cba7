"""One tree of errors. Each message names the file, node or value, and the way out.

`UsageError` and its children are the user's to mend: the command line prints the message
on one line and exits with 2. `SliceError` and its children concern one neighbourhood: the
pipeline keeps the teacher's slice and writes the message into the report as the reason.
`SearchError` says that a target is out of reach: the best student is saved, the exit code is 3.
"""

from __future__ import annotations


class NdonnxError(Exception):
    """Base of every error that this package raises on purpose."""


class UsageError(NdonnxError):
    """Bad usage or bad input: one line, exit code 2."""


class ModelError(UsageError):
    """The ONNX file cannot be read, is not valid, or reaches outside its folder."""


class DataError(UsageError):
    """A data source is missing, corrupt, or does not fit the model's inputs."""


class RecipeError(UsageError):
    """A recipe holds an unknown key or a value out of range."""


class RunDirError(UsageError):
    """The run directory is locked by another run, unwritable, or full."""


class SliceError(NdonnxError):
    """One neighbourhood cannot be distilled; the teacher's slice is kept."""


class ConversionError(SliceError):
    """A slice holds an operator that does not convert to torch."""


class ParityError(SliceError):
    """A converted slice answers differently from onnxruntime."""


class ShrinkError(SliceError):
    """A slice has no width to shrink, or the shrunk slice fails the zeroing check."""


class TrainingError(SliceError):
    """Activations or the loss became NaN or Inf."""


class VerificationError(NdonnxError):
    """The assembled student failed its last check and was not written."""

    def __init__(self, message: str, neighbourhood: str | None = None) -> None:
        super().__init__(message)
        self.neighbourhood = neighbourhood
        """The one whose student is to blame; None where it is the whole."""


class SearchError(NdonnxError):
    """No choice of candidates meets the targets: exit code 3, after the best that there is has been saved."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or its type where it has none, without onnxruntime's prefix."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("[ONNXRuntimeError] : ")
