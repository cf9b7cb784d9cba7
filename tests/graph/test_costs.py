"""What models cost: parameters and multiply-accumulates counted by hand, for stated shapes, or not told at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ndonnx.graph import Cost, fold_constants, load, save, slice_cost
from ndonnx.graph.bound import bind
from ndonnx.graph.costs import parameters_of
from ndonnx.graph.einsum import contractions
from ndonnx.graph.macs import cost_of, macs_of, sample_cost
from ndonnx.graph.storage.files import compressed_bytes, file_bytes
from tests.helpers.models import BUILDERS, CUSTOM, Net, custom_op, floats, loaded, residual_cnn, with_if

MICROSOFT = "com.microsoft"


def cost(build: Callable[[Net], str], shapes: dict[str, Sequence[int]] | None = None, **options: Any) -> Cost:
    net = Net()
    return slice_cost(loaded(net.proto(build(net), **options)), shapes)


def test_cost_of_convolutions() -> None:
    plain = cost(lambda net: net.conv(net.input("x", "N", 3, 10, 12), 3, 8, 3))
    assert plain == Cost(3 * 8 * 9 + 8, 3 * 8 * 9 * 10 * 12)
    strided = cost(lambda net: net.conv(net.input("x", "N", 3, 10, 12), 3, 8, 3, stride=2, bias=False))
    assert strided == Cost(3 * 8 * 9, 3 * 8 * 9 * 5 * 6)
    grouped = cost(lambda net: net.conv(net.input("x", "N", 6, 4, 4), 6, 9, 3, group=3, bias=False))
    assert grouped == Cost(9 * 2 * 9, 9 * 2 * 9 * 16)
    depthwise = cost(lambda net: net.conv(net.input("x", "N", 6, 4, 4), 6, 6, 5, group=6))
    assert depthwise == Cost(6 * 25 + 6, 6 * 25 * 16)
    dilated = cost(
        lambda net: net.op("Conv", net.input("x", "N", 2, 9, 9), net.weight("w", 4, 2, 3, 3), dilations=[2, 2])
    )
    assert dilated == Cost(4 * 2 * 9, 4 * 2 * 9 * 5 * 5)
    volume = cost(lambda net: net.op("Conv", net.input("x", 1, 2, 4, 5, 6), net.weight("w", 3, 2, 1, 2, 3)))
    assert volume == Cost(3 * 2 * 6, 3 * 2 * 6 * 4 * 4 * 4)
    transposed = cost(
        lambda net: net.op(
            "ConvTranspose", net.input("x", "N", 6, 5, 7), net.weight("w", 6, 4, 2, 2), group=2, strides=[2, 2]
        )
    )
    assert transposed == Cost(6 * 4 * 4, 6 * 4 * 4 * 35)


def test_cost_of_matrix_products() -> None:
    assert cost(lambda net: net.gemm(net.input("x", "N", 10), 10, 7)) == Cost(77, 70)
    untransposed = cost(lambda net: net.op("Gemm", net.input("x", 5, 10), net.weight("w", 10, 7)))
    assert untransposed == Cost(70, 350)
    both = cost(lambda net: net.op("Gemm", net.input("x", 10, 5), net.weight("w", 7, 10), transA=1, transB=1))
    assert both == Cost(70, 350)
    assert cost(lambda net: net.matmul(net.input("x", "N", 6, 10), 10, 7)) == Cost(70, 6 * 70)
    batched = cost(lambda net: net.op("MatMul", net.input("q", "N", 4, 6, 8), net.input("k", "N", 4, 8, 9)))
    assert batched == Cost(0, 4 * 6 * 8 * 9)
    assert cost(lambda net: net.op("MatMul", net.input("q", 6, 8), net.weight("v", 8))) == Cost(8, 48)
    assert cost(lambda net: net.op("MatMul", net.input("q", 8), net.weight("v", 8))) == Cost(8, 8)


def test_cost_of_recurrent_layers() -> None:
    def lstm(net: Net) -> str:
        weights = net.weight("w", 2, 20, 3), net.weight("r", 2, 20, 5), net.weight("b", 2, 40)
        return net.op("LSTM", net.input("x", 7, "N", 3), *weights, hidden_size=5, direction="bidirectional")

    stated = {"x": (7, 1, 3)}
    assert cost(lstm, stated) == Cost(2 * 20 * 3 + 2 * 20 * 5 + 80, 7 * (2 * 20 * 3 + 2 * 20 * 5))


def test_what_counts_as_a_parameter() -> None:
    def mixed(net: Net) -> str:
        x = net.op("Mul", net.input("x", "N", 6), net.constant("scalar", np.array(2, np.float32)))
        x = net.op("Add", x, net.constant("half", np.ones(6, np.float16).astype(np.float32)))
        return net.op("Gather", x, net.ints(0, 1, 2), axis=1)

    assert cost(mixed) == Cost(6, 0)
    tied = BUILDERS["tied"]()
    shared = sum(math.prod(w.dims) for w in tied.graph.initializer)
    assert slice_cost(loaded(tied)).parameters == shared
    model = loaded(tied)
    nodes = [node for node in model.graph if "shared.first" in [value.name for value in node.inputs if value]]
    assert len(nodes) == 2
    assert cost_of(nodes, bind(model)) == Cost(8 * 8 * 9, 2 * 8 * 8 * 9 * 36)
    before = slice_cost(loaded(BUILDERS["constant_nodes"]()))
    assert before == slice_cost(fold_constants(loaded(BUILDERS["constant_nodes"]())))
    assert before.parameters == 60 + 40 + 4 + 12 + 3


def test_branches_cost_what_they_hold() -> None:
    model = loaded(with_if())
    chooser = next(node for node in model.graph if node.op_type == "If")
    assert parameters_of([chooser]) == 8
    matmul = helper.make_node("MatMul", ["x", "w"], ["z"])
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    branch = helper.make_graph([matmul], "branch", [], [floats("z", "N", 4)], [weight])
    net = Net()
    net.input("x", "N", 4)
    net.op("If", net.input("c", dtype=TensorProto.BOOL), out="y", then_branch=branch, else_branch=branch)
    assert slice_cost(loaded(net.proto("y"))).parameters == 2 * 16


def test_operators_of_other_domains_cost_no_macs_and_of_unknown_shapes_nothing_is_told() -> None:
    model = loaded(custom_op(op="Conv"))
    magic = next(node for node in model.graph if node.domain == CUSTOM)
    assert macs_of(magic, bind(model)) == 0
    net = Net()
    net.op("Magic", net.input("x", 4), domain=CUSTOM, out="unknown")
    net.op("MatMul", "unknown", net.weight("w", 4, 3), out="y")
    model = loaded(net.proto("y", domains={CUSTOM: 1}, types={"y": onnx.ValueInfoProto(name="y")}))
    assert slice_cost(model).macs is None


def resnet20() -> onnx.ModelProto:
    """Three stages of three units, shortcuts without weights (He et al. 2015, option A), for 32x32 pixels."""
    net = Net()
    x, width = net.relu(net.conv(net.input("x", "N", 3, 32, 32), 3, 16)), 16
    for stage in range(3):
        for unit in range(3):
            stride, to = (2, 2 * width) if stage and not unit else (1, width)
            y = net.conv(net.relu(net.conv(x, width, to, stride=stride)), to, to)
            if stride == 2:
                x = net.op("Slice", x, net.ints(0, 0), net.ints(99, 99), net.ints(2, 3), net.ints(2, 2))
                x = net.op("Pad", x, net.ints(0, width // 2, 0, 0, 0, width // 2, 0, 0))
            x, width = net.relu(net.op("Add", y, x)), to
    return net.proto(net.pooled_classifier(x, width, classes=10))


def test_cost_of_a_resnet20() -> None:
    layers = [(3, 16, 32)] + [(16, 16, 32)] * 6
    layers += [(16, 32, 16)] + [(32, 32, 16)] * 5 + [(32, 64, 8)] + [(64, 64, 8)] * 5
    parameters = sum(9 * a * b + b for a, b, _ in layers) + 64 * 10 + 10
    macs = sum(9 * a * b * size**2 for a, b, size in layers) + 64 * 10
    assert (parameters, macs) == (269_034, 40_551_040)
    assert slice_cost(loaded(resnet20())) == Cost(parameters, macs)


# Shapes


def strided_cnn(size: Sequence[int | str], depth: int = 2, stride: int = 2, batch: int | str = "N") -> onnx.ModelProto:
    """Convolutions and pools that leave open sizes open, and a classifier behind them."""
    net = Net()
    x, width = net.input("x", batch, 3, *size), 3
    for _ in range(depth):
        x, width = net.relu(net.conv(x, width, width + 2, stride=stride)), width + 2
        x = net.op("MaxPool", x, kernel_shape=[2, 2])
    return net.proto(net.pooled_classifier(x, width))


def test_open_sizes_are_told_for_a_stated_shape_and_not_at_all_without_one() -> None:
    model = loaded(strided_cnn(["height", "width"]))
    assert slice_cost(model).macs is None
    assert bind(model).open == ("x[2] (height)", "x[3] (width)")
    expected = slice_cost(loaded(strided_cnn([64, 48]))).macs
    assert expected is not None and expected > 0
    assert slice_cost(model, {"x": (1, 3, 64, 48)}).macs == expected
    assert slice_cost(model, {"x": (4, 3, 64, 48)}).macs == 4 * expected


@given(
    height=st.integers(33, 70),
    width=st.integers(33, 70),
    depth=st.integers(1, 2),
    stride=st.integers(1, 3),
    names=st.sampled_from([("height", "width"), ("s", "s2"), ("?", "?"), ("unk__0", "unk__1")]),
    batch=st.sampled_from(["N", "?", 3]),
)
@settings(max_examples=25)
def test_a_bound_size_is_as_good_as_one_that_the_file_states(
    height: int, width: int, depth: int, stride: int, names: tuple[str, str], batch: int | str
) -> None:
    model = fold_constants(loaded(strided_cnn(names, depth, stride, batch)))
    stated = fold_constants(loaded(strided_cnn([height, width], depth, stride, 1)))
    count = batch if isinstance(batch, int) else 2
    found = sample_cost(model.graph, bind(model, {"x": (count, 3, height, width)}))
    assert found == sample_cost(stated.graph, bind(stated))


def test_a_size_of_minus_one_is_open() -> None:
    proto = strided_cnn(["h", "w"])
    for dim in (proto.graph.input[0].type.tensor_type.shape.dim[axis] for axis in (0, 2, 3)):
        dim.dim_value = -1
    model = loaded(proto)
    assert slice_cost(model).macs is None
    assert bind(model).open == ("x[2]", "x[3]")
    assert slice_cost(model, {"x": (1, 3, 40, 40)}) == slice_cost(loaded(strided_cnn([40, 40], batch=1)))


def test_an_open_batch_alone_is_one_sample_also_where_a_reshape_hides_it() -> None:
    net = Net()
    x = net.op("Reshape", net.input("x", "N", 6, 4), net.ints(-1, 4))
    model = loaded(net.proto(net.matmul(x, 4, 5)))
    assert slice_cost(model).macs == 6 * 4 * 5


def test_open_sequences_are_no_samples() -> None:
    net = Net()
    net.input("x", "batch", "steps", 4)
    model = loaded(net.proto(net.matmul("x", 4, 5)))
    assert (slice_cost(model).macs, bind(model).open) == (None, ("x[1] (steps)",))
    assert slice_cost(model, {"x": (1, 7, 4)}).macs == 7 * 4 * 5


# Operators


def product_of(net: Net) -> tuple[str, str]:
    return net.input("a", 2, 5, 4), net.input("b", 2, 4, 3)


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bij,bjk->bik", [(2, 5, 4), (2, 4, 3)], 2 * 5 * 4 * 3),
        ("bij,bjk", [(2, 5, 4), (2, 4, 3)], 2 * 5 * 4 * 3),
        ("...ij,...jk->...ik", [(2, 5, 4), (2, 4, 3)], 2 * 5 * 4 * 3),
        ("...ij,...jk->...ik", [(7, 2, 5, 4), (2, 4, 3)], 7 * 2 * 5 * 4 * 3),
        ("bhqd,bhkd->bhqk", [(1, 2, 5, 4), (1, 2, 6, 4)], 2 * 5 * 6 * 4),
        (" i j , j -> i ", [(5, 4), (4,)], 20),
        ("ij,ij->", [(5, 4), (5, 4)], 20),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)], 2 * 3 * 4 + 2 * 4 * 5),
        ("ij,ij->ij", [(5, 4), (5, 4)], 0),
        ("ij->ji", [(5, 4)], 0),
        ("ii->i", [(4, 4)], 0),
    ],
)
def test_macs_of_an_einsum(equation: str, shapes: list[tuple[int, ...]], macs: int) -> None:
    assert contractions(equation, shapes) == macs
    net = Net()
    names = [net.input(f"x{i}", *shape) for i, shape in enumerate(shapes)]
    assert slice_cost(loaded(net.proto(net.op("Einsum", *names, equation=equation)))).macs == macs


HEADS, WIDTH, ROWS, SEEN = 2, 4, 5, 7
"""Of attentions: the width is a head's, and rows look at what is seen."""


