"""Small ONNX models for the tests of the graph, the partition and the splice."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from ndonnx.graph import fold_constants, load
from ndonnx.partition import Neighbourhood, Partition, partition

Array = npt.NDArray[Any]
Shape = Sequence[int | str]

CUSTOM = "my.domain"
"""Domain of an operator that nobody implements."""


class Net:
    """Builds a model node by node; each method returns the name of the value that it makes."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.weights: dict[str, Array] = {}
        self._count = 0

    def input(self, name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, name: str, *shape: int) -> str:
        """Random values, scaled so that activations keep their size."""
        fan_in = int(np.prod(shape[1:])) or 1
        return self.constant(name, (self.rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32))

    def constant(self, name: str, array: Array) -> str:
        self.weights[name] = array
        return name

    def ints(self, *numbers: int) -> str:
        """A constant of 64-bit integers, with a name of its own."""
        return self.constant(f"ints{len(self.weights)}", np.array(numbers, np.int64))

    def op(self, op: str, *inputs: str, out: str | Sequence[str] = "", domain: str = "", **attributes: Any) -> str:
        self._count += 1
        outputs = [out or f"{op.lower()}_{self._count}"] if isinstance(out, str) else list(out)
        name = f"{op}_{self._count}"
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain or None, **attributes))
        return outputs[0]

    def relu(self, x: str, out: str = "") -> str:
        return self.op("Relu", x, out=out)

    def conv(
        self,
        x: str,
        channels: int,
        to: int,
        kernel: int = 3,
        *,
        group: int = 1,
        stride: int = 1,
        bias: bool = True,
        out: str = "",
    ) -> str:
        self._count += 1
        name = out or f"conv_{self._count}"
        inputs = [x, self.weight(f"{name}.weight", to, channels // group, kernel, kernel)]
        if bias:
            inputs.append(self.weight(f"{name}.bias", to))
        return self.op("Conv", *inputs, out=name, group=group, strides=[stride] * 2, pads=[kernel // 2] * 4)

    def norm(self, x: str, channels: int, out: str = "") -> str:
        """A BatchNormalization with statistics that are not trivial."""
        self._count += 1
        name = out or f"bn_{self._count}"
        for part in ("scale", "bias", "mean", "var"):
            self.constant(f"{name}.{part}", self.rng.uniform(0.5, 1.5, channels).astype(np.float32))
        return self.op("BatchNormalization", x, *(f"{name}.{p}" for p in ("scale", "bias", "mean", "var")), out=name)

    def gemm(self, x: str, features: int, to: int, *, bias: bool = True, out: str = "") -> str:
        self._count += 1
        name = out or f"gemm_{self._count}"
        inputs = [x, self.weight(f"{name}.weight", to, features)]
        if bias:
            inputs.append(self.weight(f"{name}.bias", to))
        return self.op("Gemm", *inputs, out=name, transB=1)

    def matmul(self, x: str, features: int, to: int, out: str = "") -> str:
        self._count += 1
        name = out or f"matmul_{self._count}"
        return self.op("MatMul", x, self.weight(f"{name}.weight", features, to), out=name)

    def pooled_classifier(self, x: str, channels: int, classes: int = 5) -> str:
        flat = self.op("Flatten", self.op("GlobalAveragePool", x))
        return self.gemm(flat, channels, classes, out="logits")

    def proto(
        self,
        *outputs: str,
        opset: int = 18,
        ir_version: int = 9,
        domains: Mapping[str, int] | None = None,
        functions: Sequence[onnx.FunctionProto] = (),
        types: Mapping[str, onnx.ValueInfoProto] | None = None,
    ) -> onnx.ModelProto:
        """The model, with the types of its outputs inferred (or given, where nobody can infer them)."""
        graph = helper.make_graph(
            self.nodes,
            "net",
            self.inputs,
            [(types or {}).get(name, onnx.ValueInfoProto(name=name)) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        if ir_version < 4:  # where every initializer has to be an input too
            graph.input.extend(helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in graph.initializer)
        opsets = [helper.make_opsetid(domain, version) for domain, version in {"": opset, **(domains or {})}.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=functions)
        inferred = onnx.shape_inference.infer_shapes(model)
        del model.graph.output[:]
        model.graph.output.extend(inferred.graph.output)
        return model


def floats(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    """The type of a float32 value."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def residual_cnn(units: int = 3, channels: int = 8, *, norm: bool = False, **options: Any) -> onnx.ModelProto:
    """Stem, `units` post-activation residual units (values `unit1`, ...), pooled classifier."""
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, 8, 8), 3, channels, out="stem"), out="unit0")
    for i in range(1, units + 1):
        y = net.conv(x, channels, channels, bias=not norm, out=f"first{i}")
        y = net.relu(net.norm(y, channels) if norm else y)
        y = net.conv(y, channels, channels, bias=not norm, out=f"second{i}")
        y = net.norm(y, channels) if norm else y
        x = net.relu(net.op("Add", y, x, out=f"sum{i}"), out=f"unit{i}")
    return net.proto(net.pooled_classifier(x, channels), **options)


def inverted_bottleneck(units: int = 2, channels: int = 6, inner: int = 12, **options: Any) -> onnx.ModelProto:
    """Expansion, depthwise convolution, squeeze-and-excitation, projection, residual sum."""
    net = Net(1)
    x = net.conv(net.input("x", "N", 3, 8, 8), 3, channels, out="unit0")
    for i in range(1, units + 1):
        y = net.op("HardSwish", net.conv(x, channels, inner, 1, out=f"expand{i}"))
        y = net.op("HardSwish", net.conv(y, inner, inner, 3, group=inner, out=f"depthwise{i}"))
        gate = net.relu(net.conv(net.op("GlobalAveragePool", y), inner, 4, 1, out=f"squeeze{i}"))
        gate = net.op("HardSigmoid", net.conv(gate, 4, inner, 1, out=f"excite{i}"))
        y = net.conv(net.op("Mul", y, gate), inner, channels, 1, out=f"project{i}")
        x = net.op("Add", y, x, out=f"unit{i}")
    return net.proto(net.pooled_classifier(x, channels), **options)


def bottleneck(units: int = 2, channels: int = 16, inner: int = 6, **options: Any) -> onnx.ModelProto:
    """ResNet-50's unit: 1x1, 3x3, 1x1, sum, activation."""
    net = Net(2)
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, channels, out="stem"), out="unit0")
    for i in range(1, units + 1):
        y = net.relu(net.norm(net.conv(x, channels, inner, 1, bias=False), inner))
        y = net.relu(net.norm(net.conv(y, inner, inner, 3, bias=False), inner))
        y = net.norm(net.conv(y, inner, channels, 1, bias=False), channels)
        x = net.relu(net.op("Add", y, x), out=f"unit{i}")
    return net.proto(net.pooled_classifier(x, channels), **options)


def vgg(widths: Sequence[int] = (6, 8, 10, 12), **options: Any) -> onnx.ModelProto:
    """A plain chain of convolutions with a pooling in the middle and two dense layers."""
    net = Net(3)
    x, before = net.input("x", "N", 3, 8, 8), 3
    for i, width in enumerate(widths, 1):
        x = net.relu(net.conv(x, before, width, out=f"conv{i}"), out=f"relu{i}")
        before = width
        if i == len(widths) // 2:
            x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], out="pool")
    x = net.relu(net.gemm(net.op("Flatten", x, out="flat"), before * 16, 20, out="dense1"))
    return net.proto(net.gemm(x, 20, 5, out="logits"), **options)


def inception(blocks: int = 2, **options: Any) -> onnx.ModelProto:
    """Two branches of convolutions from one value, joined by a Concat."""
    net = Net(4)
    x, width = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8), out="block0"), 8
    for i in range(1, blocks + 1):
        left = net.relu(net.conv(net.relu(net.conv(x, width, 6, 1)), 6, 5))
        right = net.relu(net.conv(net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4), width, 7, 1))
        x, width = net.op("Concat", left, right, axis=1, out=f"block{i}"), 12
    return net.proto(net.pooled_classifier(x, width), **options)


