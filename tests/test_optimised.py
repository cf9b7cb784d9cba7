"""Models that onnxruntime's optimisers wrote: as good to cut and to shrink as they were before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ndonnx.graph import load, runtime_types
from ndonnx.pipeline import compress
from ndonnx.recipe import Recipe
from tests import families
from tests.models import BUILDERS, Net, floats, loaded, parted, run
from tests.runs import SMALL


def open_values(model: ir.Model) -> list[str | None]:
    """Names of the tensors of which neither ONNX nor onnxruntime told the type and the rank."""
    values = (value for node in model.graph for value in node.outputs if value.name)
    return [v.name for v in values if v.type is None or (v.shape is None and not v.is_graph_output())]


def behind(op: str, *constants: tuple[int, ...], domain: str = "com.microsoft", **attributes: Any) -> onnx.ModelProto:
    """Two dense layers behind an operator that ONNX does not define."""
    net = Net(5)
    x = net.matmul(net.input("x", "N", "S", 8), 8, 8)
    weights = [net.weight(f"w{i}", *shape) for i, shape in enumerate(constants)]
    others = [x] * {"MultiHeadAttention": 2, "SkipLayerNormalization": 1}.get(op, 0)
    net.op(op, x, *others, *weights, out="special", domain=domain, **attributes)
    y = net.op("Add", net.matmul(net.relu(net.matmul("special", 8, 20)), 20, 8), "special")
    domains = {domain: 1} if domain else None
    types = {y: floats(y, "N", "S", 8)}
    return net.proto(y, opset=14, domains=domains, types=types)


def n_bits() -> onnx.ModelProto:
    """A product with a matrix of whole numbers of four bits."""
    model = behind("MatMulNBits", K=8, N=8, bits=4, block_size=16)
    (node,) = (node for node in model.graph.node if node.op_type == "MatMulNBits")
    node.input.extend(["packed", "scales"])
    for name, array in (("packed", np.full((8, 1, 8), 0x5A, np.uint8)), ("scales", np.full(8, 0.1, np.float32))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


UNKNOWN_TO_ONNX: dict[str, Callable[[], onnx.ModelProto]] = {
    "LayerNormalization": lambda: behind("LayerNormalization", (8,), (8,), domain="", axis=-1),
    "SimplifiedLayerNormalization": lambda: behind("SimplifiedLayerNormalization", (8,), domain="", axis=-1),
    "SkipLayerNormalization": lambda: behind("SkipLayerNormalization", (8,), (8,)),
    "QuickGelu": lambda: behind("QuickGelu"),
    "MultiHeadAttention": lambda: behind("MultiHeadAttention", num_heads=2),
    "Attention": lambda: behind("Attention", (8, 24), (24,), num_heads=2),
    "MatMulNBits": n_bits,
}


@pytest.mark.parametrize("name", UNKNOWN_TO_ONNX)
def test_what_lies_behind_an_operator_unknown_to_onnx_has_its_types(name: str) -> None:
    model = loaded(UNKNOWN_TO_ONNX[name]())
    assert not open_values(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    assert str(values["special"].shape) == "[N,S,8]" and values["special"].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("name", UNKNOWN_TO_ONNX)
def test_what_lies_behind_an_operator_unknown_to_onnx_shrinks(name: str, tmp_path: Path) -> None:
    teacher = UNKNOWN_TO_ONNX[name]()
    path, data, output = tmp_path / "teacher.onnx", tmp_path / "data.npz", tmp_path / "student.onnx"
    onnx.save(teacher, path)
    feed = {"x": np.random.default_rng(0).standard_normal((16, 5, 8), np.float32)}
    np.savez(data, **feed)  # type: ignore[arg-type]
    report = compress(path, data=str(data), output=output, recipe=Recipe(**SMALL | {"keep": 0.5})).report
    assert report.student.parameters < report.teacher.parameters
    student = onnx.load(output)
    assert families.interface(student) == families.interface(teacher)
    (name_of_output,) = run(student, feed)
    assert np.isfinite(run(student, feed)[name_of_output]).all()


def test_onnxruntime_is_asked_once_for_all_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    net = Net(6)
    x = net.input("x", "N", "S", 8)
    for _ in range(6):
        x = net.op(
            "Add", net.matmul(net.op("MultiHeadAttention", x, x, x, domain="com.microsoft", num_heads=2), 8, 8), x
        )
    model = net.proto(x, domains={"com.microsoft": 1}, types={x: floats(x, "N", "S", 8)})
    onnx.save(model, tmp_path / "model.onnx")
    sessions, opener = [], runtime_types.open_quietly
    monkeypatch.setattr(runtime_types, "open_quietly", lambda content: sessions.append(1) or opener(content))
    assert not open_values(load(tmp_path / "model.onnx"))
    assert len(sessions) == 1
    onnx.save(BUILDERS["transformer"](), tmp_path / "plain.onnx")
    load(tmp_path / "plain.onnx")
    assert len(sessions) == 1  # where ONNX knows all, nobody is asked


@pytest.mark.parametrize("opset", [13, 14, 17])
def test_an_optimised_encoder_is_cut_as_the_plain_one(opset: int, tmp_path: Path) -> None:
    plain = families.encoder(opset=opset)
    optimised = families.fused(plain, tmp_path)
    assert {"LayerNormalization", "BiasGelu"} <= {node.op_type for node in optimised.graph.node}
    (_, one), (_, other) = parted(plain), parted(optimised)
    assert [n.widths for n in one.distillable] == [n.widths for n in other.distillable] == [[2], [40], [2], [40]]
    feed = families.drawn(plain, 3)
    np.testing.assert_allclose(run(other.model, feed)["logits"], run(plain, feed)["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["unet", "transformer", "shape_from_before", "inverted_bottleneck"])
def test_other_models_are_cut_as_before(name: str, tmp_path: Path) -> None:
    """onnxruntime writes down attributes that have their default: they mean what no attribute means."""
    plain = BUILDERS[name]()
    (_, one), (_, other) = parted(plain), parted(families.fused(plain, tmp_path))
    assert len(one.distillable) == len(other.distillable)
    assert other.coverage()[0] >= one.coverage()[0]


def test_an_optimised_encoder_shrinks_and_all_of_its_width_is_itself(tmp_path: Path) -> None:
    teacher = families.fused(families.encoder(), tmp_path)
    path, data, output = tmp_path / "teacher.onnx", tmp_path / "data.npz", tmp_path / "student.onnx"
    onnx.save(teacher, path)
    np.savez(data, **families.drawn(teacher, 16))  # type: ignore[arg-type]
    feed = families.drawn(teacher, 3, seed=1)
    compress(path, data=str(data), output=output, recipe=Recipe(**SMALL | {"keep": 1.0, "steps": 0}))
    np.testing.assert_array_equal(run(onnx.load(output), feed)["logits"], run(teacher, feed)["logits"])
    report = compress(path, data=str(data), output=output, recipe=Recipe(**SMALL | {"keep": 0.5})).report
    assert report.student.parameters < 0.75 * report.teacher.parameters