def test_macs_of_an_attention_are_those_of_its_two_products() -> None:
    def apart(net: Net) -> str:
        query, key, value = (net.input(n, 1, HEADS, s, WIDTH) for n, s in (("q", ROWS), ("k", SEEN), ("v", SEEN)))
        return net.op("MatMul", net.op("MatMul", query, net.op("Transpose", key, perm=[0, 1, 3, 2])), value)

    def split(net: Net) -> str:
        query, key, value = (net.input(n, 1, HEADS, s, WIDTH) for n, s in (("q", ROWS), ("k", SEEN), ("v", SEEN)))
        return net.op("Attention", query, key, value)

    def joined(net: Net) -> str:
        query, key, value = (net.input(n, 1, s, HEADS * WIDTH) for n, s in (("q", ROWS), ("k", SEEN), ("v", SEEN)))
        return net.op("Attention", query, key, value, q_num_heads=HEADS, kv_num_heads=HEADS)

    def grouped(net: Net) -> str:
        query = net.input("q", 1, ROWS, HEADS * WIDTH)
        return net.op(
            "Attention", query, net.input("k", 1, SEEN, WIDTH), net.input("v", 1, SEEN, WIDTH),
            q_num_heads=HEADS, kv_num_heads=1,
        )  # fmt: skip

    def with_past(net: Net) -> str:
        query, key, value = (net.input(n, 1, HEADS, s, WIDTH) for n, s in (("q", ROWS), ("k", 3), ("v", 3)))
        past = net.input("pk", 1, HEADS, SEEN - 3, WIDTH), net.input("pv", 1, HEADS, SEEN - 3, WIDTH)
        return net.op("Attention", query, key, value, "", *past, out=("y", "k2", "v2"))

    expected = 2 * HEADS * ROWS * SEEN * WIDTH
    for build in (apart, split, joined, grouped, with_past):
        assert cost(build, opset=23, ir_version=10).macs == expected, build.__name__


