"""Noise that comes into a graph from outside: every noisy value gets a further input added to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ndonnx.graph.interface import WHOLE, sample_axis, set_sample_axis


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on one value of the teacher."""

    value: str
    shape: tuple[int, ...]
    """Shape of the noise for one sample."""
    std: float

    @property
    def input(self) -> str:
        """Name of the graph input through which it comes in."""
        return f"{self.value}/noise"


def add_noise_inputs(model: ir.Model, noises: Sequence[Noise]) -> ir.Model:
    """Let noise come into a model: each value, on its way to all its readers, gets a further input added to it.

    Works in place and returns the model.

    Args:
        model: constants folded.
        noises: their `input`s are appended to the model's inputs, in order; (samples, *shape) in the value's type, the
            samples along the axis where the value has them.
    """
    graph = model.graph
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    for noise in noises:
        value = values[noise.value]
        producer = value.producer()
        readers = list(value.uses())
        axis = sample_axis(value)
        sizes: list[int | str] = list(noise.shape)
        if axis != WHOLE:
            sizes.insert(axis, "samples")
        type_ = value.type or ir.TensorType(ir.DataType.FLOAT)
        entry = ir.Value(name=noise.input, type=type_, shape=ir.Shape(sizes))
        set_sample_axis(entry, axis)
        graph.inputs.append(entry)
        add = ir.node("Add", [value, entry], name=f"{noise.value}/add-noise")
        noisy = add.outputs[0]
        noisy.name, noisy.type, noisy.shape = f"{noise.value}/noisy", value.type, value.shape
        for reader, index in readers:
            reader.replace_input_with(index, noisy)
        assert producer is not None
        graph.insert_after(producer, add)
    return model
