"""Tiny models that are no chain of convolutions: recurrent nets, control flow, several scales, quantised parts."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tests.helpers.models import Array, Net, floats

STEPS = 6
"""Length of the sequences."""


class Tagger(nn.Module):
    """Bytes in, a score for each of five tags at every byte out."""

    def __init__(self, kind: str = "LSTM", layers: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 8)
        self.body = getattr(nn, kind)(8, 12, num_layers=layers, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(24, 5)

    def forward(self, bytes_: Tensor) -> Tensor:
        scores: Tensor = self.tags(self.body(self.table(bytes_))[0])
        return scores


class Enhancer(nn.Module):
    """A waveform through a learned filter bank, masked by a GRU, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.analysis = nn.Conv1d(1, 16, 8, stride=4, bias=False)
        self.body = nn.GRU(16, 20, num_layers=2, batch_first=True)
        self.mask = nn.Linear(20, 16)
        self.synthesis = nn.ConvTranspose1d(16, 1, 8, stride=4, bias=False)

    def forward(self, sweep: Tensor) -> Tensor:
        bands = self.analysis(sweep)
        mask = torch.sigmoid(self.mask(self.body(torch.relu(bands).transpose(1, 2))[0])).transpose(1, 2)
        out: Tensor = self.synthesis(bands * mask)
        return out


class Mixer(nn.Module):
    """Residual layers as in a transformer, without its attention: norms, GELU, sums."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.ModuleList(nn.Linear(*sizes) for _ in range(3)) for sizes in ((8, 16), (16, 8)))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))

    def forward(self, rows: Tensor) -> Tensor:
        for up, down, norm in zip(self.up, self.down, self.norms, strict=True):
            rows = norm(rows + down(F.gelu(up(rows))))
        return rows


class Pyramid(nn.Module):
    """Three scales down, and up again, with a head at each."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.SiLU(), nn.Conv2d(o, o, 3, 1, 1), nn.SiLU())
            for i, o in ((3, 8), (8, 12), (12, 16))
        )
        self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (8, 12, 16))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 10, 3, 1, 1), nn.ReLU(), nn.Conv2d(10, 4, 1)) for _ in range(3)
        )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        scales = []
        for stage in self.down:
            image = stage(image)
            scales.append(image)
        top = None
        out = []
        for lateral, head, scale in zip(reversed(self.lateral), reversed(self.heads), reversed(scales), strict=True):
            side = lateral(scale)
            top = side if top is None else side + F.interpolate(top, size=side.shape[-2:], mode="nearest")
            out.append(head(top))
        return tuple(out)


def exported(module: nn.Module, example: Tensor, *, dynamo: bool = False, outputs: int = 1) -> onnx.ModelProto:
    """The module with a free batch, by torch's old exporter or its new one."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"input_names": ["x"], "output_names": [f"y{i}" for i in range(outputs)]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            free = ({0: torch.export.Dim("N")},)
            program = torch.onnx.export(
                module.eval(), (example,), dynamo=True, dynamic_shapes=free, verbose=False, **names
            )
            assert program is not None
            return program.model_proto
        file = io.BytesIO()
        axes = {name: {0: "N"} for name in ("x", *names["output_names"])}
        torch.onnx.export(module.eval(), (example,), file, dynamo=False, dynamic_axes=axes, opset_version=17, **names)
    return onnx.load_from_string(file.getvalue())


def bytes_example() -> Tensor:
    return torch.randint(0, 256, (2, STEPS))


def _unit(net: Net, x: str, channels: int) -> str:
    y = net.conv(net.relu(net.conv(x, channels, channels)), channels, channels)
    return net.relu(net.op("Add", x, y))


def _branch(name: str, x: str, scale: float, channels: int) -> onnx.GraphProto:
    """A convolution of an outer value, with a weight of the branch's own."""
    weight = np.full((channels, channels, 1, 1), scale, np.float32)
    node = helper.make_node("Conv", [x, f"{name}.weight"], [f"{name}.out"])
    out = floats(f"{name}.out", "N", channels, 6, 6)
    return helper.make_graph([node], name, [], [out], [numpy_helper.from_array(weight, f"{name}.weight")])


def _loud(net: Net, x: str) -> str:
    """Whether the mean of a value is above 0."""
    return net.op("Greater", net.op("ReduceMean", x, keepdims=0), net.constant("nothing", np.array(0, np.float32)))