def microsoft(build: Callable[[Net], str], *shape: int) -> int | None:
    """MACs of a model that ends in an operator of onnxruntime's, whose output nobody infers."""
    net = Net()
    out = build(net)
    proto = net.proto(out, domains={MICROSOFT: 1}, types={out: floats(out, *shape)})
    return slice_cost(loaded(proto)).macs


def test_macs_of_the_attentions_of_onnxruntime() -> None:
    whole = HEADS * WIDTH
    products = 2 * HEADS * ROWS * ROWS * WIDTH

    def op(kind: str, *inputs: str, **attributes: int) -> Callable[[Net], str]:
        def build(net: Net) -> str:
            names = [net.input(name, *INPUTS[name]) if name in INPUTS else name for name in inputs]
            names = [net.weight(name, 6, 3 * whole) if name == "w" else name for name in names]
            return net.op(kind, *names, domain=MICROSOFT, **attributes)

        return build

    assert microsoft(op("Attention", "x", "w", num_heads=HEADS), 1, ROWS, whole) == ROWS * 6 * 3 * whole + products
    for inputs in (("q", "q2", "q3"), ("packed",), ("q", "packed_kv")):
        found = microsoft(op("MultiHeadAttention", *inputs, num_heads=HEADS), 1, ROWS, whole)
        assert found == products, inputs
    longer = microsoft(op("MultiHeadAttention", "q", "far", "far2", num_heads=HEADS), 1, ROWS, whole)
    assert longer == 2 * HEADS * ROWS * SEEN * WIDTH
    grouped = {"num_heads": HEADS, "kv_num_heads": 1}
    assert microsoft(op("GroupQueryAttention", "q", "one", "one2", **grouped), 1, ROWS, whole) == products
    assert microsoft(op("GroupQueryAttention", "with_kv", "", "", **grouped), 1, ROWS, whole) == products
    assert microsoft(op("MoE", "q"), 1, ROWS, whole) is None


