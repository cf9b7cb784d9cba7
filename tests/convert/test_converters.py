"""Every converter against onnxruntime, over the opsets in which its operator changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, defs, helper, numpy_helper

from ndonnx.convert import TorchSlice, relative_error, to_torch
from ndonnx.convert.registry import _CONVERTER_REGISTRY, has_converter
from ndonnx.convert.tables import Numbers
from ndonnx.errors import ConversionError
from tests.helpers.converter_cases import (
    CASES,
    IMAGE,
    ROWS,
    Array,
    Case,
    Data,
    N,
    case,
    data,
    floats,
    ints,
    scalar,
    weight,
)

RECURRENT = (data(5, N, 4), weight(1, 12, 4) - 1, weight(1, 12, 3) - 1)
"""Data and weights of an LSTM of three units."""

FLAT = {"EyeLike", "Hardmax", "Range"}
"""Operators whose output hangs on the shape or the order of their input alone."""

NEWEST = 24
"""The newest opset that converts as a whole."""

UNTESTED = {
    "Constant": "folded before conversion",
    "NonMaxSuppression": "needs torchvision, whose wheels may not fit the torch at hand",
    "RoiAlign": "needs torchvision, whose wheels may not fit the torch at hand",
}

UNSUPPORTED = {
    op: reason
    for ops, reason in {
        "If Loop Scan SequenceMap": "control flow is opaque to the partition",
        "ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert": "no tensors",
        "SequenceLength SplitToSequence Optional OptionalGetElement OptionalHasElement": "no tensors",
        "ImageDecoder RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer": "strings or bytes",
        "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike": "no parity with chance",
        "ConvInteger MatMulInteger QLinearConv QLinearMatMul": "integers have no gradient",
        "DequantizeLinear DynamicQuantizeLinear QuantizeLinear": "quantised parts are kept as they are",
        "BlackmanWindow HammingWindow HannWindow MelWeightMatrix": "folded before conversion",
        "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss": "a loss, not inference",
        "BitCast CausalConvWithState CumProd LinearAttention SwiGLU": "newer than opset 24",
        "Col2Im DeformConv MaxRoiPool MaxUnpool TensorScatter Unique": "rare: not written yet",
    }.items()
    for op in ops.split()
}


def model_of(each: Case, opset: int) -> onnx.ModelProto:
    names = ["" if entry is None else f"in{index}" for index, entry in enumerate(each.inputs)]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(entry.draw(2).dtype), entry.shape)
        for name, entry in zip(names, each.inputs, strict=True)
        if isinstance(entry, Data)
    ]
    constants = [
        numpy_helper.from_array(entry, name)
        for name, entry in zip(names, each.inputs, strict=True)
        if isinstance(entry, np.ndarray)
    ]
    outputs = [f"out{index}" for index in range(each.outputs)]
    node = helper.make_node(each.op, names, outputs, **each.attributes)
    infos = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph([node], "one", inputs, infos, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def session_of(proto: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def drawn(each: Case, batch: int) -> dict[str, Array]:
    return {f"in{i}": entry.draw(batch) for i, entry in enumerate(each.inputs) if isinstance(entry, Data)}


def slice_of(proto: onnx.ModelProto, output: int) -> TorchSlice:
    """The node as a slice with one output."""
    model = ir.from_proto(proto)
    model.graph.outputs[:] = [model.graph.outputs[output]]
    return to_torch(model)


@pytest.mark.parametrize(("each", "opset"), CASES, ids=[f"{each.name}@{opset}" for each, opset in CASES])
def test_converter_answers_like_onnxruntime(each: Case, opset: int) -> None:
    proto = model_of(each, opset)
    session = session_of(proto)
    for output in range(each.outputs):
        module = slice_of(proto, output)
        for batch in (2, 3):
            inputs = drawn(each, batch)
            expected = session.run([f"out{output}"], inputs)[0]
            tensors = [torch.from_numpy(array).requires_grad_(array.dtype == np.float32) for array in inputs.values()]
            answer = module(*tensors)
            check_answer(answer, expected, each.tolerance)
            check_gradients(each, answer, [*tensors, *module.weights])


def check_answer(answer: torch.Tensor, expected: Array, tolerance: float) -> None:
    found = answer.detach().numpy()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if expected.dtype.kind == "f":
        assert relative_error(found, expected) <= tolerance
    else:
        np.testing.assert_array_equal(found, expected)


def check_gradients(each: Case, answer: torch.Tensor, leaves: Sequence[torch.Tensor]) -> None:
    """Finite everywhere, and there at all for the first input where the operator hands its values on."""
    assert answer.requires_grad or not answer.is_floating_point() or not leaves[0].requires_grad or each.op in FLAT
    if answer.requires_grad:
        answer.sum().backward()
        for leaf in leaves:
            assert leaf.grad is None or torch.isfinite(leaf.grad).all()


def chain(
    opset: int, inputs: dict[str, Sequence[int | str]], constants: dict[str, Array], *nodes: onnx.NodeProto
) -> onnx.ModelProto:
    """Several nodes; the last one's first output is the chain's."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    out = helper.make_empty_tensor_value_info(nodes[-1].output[0])
    graph = helper.make_graph(nodes, "chain", infos, [out], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def check_chain(proto: onnx.ModelProto, *shape: int) -> None:
    """A chain of one input answers alike for batches of 2, 1 and 5."""
    session, module = session_of(proto), slice_of(proto, 0)
    for batch in (2, 1, 5):
        array = data(N, *shape).draw(batch)
        check_answer(module(torch.from_numpy(array)), session.run(None, {"x": array})[0], 1e-5)


def test_shapes_computed_on_the_way_follow_the_batch() -> None:
    node = helper.make_node
    proto = chain(
        13,
        {"x": [N, 3, 4]},
        {"zero": scalar(0, np.int64), "front": ints(0), "rest": ints(2, -1), "one": scalar(1, np.int64)},
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "zero"], ["count"], axis=0),
        node("Unsqueeze", ["count", "front"], ["counts"]),
        node("Concat", ["counts", "rest"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["halves"]),
        node("Range", ["zero", "count", "one"], ["numbers"]),
        node("Cast", ["numbers"], ["places"], to=1),
        node("ReduceSum", ["places"], ["total"], keepdims=0),
        node("Add", ["halves", "total"], ["y"]),
    )
    check_chain(proto, 3, 4)


