"""Models that onnxruntime's optimisers wrote: as good to cut and to shrink as they were before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from ndonnx.api.compress import compress
from ndonnx.config.recipe import Recipe
from ndonnx.graph import fold_constants, load
from ndonnx.graph.passes.fused import take_apart
from ndonnx.graph.shapes import onnxruntime_types as runtime_types
from tests.helpers import families
from tests.helpers.models import BUILDERS, Net, floats, loaded, parted, run
from tests.helpers.runs import SMALL


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


# Attention and embedding, taken apart

WIDTH, HEADS, STEPS = 8, 2, 5


def _lengths(net: Net) -> str:
    return net.input("lengths", "N", dtype=TensorProto.INT32)


def _mask(net: Net, *shape: int | str) -> str:
    return net.input("mask", *shape, dtype=TensorProto.INT32)


def packed(*, widths: tuple[int, int, int] = (8, 8, 8), **attributes: Any) -> Callable[[Net], str]:
    """`Attention` without a mask."""

    def build(net: Net) -> str:
        weights = net.weight("packed", 6, sum(widths)), net.weight("shift", sum(widths))
        return _attention(net, net.input("x", "N", "S", 6), *weights, **attributes)

    return build


def _attention(net: Net, *inputs: str, **attributes: Any) -> str:
    return net.op("Attention", *inputs, out="y", domain="com.microsoft", num_heads=HEADS, **attributes)


def masked(mask: Callable[[Net], str], added: bool = False, **attributes: Any) -> Callable[[Net], str]:
    """`Attention` with a mask, and with something added to its scores."""

    def build(net: Net) -> str:
        x = net.input("x", "N", "S", 6)
        more = ["", net.input("bias", "N", HEADS, "S", "S")] if added else []
        return _attention(net, x, net.weight("packed", 6, 24), net.weight("shift", 24), mask(net), *more, **attributes)

    return build


def apart(*more: Callable[[Net], str], values: int = WIDTH, **attributes: Any) -> Callable[[Net], str]:
    """`MultiHeadAttention` of queries of one sequence and keys and values of another."""

    def build(net: Net) -> str:
        sides = [net.input("x", "N", "S", WIDTH), net.input("k", "N", "T", WIDTH), net.input("v", "N", "T", values)]
        rest = [make(net) for make in more]
        return net.op(
            "MultiHeadAttention", *sides, *rest, out="y", domain="com.microsoft", num_heads=HEADS, **attributes
        )

    return build


def _nothing(net: Net) -> str:
    return ""


def embedded(*, kinds: bool = True, mask: bool = False, places: bool = False) -> Callable[[Net], str]:
    """`EmbedLayerNormalization` with three tables or two."""

    def build(net: Net) -> str:
        ids = net.input("ids", "N", "S", dtype=TensorProto.INT32)
        others = [net.input("kinds", "N", "S", dtype=TensorProto.INT32) if kinds else ""]
        tables = [net.weight("words", 11, WIDTH), net.weight("places", 7, WIDTH)]
        tables.append(net.weight("two", 2, WIDTH) if kinds else "")
        sides = [net.weight("scale", WIDTH), net.weight("shift", WIDTH)]
        more = [_mask(net, "N", "S") if mask else ""] if mask or places else []
        more += [net.input("numbers", "N", "S", dtype=TensorProto.INT32)] if places else []
        outs = ["y", "lengths_of"]
        net.op("EmbedLayerNormalization", ids, *others, *tables, *sides, *more, out=outs, domain="com.microsoft")
        return "y"

    return build


FORMS: dict[str, Callable[[Net], str]] = {
    "packed": packed(),
    "packed, narrow values": packed(widths=(8, 8, 4), qkv_hidden_sizes=[8, 8, 4]),
    "packed, one direction": packed(unidirectional=1),
    "packed, scaled": packed(scale=0.25),
    "packed, mask": masked(lambda net: _mask(net, "N", "S")),
    "packed, mask and filter": masked(lambda net: _mask(net, "N", "S"), mask_filter_value=-50.0),
    "packed, mask by position": masked(lambda net: _mask(net, "N", "S", "S")),
    "packed, lengths": masked(_lengths),
    "packed, lengths, one direction": masked(_lengths, unidirectional=1),
    "packed, mask and bias": masked(lambda net: _mask(net, "N", "S"), added=True),
    "apart": apart(),
    "apart, bias": apart(lambda net: net.weight("shift", 24)),
    "apart, wide values": apart(values=12),
    "apart, mask": apart(_nothing, lambda net: _mask(net, "N", "T")),
    "apart, added": apart(_nothing, _nothing, lambda net: net.input("bias", 1, HEADS, "S", "T")),
    "apart, scaled": apart(scale=0.2),
    "embedding": embedded(),
    "embedding of two": embedded(kinds=False),
    "embedding, lengths": embedded(mask=True),
    "embedding, numbered": embedded(places=True),
}


def _drawn(model: onnx.ModelProto) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    sizes = {"N": 3, "S": STEPS, "T": 4}
    found: dict[str, Any] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [dim.dim_value or sizes[dim.dim_param] for dim in dims]
        highest = {"ids": 11, "numbers": 7, "lengths": STEPS + 1}.get(value.name, 2)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            found[value.name] = rng.standard_normal(shape, np.float32)
        else:
            found[value.name] = rng.integers(1 if value.name == "lengths" else 0, highest, shape).astype(np.int32)
        if value.name == "mask":
            found[value.name][..., 0] = 1  # each sees something
    return found


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("name", FORMS)
def test_attention_and_embedding_are_taken_apart(name: str, opset: int) -> None:
    net = Net(8)
    y = FORMS[name](net)
    outputs = [y, "lengths_of"] if "embedding, lengths" in name else [y]
    types = {y: floats(y, "N", "S", "C")}
    types["lengths_of"] = onnx.helper.make_tensor_value_info("lengths_of", TensorProto.INT32, ["N"])
    proto = net.proto(*outputs, opset=opset, domains={"com.microsoft": 1}, types=types)
    working = fold_constants(loaded(proto))
    assert {node.domain for node in working.graph} == {""}
    onnx.checker.check_model(ir.to_proto(working), full_check=True)
    feed = _drawn(proto)
    for output, value in run(proto, feed).items():
        np.testing.assert_allclose(run(working, feed)[output], value, rtol=1e-4, atol=1e-5)


STAYING: dict[str, Callable[[Net], str]] = {
    "weights that are computed": lambda net: _attention(
        net, net.input("x", "N", "S", 6), net.relu(net.input("w", 6, 24)), net.weight("shift", 24)
    ),
    "lengths of another batch": masked(lambda net: net.input("ends", "M", dtype=TensorProto.INT32)),
    "heads that do not fit": lambda net: net.op(
        "Attention",
        net.input("x", "N", "S", 6),
        net.weight("packed", 6, 24),
        out="y",
        domain="com.microsoft",
        num_heads=3,
    ),
    "queries, keys and values in one": lambda net: net.op(
        "MultiHeadAttention", net.input("x", "N", "S", HEADS, 3, 4), out="y", domain="com.microsoft", num_heads=HEADS
    ),
}


@pytest.mark.parametrize("name", STAYING)
def test_another_form_stays_whole(name: str) -> None:
    net = Net(9)
    y = STAYING[name](net)
    model = ir.from_proto(net.proto(y, domains={"com.microsoft": 1}, types={y: floats(y, "N", "S", 8)}))
    before = [node.op_type for node in model.graph]
    assert not take_apart(model)
    assert [node.op_type for node in model.graph] == before


def test_two_operators_of_one_packed_weight_share_its_parts() -> None:
    net = Net(10)
    x = net.input("x", "N", "S", 8)
    net.weight("packed", 8, 24)
    net.weight("shift", 24)
    for layer in range(2):
        y = net.op("Attention", x, "packed", "shift", domain="com.microsoft", num_heads=HEADS, out=f"seen{layer}")
        x = net.op("Add", net.matmul(y, 8, 8), x)
    working = fold_constants(loaded(net.proto(x, domains={"com.microsoft": 1}, types={x: floats(x, "N", "S", 8)})))
    parts = [name for name in working.graph.initializers if name.startswith(("packed", "shift"))]
    assert len(parts) == 6
    assert all(len(working.graph.initializers[name].uses()) == 2 for name in parts)


def test_heads_of_fused_attention_go(tmp_path: Path) -> None:
    """With a mask that is computed inside the fused operator, and so inside each student."""
    net = Net(11)
    x = net.matmul(net.input("x", "N", "S", 12), 12, 12, out="first")
    mask = net.input("mask", "N", "S", dtype=TensorProto.INT32)
    for layer in range(2):
        weights = net.weight(f"packed{layer}", 12, 36), net.weight(f"shift{layer}", 36)
        y = net.op("Attention", x, *weights, mask, domain="com.microsoft", num_heads=4, out=f"seen{layer}")
        outs = [f"normed{layer}", "", "", f"sum{layer}"]
        sides = net.weight(f"scale{layer}", 12), net.weight(f"shift_{layer}", 12)
        net.op("SkipLayerNormalization", net.matmul(y, 12, 12), x, *sides, domain="com.microsoft", out=outs)
        x = outs[0]
    teacher = net.proto(x, opset=14, domains={"com.microsoft": 1}, types={x: floats(x, "N", "S", 12)})
    _, parts = parted(teacher)
    assert [n.widths for n in parts.distillable] == [[4], [4]]
    path, data, output = tmp_path / "teacher.onnx", tmp_path / "data.npz", tmp_path / "student.onnx"
    onnx.save(teacher, path)
    rng = np.random.default_rng(2)
    seen = (np.arange(STEPS) < rng.integers(2, STEPS + 1, (16, 1))).astype(np.int32)
    np.savez(data, x=rng.standard_normal((16, STEPS, 12), np.float32), mask=seen)
    report = compress(path, data=str(data), output=output, recipe=Recipe(**SMALL | {"keep": 0.5})).report
    assert report.student.parameters < 0.7 * report.teacher.parameters
    assert [n.status for n in report.neighbourhoods].count("distilled") == 2
