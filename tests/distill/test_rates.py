"""Learning rates found by short trials: the search goes where trials end lower, and a training is the better for it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ndonnx.convert import TorchSlice, to_torch
from ndonnx.distill.losses import NeighbourhoodLoss
from ndonnx.distill.plan import Plan
from ndonnx.distill.rates import Pace, at_lower_rate, best_rate, is_too_high, trial_of
from ndonnx.distill.samples import SliceSamples
from ndonnx.distill.trainer import Training, train
from ndonnx.errors import TrainingError
from ndonnx.students.masks import FixedZeros
from tests.helpers.models import Net
from tests.helpers.training import silent, store_of

PLAN = Plan(steps=1000, batch_size=32, lr=0.1, warmup=0.05, seed=0, tries=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@given(st.floats(-8, 4), st.integers(-2, 2))
def test_the_best_of_the_tried_rates_is_taken_wherever_it_lies(best: float, magnitude: int) -> None:
    first, tried = 10.0**magnitude, {}

    def loss_at(rate: float) -> float:
        tried[rate] = abs(math.log(rate / first) / math.log(3) - best)
        return tried[rate]

    assert tried.get(best_rate(loss_at, first), -1) == min(tried.values())
    assert len(tried) <= 6 and max(tried) < 3.01 * first
    steps_from_first = round(math.log(min(tried, key=lambda rate: tried[rate]) / first) / math.log(3))
    assert abs(steps_from_first - min(1, max(-5, best))) <= 1


def test_rates_that_break_down_are_passed_by() -> None:
    assert best_rate(lambda rate: math.inf if rate > 0.02 else 1 / rate, 0.1) == pytest.approx(0.1 / 9)
    assert best_rate(lambda rate: 1.9 if rate > 0.02 else 1.0, 0.1) < 0.02, "all dead, and as bad"


def test_a_trial_is_a_small_training_and_short_trainings_have_none() -> None:
    assert trial_of(PLAN, 0.5) == replace(PLAN, steps=30, lr=0.5)
    assert trial_of(replace(PLAN, steps=10**7, seconds=100.0), 0.5).seconds == pytest.approx(3.0)
    pace = Pace(1e-3)
    assert pace.has_room(PLAN) and pace.compared(PLAN) == round(0.5 * 30 * 3 * 32)
    assert not pace.has_room(replace(PLAN, steps=999))
    timed = replace(PLAN, steps=10**7, seconds=3 * 32 * 1e-3 * 1000)
    assert pace.has_room(timed) and pace.compared(timed) == pace.compared(PLAN)
    assert not pace.has_room(replace(timed, seconds=3 * 32 * 1e-3 * 900)), "room for 900 steps"


def _outliers(folder: Path) -> SliceSamples:
    """A layer behind a ReLU, on inputs of which a few are far larger than the others, as spectra have them."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((600, 24)) * np.exp(rng.standard_normal((600, 1)))).astype(np.float32)
    hidden = np.maximum(x @ (rng.standard_normal((24, 32)) / 5), 0)
    y = np.maximum(hidden @ (rng.standard_normal((32, 8)) / 6), 0).astype(np.float32)
    return SliceSamples.of(store_of(folder, {"x": x, "y": y}), ["x"], ["y"], 0.2)


def _student() -> TorchSlice:
    net = Net(3)
    net.relu(net.gemm(net.relu(net.gemm(net.input("x", "N", 24), 24, 16)), 16, 8), out="y")
    return to_torch(ir.from_proto(net.proto("y")))


def _trained(folder: Path, plan: Plan) -> tuple[Training, bytes]:
    module = _student()
    found = train(module, _outliers(folder), NeighbourhoodLoss("y"), plan, silent)
    return found, b"".join(array.tobytes() for array in module.trained_weights().values())


def test_a_rate_that_kills_a_slice_is_found_out_in_time(tmp_path: Path) -> None:
    """Behind a last ReLU a step that is too far leaves nothing that could come back."""
    far = replace(PLAN, lr=3.0)
    as_given, _ = _trained(tmp_path / "given", replace(far, tries=False))
    tried, _ = _trained(tmp_path / "tried", far)
    assert tried.nmse < 0.7 * as_given.nmse
    assert tried.nmse <= tried.nmse_start


