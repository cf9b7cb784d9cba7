"""The teacher's answers for fine-tuning: what it all but rules out stays what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from ndonnx.config.recipe import Recipe
from ndonnx.flow.prepare import Request, prepare
from ndonnx.runtime.progress import Silent
from ndonnx.teacher.outputs import Wanted, capture_outputs, storable
from tests.helpers.models import Net, inputs_of, run


def decided(classes: int = 50) -> onnx.ModelProto:
    """Probabilities of which most are far below what float16 tells from 0."""
    net = Net(4)
    hidden = net.relu(net.gemm(net.input("x", "N", 6), 6, 16))
    scores = net.op("Mul", net.gemm(hidden, 16, classes), net.constant("sharp", np.array(8, np.float32)))
    return net.proto(net.op("Softmax", scores, axis=-1, out="p"))


def test_small_probabilities_are_stored_as_they_are(tmp_path: Path) -> None:
    model, data = decided(), inputs_of(decided(), 80)
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **data)  # type: ignore[arg-type]
    recipe = Recipe(steps=1, finetune_steps=1, executor="serial")
    with prepare(Request(tmp_path / "m.onnx", str(tmp_path / "d.npz")), recipe, Silent()) as prepared:
        found = capture_outputs(prepared.parts, prepared.split, Wanted(("p",), 60), tmp_path, recipe, Silent())
        budget = 10 * (6 * 4 + 50 * 4)
        assert storable(prepared.parts.model, prepared.split.source, budget) == 10
    stored, inputs = (np.asarray(found.store.rows(name)[:]) for name in ("p", "x"))
    expected = run(model, {"x": inputs})["p"]
    assert stored.dtype == np.float32 and (expected < 2e-8).mean() > 0.2
    np.testing.assert_allclose(np.log(stored), np.log(expected), atol=1e-3)