INPUTS: dict[str, tuple[int, ...]] = {
    "x": (1, ROWS, 6),
    **dict.fromkeys(("q", "q2", "q3"), (1, ROWS, HEADS * WIDTH)),
    **dict.fromkeys(("far", "far2"), (1, SEEN, HEADS * WIDTH)),
    **dict.fromkeys(("one", "one2"), (1, ROWS, WIDTH)),
    "packed": (1, ROWS, HEADS, 3, WIDTH),
    "packed_kv": (1, ROWS, HEADS, 2, WIDTH),
    "with_kv": (1, ROWS, (HEADS + 2) * WIDTH),
}


def quantised(net: Net, name: str, *shape: int) -> list[str]:
    """A quantised input or weight with its scale and zero point."""
    data = (
        net.constant(name, np.zeros(shape, np.int8)) if name == "w" else net.input(name, *shape, dtype=TensorProto.INT8)
    )
    scale = net.constant(f"{name}.scale", np.array(0.1, np.float32))
    return [data, scale, net.constant(f"{name}.zero", np.array(0, np.int8))]


def test_macs_of_quantised_operators_are_those_of_the_plain_ones() -> None:
    def qlinear(op: str, x: tuple[int, ...], w: tuple[int, ...]) -> Callable[[Net], str]:
        def build(net: Net) -> str:
            out = [net.constant("y.scale", np.array(0.1, np.float32)), net.constant("y.zero", np.array(0, np.int8))]
            return net.op(op, *quantised(net, "x", *x), *quantised(net, "w", *w), *out)

        return build

    def integer(op: str, x: tuple[int, ...], w: tuple[int, ...]) -> Callable[[Net], str]:
        return lambda net: net.op(op, quantised(net, "x", *x)[0], quantised(net, "w", *w)[0])

    for conv in (
        qlinear("QLinearConv", (1, 3, 9, 9), (8, 3, 3, 3)),
        integer("ConvInteger", (1, 3, 9, 9), (8, 3, 3, 3)),
    ):
        assert cost(conv).macs == 8 * 3 * 9 * 7 * 7
    for matmul in (qlinear("QLinearMatMul", (5, 4), (4, 3)), integer("MatMulInteger", (5, 4), (4, 3))):
        assert cost(matmul).macs == 5 * 4 * 3