def _loop(net: Net, x: str, out: str, channels: int) -> str:
    """Twice the same convolution, in a `Loop` that carries its answer."""
    weight = net.weight("loop.weight", channels, channels, 1, 1)
    body = helper.make_graph(
        [
            helper.make_node("Conv", ["state", weight], ["turned"]),
            helper.make_node("Relu", ["turned"], ["after"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            floats("state", "N", channels, 6, 6),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), floats("after", "N", channels, 6, 6)],
    )
    count = net.constant("twice", np.array(2, np.int64))
    return net.op("Loop", count, net.constant("always", np.array(True)), x, out=out, body=body)


def detector() -> onnx.ModelProto:
    """Convolutions before, inside and behind an `If` and a `Loop`, as in a voice detector."""
    net = Net(1)
    x = _unit(net, net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8)), 8)
    branches = {"then_branch": _branch("loud", x, 0.2, 8), "else_branch": _branch("quiet", x, -0.1, 8)}
    x = net.op("If", _loud(net, x), out="chosen", **branches)
    x = _unit(net, _loop(net, x, "looped", 8), 8)
    types = {"chosen": floats("chosen", "N", 8, 6, 6), "looped": floats("looped", "N", 8, 6, 6)}
    return net.proto(net.pooled_classifier(x, 8), types=types)


def all_control() -> onnx.ModelProto:
    """Nothing but control flow."""
    net = Net(2)
    x = net.input("x", "N", 4, 6, 6)
    condition = _loud(net, x)
    net.op("If", condition, out="y", then_branch=_branch("a", x, 0.5, 4), else_branch=_branch("b", x, 0.1, 4))
    return net.proto("y", types={"y": floats("y", "N", 4, 6, 6)})


def scanned() -> onnx.ModelProto:
    """A recurrence written as a `Scan` over the frames, between matrix products."""
    net = Net(3)
    x = net.input("x", "N", STEPS, 6)
    x = net.relu(net.op("MatMul", x, net.weight("in.weight", 6, 16)))
    x = net.op("MatMul", x, net.weight("mid.weight", 16, 8))
    body = helper.make_graph(
        [helper.make_node("Add", ["sum", "frame"], ["next"]), helper.make_node("Tanh", ["next"], ["answer"])],
        "step",
        [floats("sum", "N", 8), floats("frame", "N", 8)],
        [floats("next", "N", 8), floats("answer", "N", 8)],
    )
    nothing = net.op("Mul", x, net.constant("zero", np.zeros(1, np.float32)))
    start = net.op("ReduceSum", nothing, net.ints(1), keepdims=0)
    outs = ["last", "scanned"]
    net.op("Scan", start, x, out=outs, body=body, num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1])
    y = net.relu(net.op("MatMul", "scanned", net.weight("up.weight", 8, 16)))
    y = net.op("MatMul", y, net.weight("out.weight", 16, 3))
    return net.proto(y, types={"scanned": floats("scanned", "N", STEPS, 8)})


def spectral() -> onnx.ModelProto:
    """A waveform through `STFT`, whose power goes through convolutions."""
    net = Net(4)
    x = net.input("x", "N", 64, 1)
    window = net.constant("window", np.hanning(16).astype(np.float32))
    hop, size = (net.constant(name, np.array(number, np.int64)) for name, number in (("hop", 8), ("size", 16)))
    # Said, not left out: there onnx infers the shape of the other form.
    x = net.op("STFT", x, hop, window, size, onesided=1)
    power = net.op("ReduceSum", net.op("Mul", x, x), net.ints(-1), keepdims=0)
    loudness = net.op("Log", net.op("Add", power, net.constant("floor", np.array(1e-3, np.float32))))
    x = net.op("Unsqueeze", loudness, net.ints(1))
    x = _unit(net, net.relu(net.conv(x, 1, 8)), 8)
    return net.proto(net.pooled_classifier(x, 8))


def unsupported() -> onnx.ModelProto:
    """Two units, and between them one that adds noise: what answers differently each time is not trained."""
    net = Net(5)
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8))
    x = _unit(net, x, 8)
    y = net.relu(net.conv(x, 8, 8))
    noise = net.op("Mul", net.op("RandomNormalLike", y), net.constant("little", np.array(1e-4, np.float32)))
    x = net.op("Add", x, net.conv(net.op("Add", y, noise), 8, 8))
    return net.proto(net.pooled_classifier(_unit(net, x, 8), 8))


def _quantised(net: Net, x: str, name: str) -> str:
    scale = net.constant(f"{name}.scale", np.array(0.05, np.float32))
    zero = net.constant(f"{name}.zero", np.array(128, np.uint8))
    return net.op("QuantizeLinear", x, scale, zero, out=f"{name}.quantised")


