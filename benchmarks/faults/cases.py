"""The cases by number: what is written into the folder, and which command meets it. The same for the same seed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx

from benchmarks.faults.data import DATA, INPUT, SHAPE, flags, recipe, samples
from benchmarks.faults.mutations import BYTES, mutated
from tests.helpers.families import all_control, detector, half_quantised, scanned, unsupported
from tests.helpers.models import BUILDERS, Net, floats, inputs_of
from tests.helpers.sharing import language_model

SOUND: dict[str, Callable[[], onnx.ModelProto]] = {
    **{name: BUILDERS[name] for name in ("residual_cnn", "residual_norm", "mlp", "transformer", "with_if", "unet")},
    **{name: BUILDERS[name] for name in ("local_function", "constant_nodes", "tied", "several_heads")},
    **{name: BUILDERS[name] for name in ("shape_from_before", "inverted_bottleneck")},
    "detector": detector, "all_control": all_control, "scanned": scanned, "unsupported": unsupported,
    "half_quantised": half_quantised, "language_model": language_model,
}  # fmt: skip
"""Models before anything is done to them."""
_RUN = ("--steps", "1", "--finetune-steps", "1", "--samples", "12", "--batch-size", "4", "--executor", "serial")
_HOW = ("--workers", "1", "--device", "cpu", "--precision", "fp32", "-q", "--json")
COMMANDS = {
    "inspect": ("inspect", "model.onnx", "--json"),
    "check": ("inspect", "model.onnx", "--check", "--json", "-q"),
    "compress": ("compress", "model.onnx", *_RUN, *_HOW, "-o", "student.onnx"),
    "evaluate": ("evaluate", "model.onnx", "--teacher", "sound.onnx", "--json", "-q"),
}
_MODELS = {"inspect": 62, "check": 14, "compress": 12, "evaluate": 12}
"""How often each command meets a hostile model, in parts."""
_OTHERS = {"data": 16, "recipe": 8}
"""Of a hundred cases, those about data and about recipes; the others are about models."""


@dataclass(frozen=True)
class Case:
    """A case, whose files lie in the folder."""

    number: int
    about: str
    """`model`, `data` or `recipe`."""
    done: str
    """What was done, in words of `mutations` and `data`."""
    arguments: tuple[str, ...]
    """What stands behind `ndonnx`."""


@cache
def _sound(name: str) -> bytes:
    return bytes(SOUND[name]().SerializeToString())


@cache
def picture_model() -> bytes:
    """A model of small pictures, whose input is what hostile data are for."""
    net = Net(9)
    x = net.relu(net.conv(net.input(INPUT, "N", *SHAPE), 3, 6))
    y = net.conv(net.relu(net.conv(x, 6, 6)), 6, 6)
    x = net.relu(net.op("Add", x, y))
    model = net.proto(net.pooled_classifier(x, 6), types={"logits": floats("logits", "N", 5)})
    return bytes(model.SerializeToString())


def make(seed: int, number: int, folder: Path, bait: Path) -> Case:
    """Write the files of a case.

    Args:
        seed: of the whole.
        number: of the case.
        folder: an empty one.
        bait: the folder outside that hostile files point at.
    """
    rng = random.Random(f"{seed}/{number}")
    about = rng.choices(("model", *_OTHERS), (100 - sum(_OTHERS.values()), *_OTHERS.values()))[0]
    if about == "model":
        return _model_case(rng, number, folder, bait)
    (folder / "model.onnx").write_bytes(picture_model())
    if about == "data":
        hostile = rng.choice(DATA)
        source = hostile(rng, folder)
        command = rng.choice(("evaluate", "evaluate", "check", "compress"))
        (folder / "sound.onnx").write_bytes(picture_model())
        return Case(number, about, hostile.__name__, (*COMMANDS[command], "--data", source))
    np.savez(folder / "data.npz", **{INPUT: samples(rng)})
    given = rng.choice((recipe, recipe, flags))(rng, folder)
    command = rng.choice(("inspect", "compress"))
    data = ("--data", "data.npz") if command == "compress" else ()
    return Case(number, about, "recipe" if given[0] == "--recipe" else "flags", (*COMMANDS[command], *data, *given))


def _model_case(rng: random.Random, number: int, folder: Path, bait: Path) -> Case:
    name = rng.choice(list(SOUND))
    whole = _sound(name)
    (folder / "sound.onnx").write_bytes(whole)
    _lay_traps(folder, bait)
    if rng.random() < 0.2:
        done = [rng.choice(list(BYTES))]
        whole = BYTES[done[0]](rng, whole)
    else:
        model = onnx.load_from_string(whole)
        done = mutated(rng, model)
        _fill_in(model, bait)
        whole = model.SerializeToString()
    (folder / "model.onnx").write_bytes(whole)
    command = rng.choices(list(_MODELS), list(_MODELS.values()))[0]
    arguments = COMMANDS[command]
    if command in ("compress", "evaluate"):
        np.savez(folder / "data.npz", **_inputs(name))  # type: ignore[arg-type]
        arguments = (*arguments, "--data", "data.npz")
    return Case(number, "model", f"{name}: {', '.join(done)}", arguments)


def _inputs(name: str) -> dict[str, np.ndarray]:
    found = inputs_of(onnx.load_from_string(_sound(name)), 24)
    return {key: np.abs(value).astype(np.int64) if name == "language_model" else value for key, value in found.items()}


def _fill_in(model: onnx.ModelProto, bait: Path) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = entry.value.replace("{bait}", str(bait))


def _lay_traps(folder: Path, bait: Path) -> None:
    """Links and files that external data of a model may name."""
    (folder / "weights.bin").write_bytes(bytes(4096))
    (folder / "link.bin").symlink_to(bait / "secret.bin")
    (folder / "linked").symlink_to(bait)
    (folder / "loop.bin").symlink_to("loop.bin")
    os.mkfifo(folder / "fifo.bin")
