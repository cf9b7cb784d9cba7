"""What is found out about one model, and how it travels from the process that measured it."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ndonnx.errors import NdonnxError

_LONGEST_REASON = 400


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
    """A piece with weights that cannot be distilled, and its share of the weights."""

    name: str
    share: float
    reason: str
    operators: list[str]


@dataclass
class Coverage:
    """What became of one model. Shares are of weights, embeddings and the last classifier aside, 0 to 1.

    None stands for what was not measured.
    """

    model: str
    opens: bool = False
    seconds_to_partition: float | None = None
    nodes: int = 0
    neighbourhoods: int = 0
    distillable: int = 0
    share: float | None = None
    """Weights in distillable neighbourhoods."""
    largest: float | None = None
    """Weights in the largest of them."""
    parity: int = 0
    """Slices that pass the gates of a distillation: in torch as in onnxruntime, and so when shrunk."""
    trains: int = 0
    """Slices of which every weight gets a gradient."""
    worst_error: float | None = None
    """Largest relative error of a slice at parity."""
    respliced: bool | None = None
    """The teacher with its own slices spliced in is the teacher bit for bit, onnxruntime's optimisations off."""
    identity: bool | None = None
    """The student of `--keep 1.0 --steps 0` is the teacher bit for bit."""
    distilled: int | None = None
    """Neighbourhoods that `--keep 0.5` distilled."""
    student_runs: bool | None = None
    """Its student runs in onnxruntime."""
    other_batch: bool | None = None
    """... with other batch sizes too; None where the teacher fixes its batch."""
    interface: bool | None = None
    """Names, types and axes of its inputs and outputs are the teacher's."""
    ratio: float | None = None
    """Weights of all distillable neighbourhoods, student's over teacher's."""
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing failed."""
        return self.opens and not self.failures

    def fail(self, stage: str, where: str, reason: object, nodes: Iterable[ir.Node] = ()) -> None:
        """Take note of something that did not work; a bug with the place in our code where it happened."""
        text = str(reason)
        if isinstance(reason, Exception) and not isinstance(reason, NdonnxError):
            frames = traceback.extract_tb(reason.__traceback__)
            ours = [frame for frame in frames if "/ndonnx/" in frame.filename] or frames
            at = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in ours[-1:])
            text = f"{type(reason).__name__}{at}: {reason}"
        self.failures.append(Failure(stage, where, " ".join(text.split())[:_LONGEST_REASON], operators_of(nodes)))

    def to_json(self) -> dict[str, Any]:
        """As one JSON document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Coverage:
        """What `to_json` made."""
        failures = [Failure(**entry) for entry in document["failures"]]
        kept = [Kept(**entry) for entry in document["kept"]]
        return cls(**{**document, "failures": failures, "kept": kept})


def operators_of(nodes: Iterable[ir.Node]) -> list[str]:
    """Operators by how often they occur."""
    return [name for name, _ in Counter(node.op_type for node in nodes).most_common()]
