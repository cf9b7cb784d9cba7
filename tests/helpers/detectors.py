"""Small models whose inputs are more than samples: scales, sizes, a sampling rate."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.helpers.models import Array, Net, floats


def _branch(net: Net, name: str, scale: float) -> onnx.GraphProto:
    """A linear layer of its own; both branches call their values the same."""
    weight = (scale * net.rng.standard_normal((24, 16)) / 5).astype(np.float32)
    nodes = [
        helper.make_node("Constant", [], ["weight"], value=onnx.numpy_helper.from_array(weight)),
        helper.make_node("MatMul", ["frames", "weight"], ["made"], name=f"{name}/made"),
    ]
    return helper.make_graph(nodes, name, [], [floats("made", "N", 16)])


def speech(samples: int = 40, frames: int = 24, rate: int = 16000) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    return {
        "frames": rng.standard_normal((samples, frames)).astype(np.float32),
        "state": rng.standard_normal((2, samples, 8)).astype(np.float32),
        "sr": np.array(rate),
    }


def detector(*, branches: bool = False, frames: int = 24) -> onnx.ModelProto:
    """A voice detector: frames, a state (2, N, 8) whose samples lie on axis 1, and a scalar sampling rate."""
    net = Net(2)
    x = net.input("frames", "N", frames)
    state = net.input("state", 2, "N", 8)
    rate = net.input("sr", dtype=TensorProto.INT64)
    if branches:
        slow = net.op("Equal", rate, net.constant("eight", np.array(8000)), out="slow")
        then, other = _branch(net, "a", 0.5), _branch(net, "b", 1.0)
        features = net.op("If", slow, out="features", then_branch=then, else_branch=other)
    else:
        features = net.gemm(x, frames, 16, out="features")
    up = net.relu(net.gemm(features, 16, 32, out="up"))
    steps = net.op("Unsqueeze", net.gemm(up, 32, 6, out="down"), net.ints(0), out="steps")
    hidden, cell = (
        net.op("Slice", state, net.ints(i), net.ints(i + 1), net.ints(0), out=f"state{i}") for i in range(2)
    )
    lstm = net.op(
        "LSTM",
        *(steps, net.weight("w", 1, 32, 6), net.weight("r", 1, 32, 8), net.weight("b", 1, 64), "", hidden, cell),
        out=["all", "h", "c"],
        hidden_size=8,
    )
    answer = net.op("Squeeze", net.op("Squeeze", lstm, net.ints(1)), net.ints(0), out="answer")
    scale = net.op("Cast", net.op("Equal", rate, net.constant("sixteen", np.array(16000))), to=TensorProto.FLOAT)
    score = net.op("Sigmoid", net.op("Mul", net.gemm(answer, 8, 1, out="score"), scale), out="speech")
    return net.proto(score, net.op("Concat", "h", "c", axis=0, out="next"))
