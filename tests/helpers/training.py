"""Small trainings: a regression, a plan, and stores of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ndonnx.distill.plan import Plan
from ndonnx.distill.samples import SliceSamples
from ndonnx.teacher import ActivationStore
from tests.helpers.models import Array, Net

PLAN = Plan(steps=40, batch_size=16, lr=0.1, warmup=0.05, seed=0)


def store_of(
    folder: Path,
    values: Mapping[str, Array],
    constants: Sequence[str] = (),
    unstorable: Mapping[str, str] | None = None,
) -> ActivationStore:
    samples = next(len(array) for name, array in values.items() if name not in constants)
    kept = {name: array for name, array in values.items() if name not in constants}
    writer = ActivationStore.create(folder, {name: (a.dtype, a.shape[1:]) for name, a in kept.items()}, samples)
    for name, array in kept.items():
        writer.append(name, array)
    for name in constants:
        writer.add_constant(name, values[name])
    return writer.finish(unstorable)


def silent(step: int, steps: int, error: float) -> None: ...


def linear(net: Net, features: int = 6, outputs: int = 4) -> ir.Model:
    net.op("Gemm", net.input("x", "N", features), net.weight("w", features, outputs), net.weight("b", outputs), out="y")
    return ir.from_proto(net.proto("y"))


def regression(folder: Path, samples: int = 200, noise: float = 0.0) -> SliceSamples:
    """A linear map of random inputs, in float32, with a tenth held out."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((samples, 6)).astype(np.float32)
    y = x @ rng.standard_normal((6, 4)) + rng.standard_normal(4) + noise * rng.standard_normal((samples, 4))
    return SliceSamples.of(store_of(folder, {"x": x, "y": y.astype(np.float32)}), ["x"], ["y"], 0.1)
