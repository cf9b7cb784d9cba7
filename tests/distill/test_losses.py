"""Equations 3 to 5 against numbers computed by hand, and where their gradients go."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ndonnx.distill.losses import (
    LABEL,
    DistillationLoss,
    EmbeddingLoss,
    Head,
    LookAheadLoss,
    MultilabelLoss,
    NeighbourhoodLoss,
    RegressionLoss,
    SeveralLosses,
)
from ndonnx.distill.tasks.scores import LEAST_PROBABILITY


class Scale(nn.Module):
    """Multiplies by its one weight, and adds what it gets beside the stream."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.factor * x + sum(context)


def test_equation_2_is_the_mean_squared_error() -> None:
    loss = NeighbourhoodLoss("y")
    assert loss(torch.tensor([[1.0, 2.0], [0.0, 4.0]]), {"y": torch.tensor([[0.0, 2.0], [3.0, 2.0]])}) == 14 / 4


def test_equation_3_by_hand() -> None:
    """Two classes: softened scores 0.5/0.5 of the student, 0.75/0.25 of the teacher, label 1."""
    loss = DistillationLoss("y", temperature=2.0, label_weight=0.25)
    student = torch.tensor([[1.0, 1.0]])
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]])
    soft = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    expected = 0.75 * 4 * soft + 0.25 * math.log(2)
    assert float(loss(student, {"y": teacher, LABEL: torch.tensor([1])})) == pytest.approx(expected, rel=1e-5)


def test_equation_3_without_labels_is_the_softened_term_alone() -> None:
    loss = DistillationLoss("y", temperature=2.0)
    assert loss.values == ("y",)
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]])
    soft = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(loss(torch.tensor([[1.0, 1.0]]), {"y": teacher})) == pytest.approx(4 * soft, rel=1e-5)
    assert float(loss(teacher, {"y": teacher})) == pytest.approx(0, abs=1e-6)


def test_equation_3_is_the_mean_over_samples_and_positions() -> None:
    loss = DistillationLoss("y", temperature=1.0, label_weight=0.5)
    one = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    other = torch.randn(1, 5, generator=torch.Generator().manual_seed(1))
    single = loss(one, {"y": other, LABEL: torch.tensor([2])})
    many = loss(one.expand(3, 4, 5), {"y": other.expand(3, 4, 5), LABEL: torch.full((3, 4), 2)})
    assert float(many) == pytest.approx(float(single), rel=1e-5)


def test_equations_4_and_5_by_hand() -> None:
    """Heads multiply by 3 (and add their context, 1) and then by 2."""
    heads = [Head(Scale(3.0), ("c",), "t1"), Head(Scale(2.0), (), "t2")]
    loss = LookAheadLoss("t", heads, [0.5, 0.25])
    captured = {name: torch.tensor([value]) for name, value in {"t": 1.0, "c": 1.0, "t1": 5.0, "t2": 8.0}.items()}
    # 2 -> 3*2+1 = 7 -> 14
    expected = (2 - 1) ** 2 + 0.5 * (7 - 5) ** 2 + 0.25 * (14 - 8) ** 2
    assert float(loss(torch.tensor([2.0]), captured)) == pytest.approx(expected)
    assert loss.values == ("t", "c", "t1", "t2")


def test_errors_further_on_count_by_the_variance_of_what_is_there() -> None:
    loss = LookAheadLoss("t", [Head(Scale(3.0), (), "t1")], [1.0])
    loss.scales = {"t": 2.0, "t1": 8.0}
    captured = {"t": torch.tensor([1.0]), "t1": torch.tensor([0.0])}
    assert float(loss(torch.tensor([1.0]), captured)) == pytest.approx(0 + 2 / 8 * 9)


def test_looking_ahead_moves_the_student_only() -> None:
    head = Scale(3.0)
    loss = LookAheadLoss("t", [Head(head, (), "t1")], [1.0])
    answer = torch.tensor([2.0], requires_grad=True)
    target = torch.tensor([0.0], requires_grad=True)
    loss(answer, {"t": target.detach(), "t1": torch.tensor([0.0])}).backward()
    # d/dy (y^2 + (3y)^2) = 2y + 18y
    assert answer.grad is not None and float(answer.grad) == pytest.approx(40.0)
    assert head.factor.grad is None and not head.factor.requires_grad