def half_quantised() -> onnx.ModelProto:
    """A unit in floats, then convolutions in integers (`QLinearConv`) and in quantise-dequantise pairs, then floats."""
    net = Net(6)
    x = _unit(net, net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8)), 8)
    weight = net.constant("q.weight", net.rng.integers(-40, 40, (8, 8, 3, 3)).astype(np.int8))
    small, none = net.constant("q.step", np.array(0.01, np.float32)), net.constant("q.none", np.array(0, np.int8))
    given = _quantised(net, x, "a")
    y = net.op("QLinearConv", given, "a.scale", "a.zero", weight, small, none, "a.scale", "a.zero", pads=[1] * 4)
    y = net.op("DequantizeLinear", y, "a.scale", "a.zero")
    z = net.op("DequantizeLinear", _quantised(net, y, "b"), "b.scale", "b.zero")
    z = net.relu(net.op("Conv", z, net.op("DequantizeLinear", weight, small, none), pads=[1] * 4))
    return net.proto(net.pooled_classifier(_unit(net, z, 8), 8))


def fused(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model as onnxruntime writes it after its own optimisation."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "fused.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "fused.onnx")


def drawn(model: onnx.ModelProto, samples: int, seed: int = 0) -> dict[str, Array]:
    """Inputs of the model: normal floats, whole numbers below 256."""
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for value in model.graph.input:
        shape = [samples, *(dim.dim_value or STEPS for dim in value.type.tensor_type.shape.dim[1:])]
        whole = value.type.tensor_type.elem_type == TensorProto.INT64
        found[value.name] = rng.integers(0, 256, shape) if whole else rng.standard_normal(shape).astype(np.float32)
    return found


def interface(model: onnx.ModelProto) -> list[tuple[str, int, list[str | int]]]:
    """Names, types and shapes of the inputs and outputs."""
    found = []
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        found.append((value.name, tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]))
    return found


def encoder(*, opset: int = 14, layers: int = 2, width: int = 16, heads: int = 2) -> onnx.ModelProto:
    """A BERT in small, in operators that every exporter knows: what onnxruntime's optimiser finds to fuse."""
    net = Net(21)
    ids, mask = (net.input(name, "N", "S", dtype=TensorProto.INT64) for name in ("ids", "mask"))
    one = net.constant("one", np.array(1, np.float32))
    hidden = net.op("Sub", one, net.op("Cast", net.op("Unsqueeze", mask, net.ints(1, 2)), to=TensorProto.FLOAT))
    hidden = net.op("Mul", hidden, net.constant("low", np.array(-1e4, np.float32)), out="hidden")
    x = _norm(net, net.op("Gather", net.weight("table", 256, width), ids), width)
    for _ in range(layers):
        q, k, v = (_heads(net, _dense(net, x, width, width), width, heads, turn) for turn in ("q", "k", "v"))
        scores = net.op("Div", net.op("MatMul", q, k), net.constant("root", np.sqrt(np.float32(width / heads))))
        z = net.op("MatMul", net.op("Softmax", net.op("Add", scores, hidden), axis=-1), v)
        z = net.op("Reshape", net.op("Transpose", z, perm=[0, 2, 1, 3]), net.ints(0, 0, width))
        x = _norm(net, net.op("Add", _dense(net, z, width, width), x), width)
        x = _norm(net, net.op("Add", _dense(net, _gelu(net, _dense(net, x, width, 40)), 40, width), x), width)
    first = net.op("Gather", x, net.constant("first", np.array(0)), axis=1)
    return net.proto(net.gemm(first, width, 3, out="logits"), opset=opset)


def _dense(net: Net, x: str, before: int, after: int) -> str:
    y = net.matmul(x, before, after)
    return net.op("Add", y, net.weight(f"{y}.bias", after))


def _heads(net: Net, x: str, width: int, heads: int, turn: str) -> str:
    parts = net.op("Reshape", x, net.ints(0, 0, heads, width // heads))
    return net.op("Transpose", parts, perm=[0, 2, 3, 1] if turn == "k" else [0, 2, 1, 3])


def _norm(net: Net, x: str, width: int) -> str:
    """A layer normalisation as exporters wrote it before there was one."""
    two, small = net.constant("two", np.array(2, np.float32)), net.constant("small", np.array(1e-5, np.float32))
    centred = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1]))
    root = net.op("Sqrt", net.op("Add", net.op("ReduceMean", net.op("Pow", centred, two), axes=[-1]), small))
    y = net.op("Mul", net.op("Div", centred, root), net.weight(f"scale{len(net.nodes)}", width))
    return net.op("Add", y, net.weight(f"shift{len(net.nodes)}", width))


def _gelu(net: Net, x: str) -> str:
    root, one = net.constant("sqrt2", np.sqrt(np.float32(2))), net.constant("one", np.array(1, np.float32))
    y = net.op("Mul", x, net.op("Add", net.op("Erf", net.op("Div", x, root)), one))
    return net.op("Mul", y, net.constant("half", np.array(0.5, np.float32)))
