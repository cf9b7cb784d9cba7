"""Bias correction: the mean of every layer in 8 bits is what it is in float, by numbers that can be checked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from ndonnx.assemble.quantise import Scheme, prepared, quantised
from ndonnx.assemble.quantise_biases import Shifts, correctable, corrected, with_shifts
from ndonnx.assemble.quantise_ranges import measure_ranges
from ndonnx.graph import load
from ndonnx.graph.interface import Interface
from ndonnx.graph.save import to_proto
from ndonnx.teacher.probe import Probe
from tests.helpers.models import Net, inputs_of, residual_cnn, run

SCHEME = Scheme("static", rule="percentile 99.99")


def opened(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    onnx.save(proto, folder / "model.onnx")
    return prepared(load(folder / "model.onnx"), "static")


def test_the_mean_of_every_layer_is_that_in_float(tmp_path: Path) -> None:
    proto = residual_cnn(units=2, channels=16)
    base, feeds = opened(proto, tmp_path), inputs_of(proto, 64)
    ranges = {name: histogram for name, histogram in measure_ranges(base, [feeds], threads=1).items()}
    for histogram in ranges.values():
        histogram.high *= 0.5  # as a rule that clips does: means move by more than rounding moves them
        histogram._ranges["percentile 99.99"] = (histogram.low, histogram.high)

    def in_bits(shifts: Shifts) -> ir.Model:
        return quantised(with_shifts(base, shifts), SCHEME, ranges)

    layers = correctable(base, ())
    assert len(layers) == 6
    *_, shifts = corrected(base, in_bits, layers, lambda: [feeds], interface=Interface(), threads=1)
    assert list(shifts) == layers
    ends = {node.name: node.outputs[0].name or "" for node in base.graph}
    names = [ends[name] for name in layers]

    def off(model: ir.Model) -> float:
        found, wanted = Probe(model, names, threads=1).run(feeds), Probe(base, names, threads=1).run(feeds)
        each = [
            np.abs((found[name] - wanted[name]).mean(axis=tuple(a for a in range(found[name].ndim) if a != 1)))
            for name in names
        ]
        return float(max(np.max(values) for values in each))

    before, after = off(in_bits({})), off(in_bits(shifts))
    assert after < 0.1 * before, (before, after)


def test_a_shift_is_added_to_the_bias_and_a_layer_without_one_gets_it(tmp_path: Path) -> None:
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 4))
    net.conv(x, 4, 2, bias=False, out="y")
    proto = net.proto("y")
    base, feeds = opened(proto, tmp_path), inputs_of(proto, 4)
    first, second = correctable(base, ())
    shifts = {second: np.array([0.5, -2.0], np.float32)}
    moved = to_proto(with_shifts(base, shifts))
    assert np.allclose(run(moved, feeds)["y"] - run(proto, feeds)["y"], shifts[second].reshape(1, 2, 1, 1), atol=1e-5)
    both = to_proto(with_shifts(base, {first: np.full(4, 0.25, np.float32)}))
    biases = {t.name: numpy_helper.to_array(t) for t in both.graph.initializer}
    old = {t.name: numpy_helper.to_array(t) for t in to_proto(base).graph.initializer}
    node = next(node for node in both.graph.node if node.name == first)
    held = next(node for node in to_proto(base).graph.node if node.name == first)
    assert np.allclose(biases[node.input[2]], old[held.input[2]] + 0.25)
    assert correctable(base, [first]) == [second]
