"""Models that are no chain of convolutions: each comes out as a student that runs, or says why a part is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import ndonnx
from ndonnx.assemble.splice import splice
from ndonnx.config.recipe import Recipe
from ndonnx.errors import UsageError
from ndonnx.flow import finish, train
from ndonnx.graph import Cost, fold_constants
from ndonnx.graph.macs import sample_cost
from ndonnx.graph.passes.fused import take_apart
from ndonnx.graph.passes.fused_writer import is_inside_fused
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.shapes.targets import shape_readers
from ndonnx.partition import find_groups
from ndonnx.students import TeacherSlice
from ndonnx.students.cutting import shrink
from ndonnx.students.zeroing import check_by_zeroing
from ndonnx.teacher import sessions
from tests.helpers import families
from tests.helpers.families import Enhancer, Mixer, Pyramid, Tagger, exported
from tests.helpers.models import Net, boundary, floats, loaded, parted, run

QUICK: dict[str, Any] = {
    "keep": 0.5,
    "steps": 2,
    "batch_size": 8,
    "finetune_steps": 2,
    "samples": 16,
    "executor": "serial",
    "workers": 1,
    "device": "cpu",
    "precision": "fp32",
}


@dataclass
class Family:
    """A teacher, and what is expected of its neighbourhoods."""

    make: Callable[[Path], onnx.ModelProto]
    distilled: int
    """How many can be distilled."""
    told: str = ""
    """Part of the reason why something is kept."""


def _mixer() -> onnx.ModelProto:
    return exported(Mixer(), torch.randn(2, families.STEPS, 8))


FAMILIES: dict[str, Family] = {
    "LSTM tagger": Family(lambda _: exported(Tagger(), families.bytes_example()), 2),
    "LSTM tagger, new exporter": Family(lambda _: exported(Tagger(), families.bytes_example(), dynamo=True), 2),
    "RNN tagger": Family(lambda _: exported(Tagger("RNN", 4), families.bytes_example()), 3),
    "GRU enhancer": Family(lambda _: exported(Enhancer(), torch.randn(2, 1, 40)), 1),
    "pyramid": Family(lambda _: exported(Pyramid(), torch.randn(2, 3, 16, 16), outputs=3), 6),
    "control flow between units": Family(lambda _: families.detector(), 2, "holds If"),
    "all control flow": Family(lambda _: families.all_control(), 0, "holds If"),
    "scan": Family(lambda _: families.scanned(), 2, "holds Scan"),
    "STFT": Family(lambda _: families.spectral(), 1),
    "chance in one unit": Family(lambda _: families.unsupported(), 2, "not followed through Random"),
    "quantised half": Family(lambda _: families.half_quantised(), 2, "quantised"),
    "fused by onnxruntime": Family(lambda folder: families.fused(families.detector(), folder), 2),
    "mixer fused by onnxruntime": Family(lambda folder: families.fused(_mixer(), folder), 3),
}


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Beside other work, threads that wait for each other make these small runs many times slower."""
    for module in (train, finish, sessions):
        monkeypatch.setattr(module, "usable_cores", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SLOW = {"LSTM tagger, new exporter"}
"""The exporter takes seconds to load."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FAMILIES])
def test_family(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    teacher = family.make(tmp_path)
    path, data, output = tmp_path / "teacher.onnx", tmp_path / "data.npz", tmp_path / "student.onnx"
    onnx.save(teacher, path)
    np.savez(data, **families.drawn(teacher, 16))  # type: ignore[arg-type]
    checked = ndonnx.inspect(path, check=True, data=str(data))
    reasons = [piece.reason for piece in checked.neighbourhoods if piece.status == "kept"]
    assert len(checked.neighbourhoods) - len(reasons) == family.distilled
    assert all(reasons)
    assert not family.told or any(family.told in str(reason) for reason in reasons)

    report = ndonnx.compress(path, data=str(data), output=output, recipe=Recipe(**QUICK)).report
    assert [n.status for n in report.neighbourhoods].count("distilled") == family.distilled
    assert all(n.status == "distilled" or n.reason for n in report.neighbourhoods)
    assert report.student.parameters < report.teacher.parameters or not family.distilled
    student = onnx.load(output)
    assert families.interface(student) == families.interface(teacher)
    fresh = families.drawn(teacher, 3, seed=1)
    for value, found in run(student, fresh).items():
        assert found.shape == run(teacher, fresh, [value])[value].shape
        assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_unit_of_a_recurrent_layer_goes_with_all_that_reads_it(kind: str) -> None:
    """Not one weight, bias or number of the removed units stays, in either direction."""
    slice_ = fold_constants(loaded(exported(Tagger(kind), families.bytes_example())))
    groups = find_groups(slice_.graph, slice_.graph.outputs[0])
    assert [group.width for group in groups.groups] == [8, 12, 12]  # the embedding's, then the layers'
    kept = np.ones(groups.units, dtype=bool)
    kept[[8, 11, 13, 28, 29]] = False
    samples = families.drawn(ir.to_proto(slice_), 4)
    student = shrink(slice_, groups, kept)
    layers = [node for node in student.graph if node.op_type == kind]
    assert [node.attributes["hidden_size"].as_int() for node in layers] == [9, 10]
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    shapes = [[tuple(value.shape or ()) for value in node.inputs[1:4] if value is not None] for node in layers]
    assert shapes[0] == [(2, 9 * gates, 8), (2, 9 * gates, 9), (2, 9 * gates * 2)]
    assert shapes[1] == [(2, 10 * gates, 18), (2, 10 * gates, 10), (2, 10 * gates * 2)]
    check_by_zeroing(TeacherSlice("n01", slice_, groups, samples), student, kept)
    kept[[1, 6]] = False
    narrow = shrink(slice_, groups, kept)
    assert narrow.graph.initializers["table.weight"].shape == (256, 6)
    check_by_zeroing(TeacherSlice("n01", slice_, groups, samples), narrow, kept)


def test_quantised_weights_stay_quantised() -> None:
    """A student with their values in float32 would be larger than the teacher."""
    _, parts = parted(families.half_quantised())
    weights = {name: value.dtype for name, value in parts.model.graph.initializers.items()}
    assert weights["q.weight"] == ir.DataType.INT8
    inside = {value.name for n in parts.distillable for node in n.nodes for value in node.inputs if value is not None}
    assert "q.weight" not in inside


def test_costs_of_a_recurrent_layer() -> None:
    """Both directions: four gates of 12 units read 8 bytes' features and 12 states, at each of 6 steps."""
    _, parts = parted(exported(Tagger(layers=1), families.bytes_example()))
    (layer,) = (node for node in parts.model.graph if node.op_type == "LSTM")
    weights = 2 * 4 * 12 * (8 + 12)
    assert sample_cost([layer], parts.shapes) == Cost(weights + 2 * 2 * 4 * 12, families.STEPS * weights)


def test_states_that_others_hand_in_keep_their_size() -> None:
    """A state that comes from outside has as many units as it has; the layer behind may still shrink."""
    net = Net(3)
    x, state = net.input("x", 5, "N", 4), net.input("state", 1, "N", 6)
    for name, shape in (("w", (1, 18, 4)), ("r", (1, 18, 6)), ("w2", (1, 24, 6)), ("r2", (1, 24, 6))):
        net.weight(name, *shape)
    net.op("GRU", x, "w", "r", "", "", state, out=["y", "last"], hidden_size=6)
    y = net.op("Squeeze", "y", net.ints(1))
    net.op("LSTM", y, "w2", "r2", out=["y2"], hidden_size=6)
    y = net.op("MatMul", net.op("Squeeze", "y2", net.ints(1)), net.weight("out", 6, 3))
    model = infer_shapes(ir.from_proto(net.proto(y)))
    groups = find_groups(list(model.graph), model.graph.outputs[0])
    assert [(group.name, group.width) for group in groups.groups] == [("y2", 6)]


def test_zeros_as_initial_states_are_left_out_but_not_forgotten() -> None:
    """The shape that they are made from is still read by the teacher, so it may not lie inside a neighbourhood."""
    proto = exported(Tagger("GRU"), families.bytes_example())
    teacher, parts = parted(proto)
    given = [[node.inputs[5] for node in model.graph if node.op_type == "GRU"] for model in (teacher, parts.model)]
    assert all(state is not None for state in given[0])
    assert given[1] == [None, None]
    table = next(node.outputs[0] for node in parts.model.graph if node.op_type == "Gather")
    assert shape_readers(table)
    feed = families.drawn(proto, 3)
    np.testing.assert_array_equal(run(proto, feed)["y0"], run(parts.model, feed)["y0"])


def test_a_deep_recurrent_net_with_the_steps_first_is_cut_between_its_layers() -> None:
    model = exported(Tagger("RNN", 5), families.bytes_example())
    _, parts = parted(model)
    assert len(parts.distillable) > 1
    _, layers = parted(model, granularity="layer")
    sizes = [[str(size) for size in n.entry.shape] for n in layers.distillable if n.entry is not None and n.entry.shape]
    assert sizes and all("N" in size for size in sizes)


def test_a_state_without_sample_axis_in_front_is_refused_in_one_line(tmp_path: Path) -> None:
    net = Net(4)
    net.op("GRU", net.input("x", 5, "N", 4), net.weight("w", 1, 18, 4), net.weight("r", 1, 18, 6), "", "",
           net.input("state", 1, "N", 6), out=["y", "next"], hidden_size=6)  # fmt: skip
    onnx.save(net.proto("y"), tmp_path / "teacher.onnx")
    np.savez(tmp_path / "data.npz", x=np.zeros((5, 3, 4), np.float32), state=np.zeros((1, 3, 6), np.float32))
    with pytest.raises(UsageError) as refused:
        ndonnx.compress(tmp_path / "teacher.onnx", data=str(tmp_path / "data.npz"), recipe=Recipe(**QUICK))
    assert len(str(refused.value).splitlines()) == 1


FUSED: dict[str, tuple[list[tuple[int, ...] | None], dict[str, Any]]] = {
    "BiasGelu": ([(4,)], {}),
    "FastGelu": ([(4,)], {}),
    "FusedConv": ([(5, 3, 1, 1), (5,)], {"activation": "LeakyRelu", "activation_params": [0.2]}),
    "FusedConv ": (
        [(3, 1, 3, 3)],
        {"activation": "Clip", "activation_params": [0.0, 0.4], "group": 3, "pads": [1] * 4},
    ),
    "FusedGemm": ([(5, 4), (5,)], {"activation": "Sigmoid", "transB": 1, "alpha": 0.5}),
    "FusedMatMul": ([(5, 4)], {"transB": 1, "alpha": 0.3}),
    "Gelu": ([], {}),
    "QuickGelu": ([], {"alpha": 1.5}),
    "SkipLayerNormalization": ([(2, 3, 4), (4,), (4,), (4,)], {"epsilon": 1e-5}),
    "SkipLayerNormalization ": ([(2, 3, 4), (4,)], {}),
    "SkipSimplifiedLayerNormalization": ([(2, 3, 4), (4,), (4,)], {"epsilon": 1e-5}),
}
"""Shapes of the constants behind the data, and attributes."""


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("name", FUSED)
def test_what_onnxruntime_fuses_is_taken_apart(name: str, opset: int) -> None:
    op, (constants, attributes) = name.strip(), FUSED[name]
    net = Net(5)
    shape = (2, 3, 4, 4) if op == "FusedConv" else (3, 4) if op == "FusedGemm" else (2, 3, 4)
    x = net.input("x", *shape)
    weights = [net.weight(f"w{i}", *size) if size is not None else "" for i, size in enumerate(constants)]
    net.op(op, x, *weights, out="y", domain="com.microsoft", **attributes)
    proto = net.proto("y", opset=opset, domains={"com.microsoft": 1}, types={"y": floats("y", *["?"] * len(shape))})
    working = fold_constants(loaded(proto))
    assert {node.domain for node in working.graph} == {""}
    onnx.checker.check_model(ir.to_proto(working), full_check=True)
    inner = [value for node in working.graph for value in node.outputs if value.name != "y"]
    assert all(is_inside_fused(value) for value in inner) and not is_inside_fused(working.graph.outputs[0])
    feed = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    np.testing.assert_allclose(run(working, feed)["y"], run(proto, feed)["y"], rtol=1e-4, atol=1e-5)


def test_the_sum_that_a_fused_norm_hands_on_is_a_boundary() -> None:
    """A student that makes the sum: the norm of the teacher's is taken apart, and reads the student's."""
    net = Net(6)
    x = net.input("x", "N", 3, 8)
    for layer in range(3):
        y = net.op(
            "MatMul", net.relu(net.op("MatMul", x, net.weight(f"a{layer}", 8, 16))), net.weight(f"b{layer}", 16, 8)
        )
        sides = [net.weight(f"{side}{layer}", 8) for side in ("scale", "shift")]
        before = "sum" + str(layer - 1) if layer else "x"
        outs = [f"normed{layer}", "", "", f"sum{layer}"]
        x = net.op("SkipLayerNormalization", y, before, *sides, domain="com.microsoft", out=outs)
    types = {name: floats(name, "N", 3, 8) for name in ("normed2", "sum2")}
    proto = net.proto(*types, domains={"com.microsoft": 1}, types=types)
    teacher, parts = parted(proto)
    assert {"sum0", "sum1"} <= {name for n in parts.distillable for name in boundary(n)}
    student = splice(teacher, {n.name: parts.slice_of(n) for n in parts.distillable})
    assert len([node for node in student.graph if node.op_type == "Relu"]) == 3
    feed = {"x": np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)}
    for name, value in run(proto, feed).items():
        np.testing.assert_allclose(run(student, feed)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", sorted({name.strip() for name in FUSED}))
def test_a_fused_operator_without_its_inputs_stays(op: str) -> None:
    net = Net(7)
    net.input("x", 2, 3, 4)
    net.op(op, out="y", domain="com.microsoft", activation="Relu", transB=1)
    net.op(op, "x", "x", "", out="z", domain="com.microsoft", activation="Shrink", transA=1)
    proto = net.proto("y", domains={"com.microsoft": 1}, types={"y": floats("y", 2, 3, 4)})
    model = ir.from_proto(proto)
    take_apart(model)
    assert [node.op_type for node in model.graph if node.outputs[0].name == "y"] == [op]


@pytest.mark.parametrize(
    ("equation", "one", "other"),
    [
        ("b h i d, b h j d -> b h i j", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("bhij,bhjd->bhid", (2, 3, 4, 5), (2, 3, 5, 6)),
        ("bihd,bjhd->bhij", (2, 4, 3, 5), (2, 6, 3, 5)),
        ("bid,dk->bik", (2, 4, 5), (5, 6)),
        ("dib,kd->kib", (5, 4, 2), (6, 5)),
        ("ij,jk->ki", (4, 5), (5, 6)),
        ("ij,jk", (4, 5), (5, 6)),
        ("zi,ia", (4, 5), (5, 6)),
        ("...ij,...jk->...ik", (2, 3, 4, 5), (2, 3, 5, 6)),
        ("...d,dk->...k", (2, 4, 5), (5, 6)),
        ("b...d,dk->bk...", (2, 3, 4, 5), (5, 6)),
    ],
)
def test_an_einsum_that_is_a_matrix_product_is_written_as_one(
    equation: str, one: tuple[int, ...], other: tuple[int, ...]
) -> None:
    net = Net(17)
    net.input("x", *one)
    net.input("z", *other)
    net.op("Einsum", "x", "z", out="y", equation=equation)
    proto = net.proto("y")
    model = ir.from_proto(proto)
    assert take_apart(model) and not take_apart(model)
    assert "MatMul" in {node.op_type for node in model.graph} <= {"MatMul", "Transpose"}
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal(one, np.float32), "z": rng.standard_normal(other, np.float32)}
    expected = np.einsum(equation.replace(" ", ""), feeds["x"], feeds["z"])
    np.testing.assert_allclose(run(ir.to_proto(model), feeds)["y"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("equation", "one", "weight"),
    [
        ("bsd,dhe->bshe", (2, 4, 6), (6, 3, 5)),
        ("...d,dhe->...he", (2, 4, 6), (6, 3, 5)),
        ("bsd,dhe->bhse", (2, 4, 6), (6, 3, 5)),
        ("bshe,hed->bsd", (2, 4, 3, 5), (3, 5, 6)),
        ("bhse,hed->bsd", (2, 3, 4, 5), (3, 5, 6)),
        ("bshe,dhe->bsd", (2, 4, 3, 5), (6, 3, 5)),
        ("bsd,hed->bseh", (2, 4, 6), (3, 5, 6)),
        ("bsd,df", (2, 4, 6), (6, 5)),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_an_einsum_with_a_weight_of_several_axes_is_a_matrix_product(
    equation: str, one: tuple[int, ...], weight: tuple[int, ...], swapped: bool
) -> None:
    terms, arrow, out = equation.partition("->")
    if swapped:
        equation = ",".join(reversed(terms.split(","))) + arrow + out
    net = Net(17)
    x, w = net.input("x", *one), net.weight("w", *weight)
    net.op("Einsum", *((w, x) if swapped else (x, w)), out="y", equation=equation)
    proto = net.proto("y")
    model = loaded(proto)
    assert take_apart(model) and not take_apart(model)
    assert "MatMul" in {node.op_type for node in model.graph} <= {"MatMul", "Transpose", "Reshape"}
    feeds = {"x": np.random.default_rng(0).standard_normal(one, np.float32)}
    np.testing.assert_allclose(run(model, feeds)["y"], run(proto, feeds)["y"], rtol=1e-5, atol=1e-5)


def test_attention_in_einsums_shrinks_by_heads() -> None:
    net = Net(17)
    x = net.input("x", "N", 5, 12)
    q, k, v = (net.op("Einsum", x, net.weight(name, 12, 3, 4), equation="bsd,dhe->bshe") for name in "qkv")
    seen = net.op("Softmax", net.op("Einsum", q, k, equation="bqhe,bkhe->bhqk"), axis=-1)
    mixed = net.op("Einsum", seen, v, equation="bhqk,bkhe->bqhe")
    out = net.op("Einsum", mixed, net.weight("o", 3, 4, 12), equation="bqhe,hed->bqd")
    _, parts = parted(net.proto(net.op("Add", x, out, out="y")))
    (found,) = parts.distillable
    assert [group.width for group in found.groups.groups] == [3]


@pytest.mark.parametrize("equation", ["bij,bij->b", "bii,bij->bj", "bij,bjk", "bijk,bkjl->bil", "...ij,jkl->...kl"])
def test_another_einsum_stays(equation: str) -> None:
    net = Net(17)
    net.input("x", 2, 3, 3, 3) if equation[3] == "k" else net.input("x", 2, 3, 3)
    net.input("z", 2, 3, 3, 3) if equation[3] == "k" else net.input("z", 2, 3, 3)
    net.op("Einsum", "x", "z", out="y", equation=equation)
    assert not take_apart(ir.from_proto(net.proto("y")))


def test_no_neighbourhood_ends_inside_a_fused_operator(tmp_path: Path) -> None:
    teacher, parts = parted(families.fused(_mixer(), tmp_path))
    assert {"BiasGelu", "SkipLayerNormalization"} <= {node.op_type for node in teacher.graph}
    known = {value.name for node in teacher.graph for value in (*node.inputs, *node.outputs) if value is not None}
    assert parts.distillable
    for n in parts.distillable:
        assert set(boundary(n)) <= known