def unet(**options: Any) -> onnx.ModelProto:
    """Two levels with long skips, upsampling by a fixed factor."""
    net = Net(5)

    def double(x: str, before: int, after: int, name: str) -> str:
        return net.relu(net.conv(net.relu(net.conv(x, before, after)), after, after), out=name)

    scales = net.constant("scales", np.array([1, 1, 2, 2], np.float32))
    pool: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [2, 2]}
    top = double(net.input("x", "N", 3, 8, 8), 3, 6, "down1")
    middle = double(net.op("MaxPool", top, **pool), 6, 8, "down2")
    deep = double(net.op("MaxPool", middle, **pool), 8, 12, "bottom")
    deep = net.op("Concat", middle, net.op("Resize", deep, "", scales), axis=1)
    deep = double(deep, 20, 8, "up2")
    deep = net.op("Concat", top, net.op("Resize", deep, "", scales), axis=1)
    return net.proto(net.conv(double(deep, 14, 6, "up1"), 6, 2, 1, out="mask"), **options)


def mlp(**options: Any) -> onnx.ModelProto:
    """Dense layers as Gemm with and without transposed weight, and as MatMul + Add."""
    net = Net(6)
    x = net.relu(net.gemm(net.input("x", "N", 10), 10, 16, out="h1"))
    x = net.op("Tanh", net.op("Add", net.matmul(x, 16, 12, out="h2"), net.weight("h2.bias", 12)))
    x = net.op("Gemm", x, net.weight("w3", 12, 9), net.weight("b3", 9), out="h3", alpha=0.5, beta=2.0)
    x = net.matmul(net.op("Sigmoid", x), 9, 7, out="h4")
    return net.proto(net.gemm(net.relu(x), 7, 4, out="y"), **options)


