"""A net in onnxruntime, in torch, and back in ONNX with other weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from ndonnx.convert import TorchSlice, check_parity, to_torch, write_back
from tests.helpers.models import Array, Net, inputs_of, run

OPSETS = [9, 13, 17, 18, 21]
TOLERANCE = 1e-5


def disturb(module: TorchSlice) -> None:
    """Move every trained weight by about a tenth."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def three_ways(net: Net, output: str, opset: int = 18, feed: Mapping[str, Array] | None = None) -> TorchSlice:
    """onnxruntime, torch, and back in ONNX with other weights; returns the torch slice with these."""
    proto = net.proto(output, opset=opset, ir_version=10)
    feed = feed or inputs_of(proto)
    model = ir.from_proto(proto)
    expected = run(proto, feed)[output]
    module = to_torch(model)
    inputs = [feed[name] for name in module.input_names]
    check_parity(module, inputs, expected, TOLERANCE)

    disturb(module)
    trained = write_back(model, module.trained_weights())
    answer = run(trained, feed)[output]
    check_parity(module, inputs, answer, TOLERANCE)
    if answer.size:
        assert not np.array_equal(answer, expected), "the trained weights are not those that the slice computes with"
    assert run(model, feed)[output].tobytes() == expected.tobytes(), "the teacher's slice was changed"
    return module


def image(*shape: int) -> tuple[Net, str]:
    """A net with one input of this shape, and a trained scale per channel behind it."""
    net = Net()
    x = net.input("x", "N", *shape)
    scale = net.constant("scale", net.rng.uniform(0.5, 1.5, (shape[0], *(1 for _ in shape[1:]))).astype(np.float32))
    return net, net.op("Mul", x, scale)
