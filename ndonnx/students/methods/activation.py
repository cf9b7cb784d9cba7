"""Activation swap: costly activations become cheap ones, and the operators behind them are refitted.

An activation need not be one node: exporters write `Gelu` as `Erf` with arithmetic around it and
`Silu` as `x * Sigmoid(x)`, each in its own way. So an activation is known by what it computes: any
arithmetic with plain numbers between one value and another is evaluated on a grid and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from ndonnx.errors import RecipeError, ShrinkError
from ndonnx.graph.costs import constant_of
from ndonnx.graph.initializers import unique_name
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.partition import extract
from ndonnx.students.base import Candidate, Spelled, StudentMethod, TeacherSlice
from ndonnx.students.linear import axes_of
from ndonnx.students.reconstruction import refit_consumers
from ndonnx.students.starting import Init, randomise
from ndonnx.teacher.sessions import REFUSALS, make_session

_COSTLY = ("Celu", "Elu", "Gelu", "HardSwish", "Mish", "QuickGelu", "Selu", "Silu", "Softplus")
DEFAULT = tuple(f"{name}=Relu" for name in _COSTLY)
"""What is swapped where nothing is said."""

_SINGLE = {
    "Celu": "Celu",
    "Elu": "Elu",
    "Gelu": "Gelu",
    "HardSigmoid": "HardSigmoid",
    "HardSwish": "HardSwish",
    "LeakyRelu": "LeakyRelu",
    "Mish": "Mish",
    "PRelu": "PRelu",
    "Relu": "Relu",
    "Selu": "Selu",
    "Sigmoid": "Sigmoid",
    "Softplus": "Softplus",
    "Softsign": "Softsign",
    "Swish": "Silu",
    "Tanh": "Tanh",
}
"""Activations that are one operator, whatever its attributes."""

_COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "Gelu": F.gelu,
    "HardSigmoid": F.hardsigmoid,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
    "QuickGelu": lambda x: x * torch.sigmoid(1.702 * x),
    "Relu": F.relu,
    "Relu6": F.relu6,
    "Silu": F.silu,
    "Softplus": F.softplus,
}
"""Activations that are known by what they compute."""

_ALIASES = {"swish": "Silu"}
_GRID = np.linspace(-8, 8, 385, dtype=np.float32)
_SAME = 1e-3
"""Largest difference on the grid: Gelu's approximation by Tanh is within 5e-4 of it."""
_ARITHMETIC = {
    "Add", "Cast", "Clip", "Div", "Erf", "Exp", "HardSigmoid", "Identity", "Log", "Max", "Min", "Mul", "Neg", "Pow",
    "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh",
}  # fmt: skip
"""Operators of which a written-out activation may consist."""
_LONGEST = 16
"""Nodes, at most, of a written-out activation."""

Make = Callable[["_Writer", ir.Value], ir.Value]