@pytest.mark.parametrize(
    "extra",
    [
        helper.make_node("Dropout", ["x"], ["y", "mask"]),
        helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2]),
    ],
)
def test_outputs_that_nothing_reads_do_no_harm(extra: onnx.NodeProto) -> None:
    check_chain(chain(11, {"x": [N, 3, 4]}, {}, extra, helper.make_node("Relu", ["y"], ["z"])), 3, 4)


@pytest.mark.parametrize(
    ("each", "opset", "told"),
    [
        (case("MaxPool", ROWS, opsets=(), outputs=2, kernel_shape=[2]), 12, "MaxPool with output"),
        (case("Cast", ROWS, opsets=(), to=TensorProto.FLOAT8E4M3FN), 19, "Cast to the type FLOAT8E4M3FN"),
        (case("Attention", *[data(N, 2, 3, 4)] * 3, None, *[data(N, 2, 3, 4)] * 2, opsets=()), 23, "cache"),
        (case("LSTM", *RECURRENT, opsets=(), clip=1.0, hidden_size=3), 14, "LSTM with clip"),
        (case("LSTM", *RECURRENT, opsets=(), input_forget=1, hidden_size=3), 14, "input_forget"),
        (case("LSTM", *RECURRENT, opsets=(), activations=["Affine"] * 3, hidden_size=3), 14, "Affine"),
        (case("LSTM", *RECURRENT, opsets=(), activation_alpha=[0.1], hidden_size=3), 14, "activation_alpha"),
        (
            case(
                "Resize",
                IMAGE,
                floats(*[0, 1] * 4),
                floats(1, 1, 2, 2),
                opsets=(),
                coordinate_transformation_mode="tf_crop_and_resize",
            ),
            11,
            "tf_crop_and_resize",
        ),
    ],
)
def test_what_torch_cannot_do_is_refused_by_name(each: Case, opset: int, told: str) -> None:
    with pytest.raises(ConversionError, match=told):
        slice_of(model_of(each, opset), each.outputs - 1)


