"""Studies of small networks."""

from __future__ import annotations

from pathlib import Path

import onnx

from ndonnx.metrics.partial import Judged, PartialModels
from tests.helpers.models import inputs_of, parted
from tests.helpers.partials import batches_of


def opened(model: onnx.ModelProto, folder: Path, samples: int = 256, threads: int = 1) -> PartialModels:
    _, parts = parted(model)
    return PartialModels(parts, Judged(batches_of(inputs_of(model, samples), 64), samples), folder, threads=threads)
