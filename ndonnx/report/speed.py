"""What a benchmark tells: a model, and the one that it was compared with, in numbers that people decide by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ndonnx.assemble.quantise_pieces import Executed
from ndonnx.errors import UsageError
from ndonnx.graph import fold_constants
from ndonnx.graph.bound import bind
from ndonnx.graph.macs import sample_cost
from ndonnx.graph.storage.files import compressed_bytes, file_bytes
from ndonnx.metrics.baselines import Baselines
from ndonnx.metrics.evaluation import Evaluation
from ndonnx.metrics.latency import ProviderSpeed

QUANTITIES = ("parameters", "macs", "bytes", "compressed_bytes")
"""What a model has without being run, in the order in which it is told."""
PICTURES = (".png", ".svg")


@dataclass(frozen=True)
class ModelSize:
    """What there is of a model before it runs."""

    path: str
    parameters: int
    macs: int | None
    """Multiply-accumulates for one sample; None where they depend on a size that nothing states."""
    bytes: int
    """Bytes of the file and of the weights kept beside it."""
    compressed_bytes: int
    """Bytes after zlib: what is sent to a device."""

    @classmethod
    def of(cls, path: Path, model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> ModelSize:
        """Weigh the file of a loaded model, and the files that hold its weights.

        Args:
            path: of the file.
            model: as loaded from it; its constants are folded.
            shapes: of the inputs, that MACs are told for (see `ndonnx.graph.bound`).
        """
        working = fold_constants(model)
        cost = sample_cost(working.graph, bind(working, shapes))
        return cls(str(path), cost.parameters, cost.macs, file_bytes(path), compressed_bytes(path))


@dataclass(frozen=True)
class Speed:
    """The whole of a benchmark."""

    model: ModelSize
    against: ModelSize | None
    threads: int
    """Inside one operator, for both models."""
    processes: int
    """In each of which everything was loaded and timed anew."""
    providers: list[ProviderSpeed]
    fidelity: dict[str, Evaluation] | None
    """How good `model` and `against` are on the data; None without data."""
    notes: list[str]
    executed: Executed | None = None
    """What onnxruntime computes of the model with integers and with floats; the document has this key only for a model
    that holds integers."""
    baselines: Baselines | None = None
    """The comparison with what there is without this library; the document has this key only where it was asked for."""

    def share(self, quantity: str) -> float | None:
        """What the model has of one of `QUANTITIES`, as a part of what the other one has."""
        mine, other = getattr(self.model, quantity), getattr(self.against, quantity, None)
        return None if mine is None or not other else float(mine / other)

    def to_json(self) -> dict[str, Any]:
        """As one JSON document."""
        document = {
            "model": asdict(self.model),
            "against": None if self.against is None else asdict(self.against),
            "shares": None if self.against is None else {name: self.share(name) for name in QUANTITIES},
            "threads": self.threads,
            "processes": self.processes,
            "providers": [entry.to_json() for entry in self.providers],
            "fidelity": None if self.fidelity is None else {k: found.to_json() for k, found in self.fidelity.items()},
            "notes": self.notes,
        }
        if self.executed is not None:
            document["executed"] = asdict(self.executed)
        return document | ({} if self.baselines is None else {"baselines": self.baselines.to_json()})


def check_picture(path: Path) -> None:
    """Refuse, before any work is done, a file that cannot become a picture.

    Raises:
        UsageError: it has another ending than .png or .svg, or its folder is not there.
    """
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"{path}: a picture is written as {' or '.join(PICTURES)}; give a name that ends so")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{path}: cannot write a picture there; expected a file name in a folder that exists")