@pytest.mark.parametrize(
    ("op", "opset"), [("OneHot", 11), ("Resize", 13), ("RotaryEmbedding", 23), ("Range", 11), ("Clip", 13)]
)
def test_settings_given_as_constants_are_not_trained(op: str, opset: int) -> None:
    settings = [each for each, known in CASES if each.op == op and known == opset]
    assert settings
    for each in settings:
        assert slice_of(model_of(each, opset), 0).weight_names == ()


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_layer_with_the_samples_first_is_the_other_one_turned(op: str) -> None:
    """onnxruntime itself runs only the layout with the steps first."""
    each = next(e for e, opset in CASES if e.op == op and opset == 22 and e.attributes["direction"] == "bidirectional")
    turned = replace(each, attributes=each.attributes | {"layout": 1})
    inputs = [torch.from_numpy(array) for array in drawn(each, 3).values()]
    back = ((2, 0, 1, 3), (1, 0, 2), (1, 0, 2))
    for output in range(each.outputs):
        expected = slice_of(model_of(each, 22), output)(*inputs)
        found = slice_of(model_of(turned, 22), output)(*(tensor.transpose(0, 1) for tensor in inputs))
        torch.testing.assert_close(found, expected.permute(*back[output]))


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_learn_in_bfloat16(op: str) -> None:
    for each in (e for e, opset in CASES if e.op == op and opset == 14):
        module = slice_of(model_of(each, 14), 0).train()
        tensors = [torch.from_numpy(array) for array in drawn(each, 2).values()]
        with torch.autocast("cpu", torch.bfloat16):
            answer = module(*(t.bfloat16() if t.is_floating_point() else t for t in tensors))
        answer.float().sum().backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in module.weights)
        torch.testing.assert_close(answer, module(*tensors), rtol=0.05, atol=0.02)


def test_a_constant_shape_is_read_from_its_device_only_once() -> None:
    numbers, shape = Numbers(), torch.tensor([2, 3])
    assert numbers(shape) is numbers(shape)
    assert numbers(torch.tensor([4])) == [4]
    assert numbers(shape) == [2, 3]


def test_a_window_of_zeros_has_a_gradient() -> None:
    """A norm's slope at 0 is no number unless somebody sees to it; after a Relu zeros are the rule."""
    for op, opset in (("LpPool", 11), ("GlobalLpPool", 9), ("ReduceL2", 13), ("LpNormalization", 9)):
        attributes: dict[str, Any] = {"kernel_shape": [2, 2]} if op == "LpPool" else {}
        zeros = torch.zeros(2, 4, 6, 5, requires_grad=True)
        slice_of(model_of(case(op, IMAGE, opsets=(), **attributes), opset), 0)(zeros).sum().backward()
        assert zeros.grad is not None and torch.isfinite(zeros.grad).all()


def converts_at(op: str, opset: int) -> bool:
    """Whether one of our converters, or one of onnx2torch's, takes this operator."""
    if not defs.has(op, opset, ""):
        return False
    return has_converter(op) or ("", op, defs.get_schema(op, opset, "").since_version) in _CONVERTER_REGISTRY


def test_every_operator_of_onnx_is_converted_and_tested_or_knowingly_not() -> None:
    """A new release of onnx that brings an operator fails here: convert it, or say why not."""
    newest = {schema.name: schema for schema in defs.get_all_schemas() if schema.domain == "" and not schema.deprecated}
    tested = {each.op for each, _ in CASES}
    undecided = newest.keys() - tested - UNTESTED.keys() - UNSUPPORTED.keys()
    assert not undecided
    assert not tested & (UNTESTED.keys() | UNSUPPORTED.keys())
    for op in newest:
        assert converts_at(op, min(NEWEST, defs.onnx_opset_version())) == (op not in UNSUPPORTED), op