def transformer(layers: int = 2, width: int = 8, heads: int = 2, **options: Any) -> onnx.ModelProto:
    """Pre-norm encoder layers with shape arithmetic, an attention mask as second input, and an MLP."""
    net = Net(7)
    x = net.input("x", "N", "S", width)
    mask = net.op("Unsqueeze", net.input("mask", "N", "S"), net.ints(1, 2), out="mask4")
    for i in range(1, layers + 1):
        y = _layer_norm(net, x, width)
        lead = net.op("Slice", net.op("Shape", y), net.ints(0), net.ints(2))
        split = net.op("Concat", lead, net.ints(heads, width // heads), axis=0)
        q, k, v = (
            net.op("Transpose", net.op("Reshape", net.matmul(y, width, width, out=f"{n}{i}"), split), perm=[0, 2, 1, 3])
            for n in "qkv"
        )
        scores = net.op("Add", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), mask)
        z = net.op("MatMul", net.op("Softmax", scores), v)
        z = net.op(
            "Reshape", net.op("Transpose", z, perm=[0, 2, 1, 3]), net.op("Concat", lead, net.ints(width), axis=0)
        )
        x = net.op("Add", x, net.matmul(z, width, width, out=f"o{i}"), out=f"attended{i}")
        y = net.op("Erf", net.matmul(_layer_norm(net, x, width), width, 3 * width, out=f"up{i}"))
        x = net.op("Add", x, net.matmul(y, 3 * width, width, out=f"down{i}"), out=f"layer{i}")
    return net.proto(x, **options)


def _layer_norm(net: Net, x: str, width: int) -> str:
    name = f"ln{len(net.nodes)}"
    scale, bias = (net.constant(f"{name}.{p}", net.rng.uniform(0.5, 1.5, width).astype(np.float32)) for p in ("s", "b"))
    return net.op("LayerNormalization", x, scale, bias, out=name, axis=-1)


def old_style() -> onnx.ModelProto:
    """IR version 3: every initializer is among the inputs too."""
    return residual_cnn(2, opset=8, ir_version=3)


def constant_nodes() -> onnx.ModelProto:
    """Weights in `Constant` nodes, some behind Identity, Transpose or Reshape."""
    net = Net(8)
    x = net.relu(
        net.op("MatMul", net.input("x", "N", 6), net.op("Transpose", net.weight("w1", 10, 6), perm=[1, 0], out="w1t"))
    )
    net.op("Constant", value=numpy_helper.from_array(net.rng.standard_normal((4, 10)).astype(np.float32)), out="w2")
    x = net.op("Gemm", x, net.op("Identity", "w2", out="w2i"), transB=1)
    net.op("Constant", value_floats=[0.5, -1.0, 2.0, 1.0], out="b2")
    x = net.relu(net.op("Add", x, net.op("Reshape", "b2", net.ints(1, 4), out="b2r")))
    return net.proto(net.gemm(x, 4, 3, out="y"))


def tied(units: int = 2, channels: int = 8) -> onnx.ModelProto:
    """Residual units that all share their weights."""
    net = Net(9)
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, channels), out="unit0")
    net.weight("shared.first", channels, channels, 3, 3)
    net.weight("shared.second", channels, channels, 3, 3)
    for i in range(1, units + 1):
        y = net.relu(net.op("Conv", x, "shared.first", pads=[1] * 4))
        x = net.op("Add", net.op("Conv", y, "shared.second", pads=[1] * 4), x, out=f"unit{i}")
    return net.proto(net.pooled_classifier(x, channels))