def test_trials_are_the_same_every_time(tmp_path: Path) -> None:
    one, other = (_trained(tmp_path / name, PLAN) for name in ("one", "other"))
    assert one[1] == other[1]
    assert replace(one[0], seconds=0) == replace(other[0], seconds=0)


def test_a_budget_of_time_holds_its_trials(tmp_path: Path) -> None:
    found, _ = _trained(tmp_path, replace(PLAN, steps=10**7, seconds=0.5))
    assert 0 < found.steps < 10**7 and found.nmse < found.nmse_start


def _near(folder: Path) -> tuple[TorchSlice, SliceSamples]:
    """A student that is almost what it learns, as a closed form leaves it."""
    module, x = _student(), np.random.default_rng(0).standard_normal((600, 24)).astype(np.float32)
    with torch.no_grad():
        y = module(torch.from_numpy(x)).numpy()
        for weight in module.weights:
            weight.mul_(1 + 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return module, SliceSamples.of(store_of(folder, {"x": x, "y": y}), ["x"], ["y"], 0.2)


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("steps", [24, 80, 160])
def test_a_short_training_behind_a_good_start_goes_down_to_a_rate_at_which_it_gets_better(
    tmp_path: Path, steps: int, constrained: bool
) -> None:
    """At the first rate it only leaves what a closed form has found, and ends where it began.

    Every training of a whole is held to the zeros that its weights have, of which there may be none.
    """
    module, samples = _near(tmp_path)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    ends = []
    for tries in (False, True):
        module.load_state_dict(state)
        plan, zeros = replace(PLAN, steps=steps, tries=tries), FixedZeros({}) if constrained else None
        found = train(module, samples, NeighbourhoodLoss("y"), plan, silent, zeros)
        ends.append(found.nmse / found.nmse_start)
        assert found.lr == (pytest.approx(PLAN.lr / 5 ** round(math.log(PLAN.lr / found.lr, 5))) if tries else PLAN.lr)
    assert ends[1] < 0.7 and ends[1] < ends[0] and found.lr is not None and found.lr < PLAN.lr
    assert found.steps <= steps and [step for step, _ in found.curve] == sorted({step for step, _ in found.curve})


def test_a_rate_is_judged_when_a_part_is_over_and_where_one_is_left() -> None:
    assert not is_too_high(0.05, 100.0, 1.0) and not is_too_high(1.0, 100.0, 1.0)
    assert not is_too_high(0.1, -0.999, -0.99) and is_too_high(0.1, -0.4, -0.99), "losses of one's own may be negative"
    assert is_too_high(0.1, 1.6, 1.0) and not is_too_high(0.1, 1.4, 1.0) and is_too_high(0.5, math.nan, 1.0)
    assert at_lower_rate(replace(PLAN, steps=100, lr=0.05), 12) == replace(PLAN, steps=88, lr=pytest.approx(0.01))


def test_where_there_is_no_time_for_steps_that_are_worth_it_there_are_none(tmp_path: Path) -> None:
    timed = replace(PLAN, steps=10**6, seconds=0.2)
    ends = [
        train(_student(), _outliers(tmp_path / str(worth)), NeighbourhoodLoss("y"), replace(timed, worth=worth), silent)
        for worth in (0, 10**6)
    ]
    assert ends[0].steps > 0 and ends[0].nmse < ends[0].nmse_start
    assert ends[1].steps == 0 and ends[1].nmse == ends[1].nmse_start


def test_a_rate_that_breaks_the_module_is_lowered_unless_somebody_has_said_it(tmp_path: Path) -> None:
    module, samples = _near(tmp_path)
    far = replace(PLAN, steps=200, lr=1e8)
    with pytest.raises(TrainingError, match="lower --lr"):
        train(module, samples, NeighbourhoodLoss("y"), replace(far, lr=1e30, tries=False), silent)
    found = train(_near(tmp_path / "again")[0], samples, NeighbourhoodLoss("y"), far, silent)
    assert found.nmse < 0.9 * found.nmse_start and found.lr is not None and found.lr < 1.0
