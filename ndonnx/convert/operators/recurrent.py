"""Converters of the recurrent operators: torch's own kernels for the usual forms, a loop over the steps for the rest.

Data are (S, N, I), weights W (D, G*H, I) and R (D, G*H, H), biases (D, 2*G*H), states (D, N, H): S steps, N
samples, D directions, G gates (LSTM 4, GRU 3, RNN 1). The answers are Y (S, D, N, H) and the last states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts

Activation = Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, Activation] = {
    "hardsigmoid": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}
_DEFAULT_SLOPES = {"activation_alpha": 0.2, "activation_beta": 0.5}
"""What `HardSigmoid` has where nothing is said; no other of these activations has numbers of its own."""


@dataclass(frozen=True)
class Direction:
    """Everything that one direction computes with."""

    weight: Tensor
    recurrence: Tensor
    bias: Tensor
    """(2, G*H): beside the data, and beside the state."""
    hidden: Tensor
    """(N, H), the state before the first step."""
    cell: Tensor
    """(N, H); an LSTM's."""
    peepholes: Tensor | None
    activations: list[str]
    backwards: bool


class Recurrent(nn.Module):
    """What LSTM, GRU and RNN share: directions, layout, initial states and the lengths of the sequences."""

    gates: ClassVar[int]
    activations: ClassVar[list[str]]

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        attributes = node.attributes
        direction = str(attributes.get("direction", "forward"))
        self.backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
        names = attributes.get("activations") or self.activations * len(self.backwards)
        self.names = [str(name).lower() for name in names]
        self.batch_first = bool(attributes.get("layout", 0))
        self.outputs = len(node.output_values)
        if "clip" in attributes:
            raise NotImplementedError(f"{node.operation_type} with clip")
        unknown = sorted(set(self.names) - _ACTIVATIONS.keys())
        if unknown or len(self.names) != len(self.activations) * len(self.backwards):
            raise NotImplementedError(f"{node.operation_type} with the activations {names}")
        for name, usual in _DEFAULT_SLOPES.items():
            if any(abs(number - usual) > 1e-6 for number in attributes.get(name) or []):
                raise NotImplementedError(f"{node.operation_type} with {name} {attributes[name]}")

    def forward(  # noqa: PLR0913 - the operator's own inputs, which are told apart by their names
        self,
        data: Tensor,
        weight: Tensor,
        recurrence: Tensor,
        bias: Tensor | None = None,
        sequence_lens: Tensor | None = None,
        initial_h: Tensor | None = None,
        initial_c: Tensor | None = None,
        peepholes: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        # Errors of reduced precision would add up from step to step.
        with torch.autocast(data.device.type, enabled=False):
            data = self._steps_first(data)
            initial_h, initial_c = (
                part if part is None else self._steps_first(part) for part in (initial_h, initial_c)
            )
            zeros = data.new_zeros(data.shape[1], recurrence.shape[-1])
            count = len(self.activations)
            answers = []
            for d, backwards in enumerate(self.backwards):
                direction = Direction(
                    weight[d],
                    recurrence[d],
                    weight.new_zeros(2, weight.shape[1]) if bias is None else bias[d].reshape(2, -1),
                    zeros if initial_h is None else initial_h[d],
                    zeros if initial_c is None else initial_c[d],
                    None if peepholes is None else peepholes[d],
                    self.names[d * count : (d + 1) * count],
                    backwards,
                )
                answers.append(self._answer(direction, data, sequence_lens))
            by_part = zip(*answers, strict=True)
            steps, *states = (torch.stack(parts, 0 if number else 1) for number, parts in enumerate(by_part))
        if self.batch_first:
            steps, states = steps.permute(2, 0, 1, 3), [state.transpose(0, 1) for state in states]
        return steps if self.outputs == 1 else (steps, *states)[: self.outputs]

    def _steps_first(self, part: Tensor) -> Tensor:
        """Data or states in float32, with the samples as the second axis."""
        return part.float().transpose(0, 1) if self.batch_first else part.float()

    def _answer(self, direction: Direction, data: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
        """All steps (S, N, H) of one direction, and its last states (N, H)."""
        if lengths is not None or not self._is_usual(direction):
            return self._stepwise(direction, data, lengths)
        steps, *states = self._kernel(direction, data.flip(0) if direction.backwards else data)
        return steps.flip(0) if direction.backwards else steps, *(state.squeeze(0) for state in states)

    def _stepwise(self, direction: Direction, data: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
        """Step by step; behind the end of a sample's sequence its state stays, and its answer is 0."""
        inputs = F.linear(data, direction.weight, direction.bias[0])
        hidden, cell = direction.hidden, direction.cell
        steps = [hidden] * len(data)
        for t in reversed(range(len(data))) if direction.backwards else range(len(data)):
            new, new_cell = self._step(direction, inputs[t], hidden, cell)
            if lengths is None:
                steps[t], hidden, cell = new, new, new_cell
                continue
            lasts = (lengths > t).unsqueeze(1)
            steps[t] = torch.where(lasts, new, torch.zeros_like(new))
            hidden, cell = torch.where(lasts, new, hidden), torch.where(lasts, new_cell, cell)
        return torch.stack(steps), hidden, cell

    def _is_usual(self, direction: Direction) -> bool:
        """Whether torch has a kernel for it."""
        return direction.activations == [name.lower() for name in self.activations] and direction.peepholes is None

    @abstractmethod
    def _kernel(self, direction: Direction, data: Tensor) -> tuple[Tensor, ...]:
        """The steps (S, N, H) and the last states (1, N, H), by torch's kernel."""

    @abstractmethod
    def _step(self, direction: Direction, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """The next state and cell; `x` (N, G*H) is the data's part with its bias."""


def _reordered(direction: Direction, order: list[int]) -> list[Tensor]:
    """Weights and biases with their gates in torch's order."""
    parts = (direction.weight, direction.recurrence, direction.bias[0], direction.bias[1])
    gates = len(order)
    return [part.reshape(gates, -1, *part.shape[1:])[order].reshape(part.shape) for part in parts]


_ONCE = (True, 1, 0.0, True, False, False)
"""For torch's kernels: with biases, one layer, no dropout, with a gradient, one direction, time first."""


@converts("LSTM")
class LSTM(Recurrent):
    """`LSTM`: gates in, out, forget, cell."""

    gates = 4
    activations: ClassVar[list[str]] = ["Sigmoid", "Tanh", "Tanh"]

    def __init__(self, node: OnnxNode) -> None:
        super().__init__(node)
        if node.attributes.get("input_forget", 0):
            raise NotImplementedError("LSTM with input_forget")

    def _kernel(self, direction: Direction, data: Tensor) -> tuple[Tensor, ...]:
        states = [direction.hidden.unsqueeze(0), direction.cell.unsqueeze(0)]
        return torch.lstm(data, states, _reordered(direction, [0, 2, 3, 1]), *_ONCE)

    def _step(self, direction: Direction, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        f, g, h = (_ACTIVATIONS[name] for name in direction.activations)
        into, out, forget, new = (x + F.linear(hidden, direction.recurrence, direction.bias[1])).chunk(4, -1)
        peep_in, peep_out, peep_forget = (
            direction.peepholes.chunk(3) if direction.peepholes is not None else (torch.zeros_like(cell[0]),) * 3
        )
        cell_after = f(forget + peep_forget * cell) * cell + f(into + peep_in * cell) * g(new)
        return f(out + peep_out * cell_after) * h(cell_after), cell_after


@converts("GRU")
class GRU(Recurrent):
    """`GRU`: gates update, reset, hidden; the reset gate applies before or behind the linear map of the state."""

    gates = 3
    activations: ClassVar[list[str]] = ["Sigmoid", "Tanh"]

    def __init__(self, node: OnnxNode) -> None:
        super().__init__(node)
        self.resets_behind = bool(node.attributes.get("linear_before_reset", 0))

    def _is_usual(self, direction: Direction) -> bool:
        return self.resets_behind and super()._is_usual(direction)

    def _kernel(self, direction: Direction, data: Tensor) -> tuple[Tensor, ...]:
        return torch.gru(data, direction.hidden.unsqueeze(0), _reordered(direction, [1, 0, 2]), *_ONCE)

    def _step(self, direction: Direction, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        f, g = (_ACTIVATIONS[name] for name in direction.activations)
        size = hidden.shape[-1]
        recurrence, bias = direction.recurrence, direction.bias[1]
        gates = f(x[:, : 2 * size] + F.linear(hidden, recurrence[: 2 * size], bias[: 2 * size]))
        update, reset = gates.chunk(2, -1)
        if self.resets_behind:
            state = reset * F.linear(hidden, recurrence[2 * size :], bias[2 * size :])
        else:
            state = F.linear(reset * hidden, recurrence[2 * size :], bias[2 * size :])
        new = g(x[:, 2 * size :] + state)
        return (1 - update) * new + update * hidden, cell


@converts("RNN")
class RNN(Recurrent):
    """`RNN`: one gate."""

    gates = 1
    activations: ClassVar[list[str]] = ["Tanh"]

    def _is_usual(self, direction: Direction) -> bool:
        return direction.activations[0] in ("tanh", "relu")

    def _kernel(self, direction: Direction, data: Tensor) -> tuple[Tensor, ...]:
        kernel = torch.rnn_tanh if direction.activations[0] == "tanh" else torch.rnn_relu
        return kernel(data, direction.hidden.unsqueeze(0), _reordered(direction, [0]), *_ONCE)

    def _step(self, direction: Direction, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        after = _ACTIVATIONS[direction.activations[0]](x + F.linear(hidden, direction.recurrence, direction.bias[1]))
        return after, cell