def with_if() -> onnx.ModelProto:
    """A unit, an `If` on the sign of its mean whose branches read outer values, and another unit."""
    net = Net(10)
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8), out="before")
    x = _unit(net, x, 8, "unit1")
    half = net.op("Constant", value=numpy_helper.from_array(np.array(0.5, np.float32)), out="half")
    mean = net.op("ReduceMean", x, keepdims=0)
    then = helper.make_graph([helper.make_node("Mul", [x, half], ["then_out"])], "then", [], [floats("then_out")])
    inner = numpy_helper.from_array(net.rng.standard_normal((1, 8, 1, 1)).astype(np.float32), "branch_weight")
    other = helper.make_graph(
        [helper.make_node("Add", [x, "branch_weight"], ["else_out"])], "else", [], [floats("else_out")], [inner]
    )
    for graph in (then, other):
        graph.output[0].CopyFrom(floats(graph.output[0].name, "N", 8, 6, 6))
    condition = net.op("Greater", mean, half)
    net.op("If", condition, out="chosen", then_branch=then, else_branch=other)
    x = _unit(net, "chosen", 8, "unit2")
    return net.proto(net.pooled_classifier(x, 8))


def custom_op(*, op: str = "Magic", domain: str = CUSTOM) -> onnx.ModelProto:
    """Two units with an operator of a custom domain between them; onnxruntime cannot run it."""
    net = Net(11)
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8), out="before")
    x = _unit(net, x, 8, "unit1")
    net.op(op, x, out="magic", domain=domain)
    x = _unit(net, "magic", 8, "unit2")
    types = {"magic": floats("magic", "N", 8, 6, 6)}
    model = net.proto(net.pooled_classifier(x, 8), domains={domain: 1}, types={"logits": floats("logits", "N", 5)})
    model.graph.value_info.extend(types.values())
    return model


def retyped(model: onnx.ModelProto, kind: Any, *, ends: bool = True) -> onnx.ModelProto:
    """The model with weights of another float type; without `ends`, its inputs and outputs stay float32."""
    copy, wanted = onnx.ModelProto(), helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(kind), tensor.name))
    for value in (*copy.graph.input, *copy.graph.output):
        if ends and value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = wanted
    if not ends:
        _cast_ends(copy, wanted)
    return onnx.shape_inference.infer_shapes(copy)


def _cast_ends(model: onnx.ModelProto, wanted: int) -> None:
    inputs, outputs = ({value.name for value in values} for values in (model.graph.input, model.graph.output))
    for node in model.graph.node:
        for names, ends in ((node.input, inputs), (node.output, outputs)):
            for position, name in enumerate(names):
                if name in ends:
                    names[position] = f"{name}/cast"
    casts = [helper.make_node("Cast", [name], [f"{name}/cast"], to=wanted) for name in sorted(inputs)]
    nodes = [*casts, *model.graph.node]
    nodes += [helper.make_node("Cast", [f"{name}/cast"], [name], to=TensorProto.FLOAT) for name in sorted(outputs)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _unit(net: Net, x: str, channels: int, out: str) -> str:
    y = net.conv(net.relu(net.conv(x, channels, channels)), channels, channels)
    return net.op("Add", y, x, out=out)


def local_function() -> onnx.ModelProto:
    """A residual unit as a model-local function, called twice."""
    net = Net(12)
    body = [
        helper.make_node("Conv", ["x", "a"], ["h"], pads=[1] * 4),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "b"], ["z"], pads=[1] * 4),
        helper.make_node("Add", ["z", "x"], ["y"]),
    ]
    unit = helper.make_function(CUSTOM, "Unit", ["x", "a", "b"], ["y"], body, [helper.make_opsetid("", 18)])
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8), out="unit0")
    for i in (1, 2):
        first, second = net.weight(f"a{i}", 8, 8, 3, 3), net.weight(f"b{i}", 8, 8, 3, 3)
        x = net.op("Unit", x, first, second, out=f"unit{i}", domain=CUSTOM)
    return net.proto(net.pooled_classifier(x, 8), domains={CUSTOM: 1}, functions=[unit])


