"""Models in 8 bits: the numbers by hand, answers as fake-quantised ones, and float where float was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ndonnx.assemble.quantise import Scheme, can_be_quantised, prepared, quantisable, quantised, scales_of
from ndonnx.assemble.quantise_numbers import activation_scale, least_scales, quantise_bias, weight_scales
from ndonnx.assemble.quantise_pieces import executed, grouped, how_executed, pieces_of, wished
from ndonnx.assemble.quantise_ranges import Histogram, measure_ranges
from ndonnx.assemble.verify_quantised import verify_quantised
from ndonnx.errors import VerificationError
from ndonnx.graph import load
from ndonnx.graph.interface import Interface
from ndonnx.graph.passes.fold_scales import fold_scales
from ndonnx.graph.save import serialise
from tests.helpers.models import Net, inputs_of, residual_cnn, run

STATIC = Scheme("static", "all")


def opened(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    onnx.save(proto, folder / "model.onnx")
    return load(folder / "model.onnx")


def in_8_bits(proto: onnx.ModelProto, folder: Path, scheme: Scheme = STATIC, kept: tuple[str, ...] = ()) -> ir.Model:
    base = prepared(opened(proto, folder), scheme.mode)
    return quantised(base, scheme, measure_ranges(base, [inputs_of(proto, 64)], threads=1), kept)


def first(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return next(iter(run(proto, feeds).values()))


def answers(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return first(onnx.load_from_string(serialise(model)), feeds)


def two_convolutions() -> onnx.ModelProto:
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 4, 8, 8), 4, 16, out="first"), out="between")
    net.conv(x, 16, 8, out="y")
    return net.proto("y")


@pytest.mark.parametrize(
    ("ends", "scale", "zero"),
    [
        ((-1.0, 3.0), 4 / 255, 64),  # 1 / (4/255) = 63.75
        ((0.0, 2.55), 0.01, 0),
        ((1.0, 5.1), 0.02, 0),  # zero has to be in it
        ((-2.55, -1.0), 0.01, 255),
        ((0.0, 0.0), 1.0, 0),
    ],
)
def test_scale_and_zero_point_of_a_range(ends: tuple[float, float], scale: float, zero: int) -> None:
    found = activation_scale(ends)
    assert found[0] == pytest.approx(scale, rel=1e-6) and found[1] == zero


def test_scales_of_weights_by_hand() -> None:
    weight = np.array([[1.27, -2.54], [0.0, 0.0], [0.127, 0.0]], np.float32)
    assert weight_scales(weight, 0, False) == pytest.approx([0.02, 1, 0.001])
    assert weight_scales(weight, 1, True) == pytest.approx([1.27 / 63, 2.54 / 63])
    assert weight_scales(weight, None, False) == pytest.approx(0.02)


def test_a_bias_fits_into_32_bits() -> None:
    bias, scale = np.array([1e6, 0.5], np.float32), np.float32(1e-3)
    least = least_scales(bias, scale)
    assert least == pytest.approx([1e9 / 2**30, 500 / 2**30])
    assert np.abs(quantise_bias(bias, (least * scale).astype(np.float32))).max() <= 2**30 * 1.001


def test_a_histogram_knows_its_ends_and_its_percentiles() -> None:
    histogram, rng = Histogram(), np.random.default_rng(0)
    first, second = rng.standard_normal(60_000).astype(np.float32), np.float32(40) * np.ones(6, np.float32)
    for part in (first[:30_000], second, first[30_000:], np.array([np.inf, np.nan, -3.4e38], np.float32)):
        histogram.add(part)
    assert histogram.range_by("minmax") == (float(first.min()), 40.0)
    low, high = histogram.range_by("percentile 99.99")
    wanted = np.quantile(np.concatenate([first, second]), [5e-5, 1 - 5e-5])
    assert low == pytest.approx(wanted[0], abs=0.02) and high == 40.0, "6 in 60,000 are more than a half of 0.0001"
    histogram.add(rng.standard_normal(600_000).astype(np.float32))
    assert histogram.range_by("percentile 99.99")[1] < 6


def test_the_range_of_least_error_cuts_an_outlier() -> None:
    histogram, rng = Histogram(), np.random.default_rng(0)
    values = np.append(rng.standard_normal(200_000), 100.0).astype(np.float32)
    histogram.add(values)

    def error(ends: tuple[float, float]) -> float:
        scale, zero = activation_scale(ends)
        steps = np.clip(np.rint(values / scale) + zero, 0, 255)
        return float(np.mean(((steps - zero) * scale - values) ** 2))

    low, high = histogram.range_by("mse")
    assert error((low, high)) < error(histogram.range_by("minmax"))
    assert error((low, high)) <= min(error((low, part * 100.0)) for part in np.linspace(0.05, 1, 20)) * 1.02


def test_answers_are_those_of_a_fake_quantised_computation(tmp_path: Path) -> None:
    net = Net()
    net.gemm(net.relu(net.gemm(net.input("x", "N", 6), 6, 16, out="wide"), out="r"), 16, 5, out="y")
    proto = net.proto("y")
    model = in_8_bits(proto, tmp_path, Scheme("static", "linear", narrow=True))
    feeds, scales = inputs_of(proto, 32), scales_of(model)
    assert scales.keys() == {"x", "r"}, "an activation takes in the value before it, and the answer is in float"

    def fake(values: np.ndarray, name: str) -> np.ndarray:
        scale, zero = scales[name]
        return (np.clip(np.rint(values / np.float32(scale)) + zero, 0, 255) - zero) * scale

    def fake_weight(name: str) -> np.ndarray:
        weight = net.weights[name]
        steps = weight_scales(weight, 0, True)[:, None]
        return np.rint(weight / steps) * steps

    inner = np.maximum(fake(feeds["x"], "x") @ fake_weight("wide.weight").T + net.weights["wide.bias"], 0)
    wanted = fake(inner, "r") @ fake_weight("y.weight").T + net.weights["y.bias"]
    assert answers(model, feeds) == pytest.approx(wanted, abs=2 * scales["r"][0])
    assert np.mean((answers(model, feeds) - wanted) ** 2) < 1e-4 * wanted.var()


def test_everything_is_computed_with_integers(tmp_path: Path) -> None:
    proto = residual_cnn()
    model = in_8_bits(proto, tmp_path)
    found = executed(model)
    layers = sum(node.op_type in ("Conv", "Gemm") for node in proto.graph.node)
    assert (found.quantised_nodes, found.float_nodes) == (layers, 0)
    feeds = inputs_of(proto, 16)
    wanted = first(proto, feeds)
    assert np.mean((answers(model, feeds) - wanted) ** 2) < 0.02 * wanted.var()
    assert len(serialise(model)) < len(proto.SerializeToString()) * 2, "names and scales of a tiny model"


def test_a_layer_that_is_kept_is_computed_in_float(tmp_path: Path) -> None:
    proto = two_convolutions()
    for name in (node.name for node in proto.graph.node if node.op_type == "Conv"):
        model = in_8_bits(proto, tmp_path, kept=(name,))
        found = executed(model)
        assert (found.quantised_nodes, found.float_nodes) == (1, 1)
        weights = {v.const_value.dtype for v in model.graph.initializers.values() if v.const_value is not None}
        assert ir.DataType.FLOAT in weights


def test_a_kept_layer_between_integers_is_computed_in_float(tmp_path: Path) -> None:
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 4, 8, 8), 4, 16))
    x = net.relu(net.conv(x, 16, 16, out="middle"))
    net.conv(x, 16, 8, out="y")
    proto = net.proto("y")
    (name,) = (node.name for node in proto.graph.node if node.output[0] == "middle")
    found = executed(in_8_bits(proto, tmp_path, kept=(name,)))
    assert (found.quantised_nodes, found.float_nodes) == (2, 1), "onnxruntime quantises such a layer by itself"


def test_products_with_ranges_of_each_run(tmp_path: Path) -> None:
    net = Net()
    ids = net.input("ids", "N", 4, dtype=onnx.TensorProto.INT64)
    x = net.op("Gather", net.weight("table", 100, 32), ids, out="vectors")
    x = net.op("Add", net.matmul(x, 32, 64), net.constant("shift", np.ones(64, np.float32)))
    net.op("MatMul", x, net.weight("last", 64, 3), out="y")
    proto = net.proto("y")
    base = prepared(opened(proto, tmp_path), "dynamic")
    model = quantised(base, Scheme("dynamic", narrow=True))
    feeds = {"ids": np.random.default_rng(0).integers(0, 100, (16, 4))}
    wanted = first(proto, feeds)
    assert np.mean((answers(model, feeds) - wanted) ** 2) < 3e-3 * wanted.var()
    assert len(quantisable(base, Scheme("dynamic"))) == 3 and executed(model).float_nodes == 0
    assert len(serialise(model)) < 0.6 * len(proto.SerializeToString())


def test_the_opset_is_raised_only_where_it_must_be(tmp_path: Path) -> None:
    for opset, wanted in ((11, 13), (13, 13), (18, 18)):
        net = Net()
        net.conv(net.input("x", "N", 4, 8, 8), 4, 8, out="y")
        proto = net.proto("y", opset=opset, ir_version=6 if opset == 11 else 9)
        base = prepared(opened(proto, tmp_path), "static")
        assert base.opset_imports[""] == wanted
        feeds = inputs_of(proto, 4)
        assert answers(base, feeds) == pytest.approx(first(proto, feeds), abs=1e-6)
    assert prepared(opened(proto, tmp_path), "dynamic").opset_imports[""] == 18


def test_norms_are_folded_into_convolutions(tmp_path: Path) -> None:
    net = Net()
    x = net.norm(net.conv(net.input("x", "N", 4, 8, 8), 4, 8, bias=False), 8)
    x = net.op("Mul", x, net.constant("factor", np.linspace(0.5, 2, 8, dtype=np.float32).reshape(8, 1, 1)))
    net.op("Add", net.constant("shift", np.float32(0.25)), x, out="y")
    proto = net.proto("y")
    folded = fold_scales(opened(proto, tmp_path))
    assert [node.op_type for node in folded.graph] == ["Conv"]
    feeds = inputs_of(proto, 4)
    assert answers(folded, feeds) == pytest.approx(first(proto, feeds), abs=1e-5)


def test_what_something_else_reads_is_not_folded(tmp_path: Path) -> None:
    net = Net()
    x = net.conv(net.input("x", "N", 4, 8, 8), 4, 8, out="c")
    net.op("Add", net.norm(x, 8), x, out="y")
    assert len(list(fold_scales(opened(net.proto("y"), tmp_path)).graph)) == 3


def test_inner_nodes_are_where_what_they_make_is_read() -> None:
    groups = grouped({"a": "n1", "b": "n1", "c": "n2", "d": "n3"}, ["b", "d"], ["n1", "n2", "n3"], 8)
    assert groups == [["a", "b"], ["d"]]
    assert grouped({"a": "n1", "b": "n2"}, ["a", "b", "z"], ["n1", "n2"], 2) == [["a", "b"], ["z"]]


def test_nodes_of_a_student_have_the_pieces_of_the_teacher(tmp_path: Path) -> None:
    from ndonnx.graph.working_copy import working_copy  # noqa: PLC0415
    from ndonnx.partition import partition  # noqa: PLC0415

    model = opened(residual_cnn(), tmp_path)
    parts = partition(working_copy(model))
    found = pieces_of(prepared(model, "static"), parts)
    assert {node.name for node in model.graph} == found.keys()
    for n in parts.neighbourhoods:
        assert all(found[node.name or ""] == n.name for node in n.nodes)


def test_answers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    proto = two_convolutions()
    before = opened(proto, tmp_path)
    model = in_8_bits(proto, tmp_path)
    verify_quantised(before, before, model, Interface(), inputs_of(proto, 4))
    end = model.graph.outputs[0].producer()
    value = None if end is None else end.inputs[1]
    assert end is not None and end.op_type == "DequantizeLinear" and value is not None
    value.const_value = ir.tensor(np.array(np.inf, np.float32), name=value.name)
    with pytest.raises(VerificationError, match="finite"):
        verify_quantised(before, before, model, Interface(), inputs_of(proto, 4))


def test_nothing_to_quantise(tmp_path: Path) -> None:
    net = Net()
    net.op("Softmax", net.relu(net.input("x", "N", 8)), axis=-1, out="y")
    assert not can_be_quantised(opened(net.proto("y"), tmp_path))
    assert can_be_quantised(opened(two_convolutions(), tmp_path))


def test_a_layer_that_is_not_computed_as_the_file_wants_it_is_told(tmp_path: Path) -> None:
    proto = two_convolutions()
    assert how_executed(opened(proto, tmp_path)) is None, "nothing in it is quantised"
    model = in_8_bits(proto, tmp_path)
    found = how_executed(model)
    assert found is not None and found[0].quantised_nodes == wished(model) == 2 and found[1] == ()
    convolution = next(node for node in model.graph if node.op_type == "Conv")
    made = convolution.outputs[0]
    model.graph.outputs.append(made)  # a float answer in the middle keeps the layer from being computed with integers
    made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), None
    found = how_executed(model)
    assert found is not None and found[0].quantised_nodes == 1
    assert found[1] == (
        "of 2 layers that are in 8 bits in the file, onnxruntime computes 1 with integers on this machine",
    )
