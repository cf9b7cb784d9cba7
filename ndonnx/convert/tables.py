"""What the families of converters are written with: tables of functions, and shapes given as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts

Function = Callable[..., Any]
Row = tuple[Function, dict[str, Any]]
"""A function of the node's inputs, and the attributes it takes by name with their defaults."""


class Apply(nn.Module):
    """Calls a function with the node's inputs by position and its attributes by name."""

    def __init__(self, function: Function, attributes: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        self.attributes = attributes

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **self.attributes)


def converts_table(table: Mapping[str, Row]) -> None:
    """Register a table of operators whose inputs are all required, or whose optional ones stand last."""
    for operator, (function, defaults) in table.items():
        converts(operator)(partial(_build, function, defaults))


def _build(function: Function, defaults: dict[str, Any], node: OnnxNode) -> nn.Module:
    return Apply(function, {name: node.attributes.get(name, default) for name, default in defaults.items()})


def integers(node: OnnxNode, name: str) -> list[int] | None:
    """An attribute that is a list of integers; None when the node does not have it."""
    found = node.attributes.get(name)
    # onnx2torch hands out an empty list as the protobuf message that holds it.
    return found if found is None or isinstance(found, list) else []


class Numbers:
    """Reads tensors of numbers as a flat list, the same tensor only once.

    Shapes and axes are mostly constants: reading one off an accelerator at every step would
    make each step wait for it.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._numbers: list[Any] = []

    def __call__(self, tensor: Tensor) -> list[Any]:
        if tensor is not self._last:
            self._last, self._numbers = tensor, tensor.reshape(-1).tolist()
        return self._numbers


def from_front(axis: int, rank: int) -> int:
    """An axis counted from the first one on."""
    return axis + rank if axis < 0 else axis


def refuse_further_outputs(node: OnnxNode) -> None:
    """Stop at a node of which more than the first output is read."""
    if any(node.output_values[1:]):
        raise NotImplementedError(f"{node.operation_type} with output {list(node.output_values[1:])}")