def several_heads() -> onnx.ModelProto:
    """A backbone whose last but one value is an output, and two heads behind it."""
    net = Net(13)
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8))
    x = _unit(net, x, 8, "feature1")
    x = _unit(net, x, 8, "feature2")
    boxes = net.conv(net.relu(net.conv(x, 8, 8)), 8, 4, 1, out="boxes")
    classes = net.conv(net.relu(net.conv(x, 8, 8)), 8, 3, 1, out="classes")
    return net.proto("feature1", boxes, classes)


def shape_from_before() -> onnx.ModelProto:
    """Units that read the shape of a value made long before them."""
    return stack(["plain", "early_shape", "residual", "early_shape"])


Block = Callable[[Net, str, int], tuple[str, int]]
"""Adds nodes behind a value of so many channels; returns the new value and its channels."""


def _plain(net: Net, x: str, c: int) -> tuple[str, int]:
    return net.relu(net.conv(x, c, c + 1)), c + 1


def _residual(net: Net, x: str, c: int) -> tuple[str, int]:
    return net.relu(net.op("Add", net.conv(net.relu(net.conv(x, c, 7)), 7, c), x)), c


def _pre_activation(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.conv(net.relu(net.norm(x, c)), c, 6, bias=False)
    return net.op("Add", x, net.conv(net.relu(net.norm(y, 6)), 6, c)), c


def _squeeze_excite(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.op("HardSwish", net.conv(net.relu(net.conv(x, c, 10, 1)), 10, 10, group=10))
    gate = net.conv(net.relu(net.conv(net.op("GlobalAveragePool", y), 10, 4, 1)), 4, 10, 1)
    return net.op("Add", net.conv(net.op("Mul", y, net.op("Sigmoid", gate)), 10, c, 1), x), c


def _grouped(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.relu(net.conv(net.relu(net.conv(x, c, 12, 1)), 12, 6, group=3))
    return net.op("Add", net.conv(y, 6, c, 1), x), c


def _depth_multiplier(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.conv(net.relu(net.conv(x, c, 5, 1)), 5, 10, group=5)
    return net.conv(net.relu(y), 10, c, 1), c


def _branches(net: Net, x: str, c: int) -> tuple[str, int]:
    left = net.relu(net.conv(net.relu(net.conv(x, c, 4, 1)), 4, 3))
    return net.op("Concat", left, net.conv(net.relu(net.conv(x, c, 5, 1)), 5, 6), axis=1), 9


def _dense(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.conv(net.relu(net.conv(x, c, 6)), 6, 3)
    return net.op("Concat", x, y, axis=1), c + 3


def _spatial_gate(net: Net, x: str, c: int) -> tuple[str, int]:
    gate = net.op("Sigmoid", net.conv(x, c, 1, 3))
    y = net.op("Concat", net.op("Mul", x, gate), net.relu(net.conv(x, c, 6)), axis=1)
    return net.conv(y, c + 6, c, 1), c


def _max_pool(net: Net, x: str, c: int) -> tuple[str, int]:
    return net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4), c


def _padded_channels(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.op("Pad", net.conv(x, c, 6), net.ints(0, 1, 0, 0, 0, 2, 0, 0))
    return net.conv(net.relu(y), 9, c), c


def _learned_slope(net: Net, x: str, c: int) -> tuple[str, int]:
    slope = net.weight(f"slope{len(net.nodes)}", 6, 1, 1)
    return net.conv(net.op("PRelu", net.conv(x, c, 6), slope), 6, c), c


def _scaled(net: Net, x: str, c: int) -> tuple[str, int]:
    factor = net.weight(f"factor{len(net.nodes)}", 1, 6, 1, 1)
    low, high = (net.constant(f"{n}{len(net.nodes)}", np.array(v, np.float32)) for n, v in (("low", -1), ("high", 2)))
    return net.conv(net.op("Clip", net.op("Mul", factor, net.conv(x, c, 6)), low, high), 6, c), c


def _softmax(net: Net, x: str, c: int) -> tuple[str, int]:
    return net.conv(net.op("Softmax", net.conv(x, c, 6), axis=1), 6, c), c


def _instance_norm(net: Net, x: str, c: int) -> tuple[str, int]:
    scale, bias = net.weight(f"in_s{len(net.nodes)}", 6), net.weight(f"in_b{len(net.nodes)}", 6)
    return net.conv(net.relu(net.op("InstanceNormalization", net.conv(x, c, 6), scale, bias)), 6, c), c


def _height(net: Net, x: str) -> str:
    return net.op("Cast", net.op("Slice", net.op("Shape", x), net.ints(2), net.ints(3)), to=TensorProto.FLOAT)


def _own_shape(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.conv(net.relu(net.conv(x, c, 6)), 6, c)
    return net.op("Add", net.op("Div", y, _height(net, y)), x), c


def _early_shape(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.conv(net.relu(net.conv(x, c, 6)), 6, c)
    return net.op("Add", net.op("Div", y, _height(net, "stem")), x), c


def _input_shape(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.conv(net.relu(net.conv(x, c, 6)), 6, c)
    return net.op("Add", net.op("Div", y, _height(net, "x")), x), c


def _channels_last(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.op("Tanh", net.matmul(net.op("Transpose", x, perm=[0, 2, 3, 1]), c, 7))
    return net.op("Transpose", net.matmul(y, 7, c), perm=[0, 3, 1, 2]), c


def _tied(net: Net, x: str, c: int) -> tuple[str, int]:
    name = f"tied{c}"
    if name not in net.weights:
        net.weight(name, c, c, 3, 3)
    y = net.relu(net.op("Conv", x, name, pads=[1] * 4))
    return net.op("Add", net.op("Conv", y, name, pads=[1] * 4), x), c


def _two_readers(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.relu(net.conv(x, c, 6))
    return net.op("Add", net.conv(y, 6, c), net.conv(net.relu(net.conv(y, 6, 5, 1)), 5, c)), c


def _gated_linear(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.conv(net.relu(net.conv(x, c, 5)), 5, 2 * c)
    a, b = f"a{len(net.nodes)}", f"b{len(net.nodes)}"
    net.op("Split", y, out=[a, b], axis=1, num_outputs=2)
    return net.op("Mul", a, net.op("Sigmoid", b)), c


def _computed_scale(net: Net, x: str, c: int) -> tuple[str, int]:
    """An InstanceNormalization whose scale is an activation (the mean over the batch)."""
    y = net.relu(net.conv(x, c, 6))
    style = net.op("ReduceMean", net.conv(x, c, 6), net.ints(0, 2, 3), keepdims=0)
    bias = net.weight(f"style_b{len(net.nodes)}", 6)
    return net.conv(net.relu(net.op("InstanceNormalization", y, style, bias)), 6, c), c


def _channel_shuffle(net: Net, x: str, c: int) -> tuple[str, int]:
    y = net.op("Reshape", net.relu(net.conv(x, c, 6)), net.ints(-1, 2, 3, 6, 6))
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3, 4]), net.ints(-1, 6, 6, 6))
    return net.op("Add", net.conv(y, 6, c), x), c


def _attention(net: Net, x: str, c: int) -> tuple[str, int]:
    """Two heads of three channels over the pixels, scaled by the root of a width read off a shape."""
    tokens = net.op("Transpose", net.op("Reshape", x, net.ints(0, c, 36)), perm=[0, 2, 1])
    q, k, v = (
        net.op("Transpose", net.op("Reshape", net.matmul(tokens, c, 6), net.ints(0, 36, 2, 3)), perm=[0, 2, 1, 3])
        for _ in "qkv"
    )
    width = net.op("Slice", net.op("Shape", q), net.ints(3), net.ints(4))
    q = net.op("Div", q, net.op("Sqrt", net.op("Cast", width, to=TensorProto.FLOAT)))
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    z = net.op("Reshape", net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3]), net.ints(0, 36, 6))
    z = net.op("Transpose", net.matmul(z, 6, c), perm=[0, 2, 1])
    return net.op("Add", net.op("Reshape", z, net.ints(0, c, 6, 6)), x), c


BLOCKS: dict[str, Block] = {
    "plain": _plain,
    "residual": _residual,
    "pre_activation": _pre_activation,
    "squeeze_excite": _squeeze_excite,
    "grouped": _grouped,
    "depth_multiplier": _depth_multiplier,
    "branches": _branches,
    "dense": _dense,
    "spatial_gate": _spatial_gate,
    "max_pool": _max_pool,
    "padded_channels": _padded_channels,
    "learned_slope": _learned_slope,
    "scaled": _scaled,
    "softmax": _softmax,
    "instance_norm": _instance_norm,
    "own_shape": _own_shape,
    "early_shape": _early_shape,
    "input_shape": _input_shape,
    "channels_last": _channels_last,
    "tied": _tied,
    "two_readers": _two_readers,
    "gated_linear": _gated_linear,
    "computed_scale": _computed_scale,
    "channel_shuffle": _channel_shuffle,
    "attention": _attention,
}


def stack(blocks: Sequence[str], known: Mapping[str, Block] = BLOCKS) -> onnx.ModelProto:
    """A network of these blocks between a stem and a classifier."""
    net = Net(len(blocks))
    x, channels = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 5), out="stem"), 5
    for block in blocks:
        x, channels = known[block](net, x, channels)
    # What lies behind some operators has no type by ONNX's inference.
    return net.proto(net.pooled_classifier(x, channels), types={"logits": floats("logits", "N", 5)})


BUILDERS: dict[str, Callable[[], onnx.ModelProto]] = {
    "residual_cnn": residual_cnn,
    "residual_norm": lambda: residual_cnn(norm=True),
    "inverted_bottleneck": inverted_bottleneck,
    "bottleneck": bottleneck,
    "vgg": vgg,
    "inception": inception,
    "unet": unet,
    "mlp": mlp,
    "transformer": transformer,
    "old_style": old_style,
    "constant_nodes": constant_nodes,
    "tied": tied,
    "with_if": with_if,
    "local_function": local_function,
    "several_heads": several_heads,
    "shape_from_before": shape_from_before,
}
"""Every model that onnxruntime can run."""


def inputs_of(model: onnx.ModelProto, batch: int = 3, seed: int = 0, size: int = 8) -> dict[str, Array]:
    """Random inputs; symbolic dimensions are `batch` first and `size` elsewhere."""
    rng = np.random.default_rng(seed)
    weights = {weight.name for weight in model.graph.initializer}
    shapes = {
        value.name: [d.dim_value or (batch if i == 0 else size) for i, d in enumerate(value.type.tensor_type.shape.dim)]
        for value in model.graph.input
        if value.name not in weights
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def run(
    model: onnx.ModelProto | ir.Model, feed: Mapping[str, Array], wanted: Sequence[str] | None = None
) -> dict[str, Array]:
    """What onnxruntime computes, without any optimisation of its own, for outputs or inner values."""
    proto = onnx.ModelProto()
    proto.CopyFrom(ir.to_proto(model) if isinstance(model, ir.Model) else model)
    if wanted is not None:
        known = {value.name for value in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(wanted) if name not in known)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = list(wanted) if wanted is not None else [value.name for value in session.get_outputs()]
    if not names:
        return {}
    fed = {value.name for value in session.get_inputs()}
    values = dict(
        zip(names, session.run(names, {name: array for name, array in feed.items() if name in fed}), strict=True)
    )
    return values


def loaded(model: onnx.ModelProto) -> ir.Model:
    """The model as `load` gives it, by way of a file that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        onnx.save(model, path)
        return load(path)


def parted(model: onnx.ModelProto, **options: Any) -> tuple[ir.Model, Partition]:
    """The model as loaded, and the partition of its working copy."""
    teacher = loaded(model)
    return teacher, partition(fold_constants(teacher.clone()), **options)


def boundary(part: Neighbourhood) -> list[str]:
    """Names of the entry, the context and the exit."""
    assert part.entry is not None and part.exit is not None
    return [str(value.name) for value in (part.entry, *part.context, part.exit)]
