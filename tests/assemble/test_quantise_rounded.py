"""Models that round as they would in 8 bits, with floats that can be trained: the same answers, and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ndonnx.assemble.quantise import Scheme, prepared, quantised, rounded
from ndonnx.assemble.quantise_numbers import LARGEST, weight_scales
from ndonnx.assemble.quantise_ranges import measure_ranges
from ndonnx.convert import Grid, to_torch, write_back
from ndonnx.graph import load
from ndonnx.graph.save import serialise
from tests.helpers.models import Net, inputs_of, residual_cnn, run


def opened(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    onnx.save(proto, folder / "model.onnx")
    return load(folder / "model.onnx")


def chain() -> onnx.ModelProto:
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 4, 8, 8), 4, 16))
    x = net.op("GlobalAveragePool", net.op("HardSwish", net.conv(x, 16, 16)))
    net.gemm(net.op("Flatten", x), 16, 5, out="y")
    return net.proto("y", opset=17)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("make", [chain, residual_cnn])
def test_torch_rounds_as_onnxruntime_does(make: object, narrow: bool, tmp_path: Path) -> None:
    proto = make()  # type: ignore[operator]
    scheme, feeds = Scheme("static", "all", narrow=narrow), inputs_of(proto, 64)
    base = prepared(opened(proto, tmp_path), "static")
    ranges = measure_ranges(base, [feeds], threads=1)
    model, axes = rounded(base, scheme, ranges)
    assert set(axes) <= set(base.graph.initializers) and len(axes) >= 3
    module = to_torch(model)
    module.grid = Grid(axes, LARGEST[narrow])
    with torch.no_grad():
        found = module(*(torch.from_numpy(feeds[name]) for name in module.input_names)).numpy()
    in_bits, in_float = (
        next(iter(run(onnx.load_from_string(serialise(each)), feeds).values()))
        for each in (quantised(base, scheme, ranges), base)
    )
    apart, lost = (float(np.mean((each - in_bits) ** 2)) for each in (found, in_float))
    # What is left are numbers that lie between two integers and go the other way.
    assert lost > 0 and apart < 0.1 * lost


def test_weights_go_back_under_their_names_and_are_quantised_anew(tmp_path: Path) -> None:
    proto = residual_cnn()
    scheme, base = Scheme("static", "all"), prepared(opened(proto, tmp_path), "static")
    ranges = measure_ranges(base, [inputs_of(proto, 16)], threads=1)
    model, axes = rounded(base, scheme, ranges)
    module = to_torch(model)
    assert set(axes) <= set(module.weight_names)
    trained = write_back(base, {name: 2 * module.trained_weights()[name] for name in axes})
    before, after = (quantised(each, scheme, ranges) for each in (base, trained))
    integers = [
        {name: v.const_value.numpy() for name, v in each.graph.initializers.items() if v.const_value is not None}
        for each in (before, after)
    ]
    assert integers[0].keys() == integers[1].keys()
    doubled = [name for name in integers[0] if not np.array_equal(integers[0][name], integers[1][name])]
    scales = [n for n in doubled if integers[0][n].dtype == np.float32]
    assert scales and all(np.allclose(2 * integers[0][n], integers[1][n]) for n in scales), "twice the scale, all else"


def test_the_same_model_is_the_same_bytes(tmp_path: Path) -> None:
    """Whatever lies where in memory."""
    proto = residual_cnn()
    base = prepared(opened(proto, tmp_path), "static")
    ranges = measure_ranges(base, [inputs_of(proto, 16)], threads=1)
    held = [quantised(base.clone(), Scheme("static", "all"), ranges) for _ in range(5)]
    assert len({serialise(model) for model in held}) == 1


def test_a_weight_is_rounded_by_the_largest_of_its_channel_and_its_gradient_is_whole() -> None:
    weight = torch.tensor([[1.27, 0.014, -0.006], [0.0, 0.0, 0.0]], requires_grad=True)
    found = Grid({}, 127).rounded(weight, 0)
    torch.testing.assert_close(found, torch.tensor([[1.27, 0.01, -0.01], [0.0, 0.0, 0.0]]))
    (found * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3), st.booleans(), st.integers(0, 99))
def test_scales_are_those_that_are_written(shape: list[int], place: int, narrow: bool, seed: int) -> None:
    axis, weight = place % len(shape), np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    scales = weight_scales(weight, axis, narrow)
    found = Grid({}, LARGEST[narrow]).rounded(torch.from_numpy(weight), axis).numpy()
    steps = found / scales.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    assert np.abs(found - weight).max() <= scales.max() * 0.501


def test_values_pass_gradients_inside_their_range_alone(tmp_path: Path) -> None:
    net = Net()
    grid = net.constant("scale", np.array(0.5, np.float32)), net.constant("zero", np.array(2, np.uint8))
    net.op("DequantizeLinear", net.op("QuantizeLinear", net.input("x", "N", 3), *grid), *grid, out="y")
    proto = net.proto("y")
    x = torch.tensor([[-5.0, 0.6, 200.0]], requires_grad=True)
    found = to_torch(opened(proto, tmp_path))(x)
    torch.testing.assert_close(found, torch.tensor([[-1.0, 0.5, 126.5]]))
    found.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 1.0, 0.0]]))
