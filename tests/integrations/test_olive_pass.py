"""The pass of Olive: a workflow compresses, then quantises, from a file of data or from a data config of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

try:
    from ndonnx.integrations import olive_pass
except ImportError as missing:
    pytest.skip(str(missing), allow_module_level=True)

from olive.workflows import run

from ndonnx.graph import load
from tests.helpers.models import inputs_of, residual_cnn
from tests.helpers.runs import ALONE, Bench

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_core")]
RECIPE = ALONE | {"steps": 4, "keep": 0.5, "simplify": False}


def workflow(bench: Bench, **settings: Any) -> dict[str, Any]:
    """Compress, then quantise."""
    return {
        "input_model": {"type": "ONNXModel", "model_path": str(bench.model)},
        "passes": {
            "compress": {"type": "NdonnxCompress", "recipe": RECIPE, **settings},
            "quantise": {"type": "OnnxDynamicQuantization"},
        },
        "output_dir": str(bench.folder / "out"),
        "cache_dir": str(bench.folder / "cache"),
    }


def test_a_workflow_compresses_and_then_quantises(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.folder)  # where the teacher lies: what is quantised must be the student all the same
    run(workflow(bench, data=str(bench.data)), package_config=olive_pass.package_config())
    between = [path for path in (bench.folder / "cache").rglob("teacher.onnx") if not _in_integers(path)]
    assert len(between) == 1 and _weights(between[0]) < _weights(bench.model)
    (quantised,) = (bench.folder / "out").rglob("*.onnx")
    assert _in_integers(quantised)
    assert _weights(quantised) < _weights(bench.model)
    session = ort.InferenceSession(quantised, providers=["CPUExecutionProvider"])
    feeds = inputs_of(residual_cnn(), 2)
    assert [output.shape for output in session.run(None, feeds)] == [(2, 5)]


def test_without_data_the_workflow_ends_without_a_model(bench: Bench) -> None:
    run(workflow(bench), package_config=olive_pass.package_config())  # Olive logs why, and does not raise
    assert not list((bench.folder / "out").rglob("*.onnx"))


def test_what_the_command_prints_is_a_package_configuration_with_olives_own_passes() -> None:
    printed = subprocess.run([sys.executable, "-c", _AS_A_COMMAND], capture_output=True, text=True, check=True).stdout
    passes = json.loads(printed)["passes"]
    assert passes["NdonnxCompress"]["module_path"] == "ndonnx.integrations.olive_pass.NdonnxCompress"
    assert "OnnxStaticQuantization" in passes


_AS_A_COMMAND = "from ndonnx.integrations.olive_pass import package_config as p; import json; print(json.dumps(p()))"


def _weights(path: Path) -> int:
    return sum(int(np.prod(value.shape.numpy())) for value in load(path).graph.initializers.values() if value.shape)


def _in_integers(path: Path) -> bool:
    return bool({"MatMulInteger", "ConvInteger"} & {node.op_type for node in load(path).graph})