def test_macs_of_products_that_onnxruntime_writes() -> None:
    def turned(net: Net) -> str:
        return net.op("FusedMatMul", net.input("x", 5, 4), net.weight("w", 3, 4), domain=MICROSOFT, transB=1)

    def both(net: Net) -> str:
        attributes = {"transA": 1, "transB": 1}
        return net.op("FusedMatMul", net.input("x", 4, 5), net.weight("w", 3, 4), domain=MICROSOFT, **attributes)

    def packed(net: Net) -> str:
        weight = net.constant("w", np.zeros((3, 1, 16), np.uint8)), net.constant("s", np.ones(3, np.float32))
        sizes = {"K": 4, "N": 3, "bits": 4, "block_size": 32}
        return net.op("MatMulNBits", net.input("x", 5, 4), *weight, domain=MICROSOFT, **sizes)

    for build in (turned, both, packed):
        assert microsoft(build, 5, 3) == 5 * 4 * 3


def branch(width: int, steps: int = 1) -> onnx.GraphProto:
    weight = numpy_helper.from_array(np.ones((4, width), np.float32), f"w{width}")
    back = numpy_helper.from_array(np.ones((width, 4), np.float32), f"b{width}")
    nodes = [helper.make_node("MatMul", ["x", f"w{width}"], [f"h{width}"])]
    nodes += [helper.make_node("MatMul", [f"h{width}", f"b{width}"], [f"z{width}"])]
    return helper.make_graph(nodes, "branch", [], [floats(f"z{width}", 1, 4)], [weight, back])