class _Writer:
    """Adds nodes in front of one node of a graph."""

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self.graph = model.graph
        self.opset = model.opset_imports.get("", 1)
        self._before = before

    def op(self, operator: str, *inputs: ir.Value, **attributes: float) -> ir.Value:
        """A node; its output."""
        name = unique_name(self.graph, f"{self._before.outputs[0].name}/{operator}")
        node = ir.node(operator, inputs, attributes=attributes, name=name)
        node.outputs[0].name, node.outputs[0].type = name, self._before.outputs[0].type
        self.graph.insert_before(self._before, node)
        return node.outputs[0]

    def number(self, value: float) -> ir.Value:
        """A plain number as an initializer."""
        name = unique_name(self.graph, f"{self._before.outputs[0].name}/{value:g}")
        tensor = ir.tensor(np.array(value, np.float32), name=name)
        found = ir.Value(name=name, const_value=tensor, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(found)
        return found


def _one(operator: str) -> Make:
    return lambda to, x: to.op(operator, x)


def _relu6(to: _Writer, x: ir.Value) -> ir.Value:
    return to.op("Clip", x, min=0.0, max=6.0) if to.opset < 11 else to.op("Clip", x, to.number(0), to.number(6))


def _hard_sigmoid(to: _Writer, x: ir.Value) -> ir.Value:
    """With the slope that PyTorch and MobileNetV3 use."""
    return to.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


def _hard_swish(to: _Writer, x: ir.Value) -> ir.Value:
    return to.op("HardSwish", x) if to.opset >= 14 else to.op("Mul", x, _hard_sigmoid(to, x))


def _silu(to: _Writer, x: ir.Value) -> ir.Value:
    return to.op("Mul", x, to.op("Sigmoid", x))


_NEW: dict[str, Make] = {
    "Elu": _one("Elu"),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": _one("Identity"),
    "LeakyRelu": _one("LeakyRelu"),
    "Relu": _one("Relu"),
    "Relu6": _relu6,
    "Sigmoid": _one("Sigmoid"),
    "Silu": _silu,
    "Softsign": _one("Softsign"),
    "Tanh": _one("Tanh"),
}
"""How each activation is written; all of them exist in every opset, some as several operators."""


@dataclass(frozen=True)
class ActivationSwap(StudentMethod):
    """Swap activations; `swap` holds `OLD=NEW` pairs, and nothing stands for `DEFAULT`.

    Raises:
        RecipeError: a pair is malformed or names an activation that is not known.
    """

    name = "activation"
    usage = "activation [OLD=NEW ...]"

    swap: tuple[str, ...] = ()
    init: Init = "least-squares"

    @classmethod
    def spelled(cls, words: Sequence[str]) -> Spelled:
        """Words that are pairs of operators."""
        if not all(len(old_new := swap.split("=")) == len(("old", "new")) and all(old_new) for swap in words):
            raise ValueError("expected OLD=NEW")
        return Spelled(" ".join((cls.name, *words)), {"swap": tuple(words)}, 1.0)

    def __post_init__(self) -> None:
        self.pairs()

    def pairs(self) -> dict[str, str]:
        """New activations by the old ones."""
        return dict(_pair(text) for text in self.swap or DEFAULT)

    def _build(self, teacher: TeacherSlice, rng: np.random.Generator) -> Candidate:
        pairs = self.pairs()
        copy = teacher.model.clone()
        found = [activation for activation in find_activations(copy) if activation.name in pairs]
        if not found:
            raise ShrinkError(f"{teacher.name}: has none of the activations {', '.join(pairs)}")
        changed = [_swap(copy, activation, _NEW[pairs[activation.name]]) for activation in found]
        copy = infer_shapes(RemoveUnusedNodesPass()(copy).model)
        used = dict.fromkeys(f"{activation.name}={pairs[activation.name]}" for activation in found)
        if self.init == "random":
            copy = randomise(copy, rng, teacher.held)
        elif self.init == "least-squares":
            behind = axes_of(copy, _behind(copy, changed))
            copy = refit_consumers(replace(teacher, groups=behind), copy, np.empty(0, np.bool_))
        return Candidate(f"activation {' '.join(used)}", copy)


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = (part.strip() for part in text.partition("="))
    names = {name.lower(): name for name in (*_SINGLE.values(), *_COMPUTED)} | _ALIASES
    makes = {name.lower(): name for name in _NEW} | _ALIASES
    if not equals:
        raise RecipeError(f"swap '{text}': expected OLD=NEW, such as HardSwish=Relu")
    for name, known in ((old, names), (new, makes)):
        if name.lower() not in known:
            raise RecipeError(f"swap '{text}': unknown activation '{name}'; expected one of "
                              f"{', '.join(sorted(set(known.values())))}")  # fmt: skip
    if names[old.lower()] == makes[new.lower()]:
        raise RecipeError(f"swap '{text}': changes nothing")
    return names[old.lower()], makes[new.lower()]


@dataclass(frozen=True, eq=False)
class Activation:
    """One activation of a graph."""

    name: str
    input: ir.Value
    nodes: tuple[ir.Node, ...]
    """In topological order; the last makes the result."""

    @property
    def output(self) -> ir.Value:
        """Value that the activation gives."""
        return self.nodes[-1].outputs[0]


def find_activations(model: ir.Model) -> list[Activation]:
    """All activations of a slice, each as long as it can be, none inside another; the last first."""
    order = {node: position for position, node in enumerate(model.graph)}
    taken: set[ir.Node] = set()
    found = []
    for node in reversed(model.graph):
        if node in taken or node.domain not in ("", "ai.onnx"):
            continue
        activation = _longest(model, node, order)
        if activation is not None:
            taken.update(activation.nodes)
            found.append(activation)
    return found


def _longest(model: ir.Model, last: ir.Node, order: dict[ir.Node, int]) -> Activation | None:
    found: Activation | None = None
    if last.op_type in _SINGLE and last.inputs[0] is not None:
        found = Activation(_SINGLE[last.op_type], last.inputs[0], (last,))
    for entry, nodes in _ending_in(last, order):
        name = _known(model, entry, nodes) if len(nodes) > 1 or last.op_type == "Clip" else None
        if name is not None:
            found = Activation(name, entry, tuple(nodes))
    return found


def _ending_in(last: ir.Node, order: dict[ir.Node, int]) -> Iterator[tuple[ir.Value, list[ir.Node]]]:
    """Arithmetic from one value to the result of a node, ever longer."""
    inside: list[ir.Node] = []
    front: set[ir.Value] = set()
    node: ir.Node | None = last
    while node is not None and node.op_type in _ARITHMETIC and len(inside) < _LONGEST:
        values = [value for value in node.inputs if value is not None]
        numbers = {value: tensor for value in values if (tensor := constant_of(value)) is not None}
        if any(tensor.size != 1 for tensor in numbers.values()):
            return
        inside.insert(0, node)
        front -= set(node.outputs)
        front.update(value for value in values if value not in numbers)
        if len(front) == 1:
            yield next(iter(front)), inside
        # The latest first, so that whatever reads it inside is inside already.
        latest = max(front, key=lambda value: order.get(value.producer(), -1), default=None)  # type: ignore[arg-type]
        if latest is None or latest.is_graph_output() or any(user not in inside for user in latest.consumers()):
            return
        node = latest.producer()


def _known(model: ir.Model, entry: ir.Value, nodes: Sequence[ir.Node]) -> str | None:
    """The activation that nodes compute between a value and their last result."""
    piece = extract(model, nodes, [entry], [nodes[-1].outputs[0]])
    for value in (*piece.graph.inputs, *(value for node in piece.graph for value in node.outputs)):
        value.shape = None
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    try:
        session = make_session(piece, threads=1)
        (answer,) = session.run(None, {entry.name or "": _GRID})
    except REFUSALS:  # not arithmetic on numbers, or one that onnxruntime lacks: no activation that we know
        return None
    result = np.asarray(answer).reshape(-1)
    if result.shape != _GRID.shape or result.dtype != np.float32:
        return None
    grid = torch.from_numpy(_GRID)
    same = (name for name, function in _COMPUTED.items() if np.abs(function(grid).numpy() - result).max() < _SAME)
    return next(same, None)


def _swap(model: ir.Model, activation: Activation, make: Make) -> ir.Value:
    """Write the new activation in the old one's place; its result has the old one's name."""
    old = activation.output
    new = make(_Writer(model, activation.nodes[-1]), activation.input)
    new.type, new.shape = old.type, old.shape
    name, old.name = old.name, unique_name(model.graph, f"{old.name}/old")
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name = name
    return new


def _behind(model: ir.Model, changed: Sequence[ir.Value]) -> set[str]:
    """Names of all values that depend on changed ones."""
    found = set(changed)
    for node in model.graph:
        if any(value in found for value in node.inputs if value is not None):
            found.update(node.outputs)
    return {value.name or "" for value in found}
