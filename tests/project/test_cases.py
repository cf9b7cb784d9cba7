"""The benchmark of cases: what it calls right and wrong, on models whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import cases
from benchmarks.cases import Built, Case


def residual_mlp(path: Path, hidden: int) -> Built:
    """A perceptron of 8 inputs and outputs, with random weights."""
    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(size=(8, hidden)), "b": rng.normal(size=(hidden, 8))}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "b"], ["m"]),
            helper.make_node("Add", ["x", "m"], ["y"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return Built(path)


def test_float_weights_are_counted_inside_branches_too(tmp_path: Path) -> None:
    inner = residual_mlp(tmp_path / "inner.onnx", 16).proto.graph
    assert cases.float_weights(helper.make_model(inner)) == 2 * 8 * 16
    node = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    assert cases.float_weights(helper.make_model(helper.make_graph([node], "g", [], []))) == 4 * 8 * 16


def test_a_distance_that_is_not_one_is_told(tmp_path: Path) -> None:
    def distance(name: str, factor: float) -> Built:
        graph = helper.make_graph(
            [
                helper.make_node("Mul", ["b", "f"], ["s"]),
                helper.make_node("Sub", ["a", "s"], ["d"]),
                helper.make_node("Abs", ["d"], ["y"]),
            ],
            "distance",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 2]) for n in "ab"],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
            [numpy_helper.from_array(np.float32(factor), "f")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, tmp_path / name)
        return Built(tmp_path / name)

    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(4, 2)).astype(np.float32) for name in "ab"}
    right, wrong = distance("right.onnx", 1.0), distance("wrong.onnx", 1.5)
    assert cases._distances(right, right, feeds) is None
    assert "d(a, a)" in (cases._distances(right, wrong, feeds) or "")


@pytest.mark.slow
def test_a_case_is_held_to_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    residual_mlp(tmp_path / "mlp.onnx", 128)
    np.savez(tmp_path / "mlp.npz", x=np.random.default_rng(0).normal(size=(96, 8)).astype(np.float32))
    found = cases.try_case(tmp_path, "mlp")
    assert found.wrong == []
    assert 0.4 < found.left["apart"] < 0.6 and found.left["identity"] == 1.0
    monkeypatch.setitem(cases.CASES, "mlp", Case(left=0.3))
    assert any("left 0.5" in wrong for wrong in cases.try_case(tmp_path, "mlp").wrong)