def test_of_branches_one_is_run() -> None:
    net = Net()
    net.input("x", 1, 4)
    net.op("If", net.input("c", dtype=TensorProto.BOOL), out="y", then_branch=branch(3), else_branch=branch(5))
    assert slice_cost(loaded(net.proto("y"))) == Cost(4 * 3 * 2 + 4 * 5 * 2, 4 * 5 * 2)


@pytest.mark.parametrize(("turns", "macs"), [(6, 6 * 16), (None, None)])
def test_a_loop_costs_its_body_as_often_as_a_constant_says(turns: int | None, macs: int | None) -> None:
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    inputs = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        floats("state", 1, 4),
    ]
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("MatMul", ["state", "w"], ["next"])]
    outputs = [helper.make_tensor_value_info("on", TensorProto.BOOL, []), floats("next", 1, 4)]
    body = helper.make_graph(nodes, "body", inputs, outputs, [weight])
    net = Net()
    count = net.input("n", dtype=TensorProto.INT64) if turns is None else net.constant("n", np.array(turns, np.int64))
    net.op("Loop", count, "", net.input("x", 1, 4), out="y", body=body)
    assert slice_cost(loaded(net.proto("y"))).macs == macs


# Files


def beside(folder: Path, location: str = "weights.bin") -> Path:
    """A model whose weights lie in another file."""
    path = folder / "model.onnx"
    onnx.save(residual_cnn(), path, save_as_external_data=True, location=location, size_threshold=0)
    return path


@pytest.mark.parametrize("location", ["weights.bin", "model.onnx.data", "model.onnx_data"])
def test_a_model_weighs_what_its_files_weigh(tmp_path: Path, location: str) -> None:
    path = beside(tmp_path, location)
    (tmp_path / "another.bin").write_bytes(bytes(1000))
    assert file_bytes(path) == path.stat().st_size + (tmp_path / location).stat().st_size
    alone = tmp_path / "alone.onnx"
    save(load(path), alone)
    assert file_bytes(alone) == alone.stat().st_size
    assert file_bytes(path) == pytest.approx(file_bytes(alone), rel=0.2)
    assert 0.5 * file_bytes(path) < compressed_bytes(path) < file_bytes(path)


def test_constants_and_branches_with_data_beside_are_weighed(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.ones(300, np.float32), "t")
    onnx.external_data_helper.set_external_data(tensor, "t.bin")
    inner = helper.make_graph([helper.make_node("Constant", [], ["z"], value=tensor)], "b", [], [floats("z", 300)])
    net = Net()
    net.op("If", net.input("c", dtype=TensorProto.BOOL), out="y", then_branch=inner, else_branch=inner)
    path = tmp_path / "model.onnx"
    proto = net.proto("y", types={"y": floats("y", 300)})
    (tmp_path / "t.bin").write_bytes(tensor.raw_data)
    onnx.save(proto, path)
    assert file_bytes(path) >= path.stat().st_size + 1200