def test_every_head_needs_its_weight() -> None:
    with pytest.raises(ValueError, match="1 slices to look through, but 2 weights"):
        LookAheadLoss("t", [Head(Scale(1.0), (), "t1")], [1.0, 1.0])


def test_probabilities_are_compared_at_the_input_of_their_softmax() -> None:
    rng = np.random.default_rng(0)
    student, teacher = (torch.from_numpy(rng.standard_normal((2, 3, 4)).astype(np.float32)) for _ in range(2))
    by_logits = DistillationLoss("y", temperature=2.0)(student, {"y": teacher})
    by_position = [DistillationLoss("y", temperature=2.0)(student[:, n], {"y": teacher[:, n]}) for n in range(3)]
    assert by_logits.item() == pytest.approx(torch.stack(by_position).mean().item()), "the mean over positions"
    p, q = student.softmax(-1), teacher.softmax(-1)
    loss = DistillationLoss("y", temperature=2.0, least_probability=LEAST_PROBABILITY)
    assert loss(p, {"y": q}).item() == pytest.approx(by_logits.item(), rel=1e-5)
    logs = DistillationLoss("y", temperature=2.0)
    assert logs(p.log(), {"y": q.log()}).item() == pytest.approx(by_logits.item(), rel=1e-5)
    maps = DistillationLoss("y", temperature=2.0, axis=1, least_probability=LEAST_PROBABILITY)
    assert maps(p.movedim(-1, 1), {"y": q.movedim(-1, 1)}).item() == pytest.approx(by_logits.item(), rel=1e-5)


def test_a_probability_of_zero_has_a_finite_gradient() -> None:
    student = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    loss = DistillationLoss("y", temperature=1.0, least_probability=LEAST_PROBABILITY)
    loss(student.softmax(-1), {"y": torch.tensor([[0.0, 0.0, 1.0]])}).backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()


def test_embeddings_by_angle_and_error() -> None:
    answer, teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Cosines 0.6 and 1; squared errors 4, 16, 0 and 1 over a variance of 2.
    found = EmbeddingLoss("y", variance=2.0)(answer, {"y": teacher})
    assert found.item() == pytest.approx((0.4 + 0.0) / 2 + (4 + 16 + 0 + 1) / 4 / 2)


def test_answers_by_their_divergence_over_that_of_a_constant() -> None:
    teacher, student = torch.tensor([[0.9, 0.2]]), torch.tensor([[0.8, 0.2]], requires_grad=True)
    kl = 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.1 / 0.2)
    found = MultilabelLoss("y", 0.25, 1e-6)(student, {"y": teacher})
    assert found.item() == pytest.approx(kl / 2 / 0.25, rel=1e-4)
    sides = torch.tensor([[1.0, 0.0, 0.0]])
    wrong = torch.tensor([[1e-5, 1 - 1e-5, 0.5]], requires_grad=True)
    MultilabelLoss("y", 1.0, 1e-6)(wrong, {"y": sides}).backward()
    assert wrong.grad is not None and torch.isfinite(wrong.grad).all()
    assert (wrong.grad[0, :2].abs() > 1e3).all(), "a confident mistake weighs most"


def test_numbers_by_their_error_over_the_variance() -> None:
    found = RegressionLoss("y", variance=4.0)(torch.tensor([[1.0], [5.0]]), {"y": torch.tensor([[3.0], [1.0]])})
    assert found.item() == pytest.approx((4 + 16) / 2 / 4)


def test_several_outputs_side_by_side() -> None:
    boxes, scores = torch.arange(8.0).reshape(2, 2, 2), torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    captured = {"boxes": boxes + 1, "scores": scores.flip(0)}
    losses = [RegressionLoss("boxes", 4.0), DistillationLoss("scores", 1.0)]
    several = SeveralLosses(losses, [4.0, 0.25])
    answer = torch.cat([boxes.reshape(2, 4), scores], dim=1)
    expected = losses[0](boxes, captured) + losses[1](scores, captured)
    assert several(answer, captured).item() == pytest.approx(expected.item())
    difference = several.compared(answer, captured) - several.reference(captured)
    # Each output's error over its own variance: 1 / 4 for each box, and the scores' over 0.25.
    squares = difference.square()
    assert squares[:, :4].sum().item() == pytest.approx(8 * 1 / 4)
    assert squares[:, 4:].sum().item() == pytest.approx((scores - scores.flip(0)).square().sum().item() / 0.25)
