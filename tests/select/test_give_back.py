"""Which pieces go back to float: the figure by which moves are judged, and where the moves end."""

from __future__ import annotations

import pytest

from ndonnx.select.precision import Measured, Merit, give_back

WHOLE = Measured(loss=0.1, time=0.5, size=0.3)


def test_of_a_teacher_the_float_model_is_as_good_as_the_quantised_one() -> None:
    merit = Merit.between(0.0, WHOLE)
    assert merit.of(WHOLE) == pytest.approx(merit.of(Measured(0.0, 1.0, 1.0)))
    assert merit.is_better(Measured(0.01, 0.55, 0.35), WHOLE), "most of the quality for little"
    assert not merit.is_better(Measured(0.09, 0.9, 0.9), WHOLE)


def test_a_loss_that_is_small_beside_the_students_own_is_not_worth_much() -> None:
    merit = Merit.between(1.0, Measured(1.02, 0.5, 0.3))
    assert not merit.is_better(Measured(1.0, 0.55, 0.35), Measured(1.02, 0.5, 0.3))


def test_differences_that_timings_have_by_themselves_decide_nothing() -> None:
    merit = Merit.between(0.0, WHOLE)
    assert not merit.is_better(Measured(0.1, 0.48, 0.3), WHOLE)
    assert merit.is_better(WHOLE, Measured(float("inf"), 0.2, 0.2))
    assert not merit.is_better(Measured(float("nan"), 0.2, 0.2), WHOLE)


def test_pieces_are_given_back_while_that_is_worth_it() -> None:
    gains = {0: 0.06, 1: 0.03, 2: 0.001, 3: 0.001, 4: 0.001, 5: 0.09}
    tried = []

    def measured(pieces: tuple[int, ...]) -> Measured:
        part = 0.02 * len(pieces)
        return Measured(0.1 - sum(gains[piece] for piece in pieces), 0.5 + part, 0.3 + part)

    def measure(new: tuple[int, ...], old: tuple[int, ...]) -> tuple[Measured, Measured]:
        tried.append(new[-1])
        return measured(new), measured(old)

    found = give_back(range(6), WHOLE, Merit.between(0.0, WHOLE), measure)
    assert found.pieces == (0, 1) and found.found == measured((0, 1))
    assert tried == [0, 1, 2, 3, 4], "three in a row that were not worth it end the trials"
    assert [move.taken for move in found.moves] == [True, True, False, False, False]


def test_no_time_is_no_move() -> None:
    found = give_back([0, 1], WHOLE, Merit.between(0.0, WHOLE), lambda new, old: None)
    assert (found.pieces, found.found, found.moves) == ((), WHOLE, ())
