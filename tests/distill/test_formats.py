"""Number formats and layouts: the fastest is taken where time is what counts, and none is where steps are."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ndonnx.convert import TorchSlice, to_torch
from ndonnx.distill import trainer
from ndonnx.distill.formats import Format, fastest, is_too_coarse, rivals, usual
from ndonnx.distill.losses import NeighbourhoodLoss
from ndonnx.distill.plan import Plan
from ndonnx.distill.samples import SliceSamples
from ndonnx.distill.trainer import Training, train
from tests.helpers.models import Net
from tests.helpers.training import silent, store_of

PLAN = Plan(steps=40, batch_size=16, lr=0.05, warmup=0.05, seed=0)
TIMED = replace(PLAN, steps=10**6, seconds=1.5, fastest=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def images(tmp_path: Path) -> tuple[TorchSlice, SliceSamples]:
    """A small convolution, and samples of another one."""
    rng = np.random.default_rng(0)
    net = Net(0)
    y = net.conv(net.relu(net.conv(net.input("x", "N", 3, 8, 8), 3, 8, 3)), 8, 4, 3, out="y")
    x = rng.standard_normal((96, 3, 8, 8)).astype(np.float32)
    module = to_torch(ir.from_proto(net.proto(y)))
    with torch.no_grad():
        answers = module(torch.from_numpy(x)).numpy()
    targets = answers + rng.standard_normal(answers.shape).astype(np.float32) * answers.std()
    store = store_of(tmp_path, {"x": x, "y": targets})
    return module, SliceSamples.of(store, ["x"], ["y"], 0.2)


def trained(plan: Plan, tmp_path: Path) -> tuple[Training, list[np.ndarray]]:
    module, samples = images(tmp_path)
    found = train(module, samples, NeighbourhoodLoss("y"), plan, silent)
    return found, [weight.detach().numpy().copy() for weight in module.parameters()]


EVERY = rivals([4], bf16=True)


@given(st.lists(st.floats(1e-3, 10), min_size=len(EVERY), max_size=len(EVERY)), st.booleans())
def test_the_fastest_is_taken_and_the_coarse_one_only_where_it_gains_and_may(times: list[float], coarse: bool) -> None:
    known, first = dict(zip(EVERY, times, strict=True)), set[Format]()

    def seconds(form: Format) -> float:
        cold, _ = form not in first, first.add(form)
        return 100.0 if cold else known[form]  # whatever is done the first time says nothing

    best = fastest(EVERY, seconds, lambda: coarse)
    full = min(known[form] for form in EVERY if not form.bf16)
    half = min(known[form] for form in EVERY if form.bf16)
    assert best.bf16 == (half < 0.9 * full and not coarse)
    assert known[best] == (half if best.bf16 else full)


def test_rivals_are_what_the_machine_has_and_the_inputs_can_be_laid_out_in() -> None:
    assert rivals([2, 3], bf16=False) == [Format()]
    assert rivals([3], bf16=True) == [Format(), Format(bf16=True)]
    assert set(rivals([2, 4], bf16=False)) == {Format(), Format(channels_last=True)}
    assert usual(bf16=True, device="cpu") == Format(bf16=True)
    assert usual(bf16=False, device="cuda") == Format()


@pytest.mark.parametrize(
    ("rounding", "error", "coarse"), [(1e-5, 1e-2, False), (1e-3, 1e-2, True), (float("nan"), 1.0, True), (0, 0, False)]
)
def test_rounding_has_to_be_small_beside_the_error(rounding: float, error: float, coarse: bool) -> None:
    assert is_too_coarse(rounding, error) is coarse


def test_counted_steps_give_the_same_student_on_machines_with_bfloat16_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for has in (False, True):
        monkeypatch.setattr(trainer, "computes_in_bf16", lambda _, has=has: has)
        training, weights = trained(replace(PLAN, fastest=True), tmp_path / str(has))
        assert training.format == "fp32, channels last"
        found.append(weights)
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_layouts_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, last = trained(PLAN, tmp_path / "last")
    monkeypatch.setattr(trainer, "usual", lambda **_: Format())
    training, first = trained(PLAN, tmp_path / "first")
    assert training.format == "fp32"
    for one, other in zip(first, last, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_what_time_is_spent_on_measuring_is_taken_off_and_nothing_is_trained_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Format] = []
    left: list[float] = []
    real, clock = trainer.fastest, trainer._Clock

    def slow(formats: list[Format], seconds: object, rounds_off: object) -> Format:
        before = [weight.detach().clone() for weight in module.parameters()]
        best = real(formats, seconds, rounds_off)  # type: ignore[arg-type]
        assert all(torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))
        time.sleep(0.5)
        told.append(best)
        return best

    def started(plan: Plan) -> object:
        left.append(plan.seconds or 0.0)
        return clock(plan)

    monkeypatch.setattr(trainer, "fastest", slow)
    monkeypatch.setattr(trainer, "_Clock", started)
    module, samples = images(tmp_path)
    found = train(module, samples, NeighbourhoodLoss("y"), TIMED, silent)
    assert found.format == str(told[0]) and found.steps > 0
    assert len(left) == 1 and left[0] <= 1.5 - 0.5


def test_bfloat16_is_left_where_it_hides_what_is_to_be_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "computes_in_bf16", lambda _: True)
    asked: list[bool] = []
    monkeypatch.setattr(
        trainer, "fastest", lambda formats, seconds, rounds_off: asked.append(rounds_off()) or formats[0]
    )
    module, samples = images(tmp_path / "far")
    train(module, samples, NeighbourhoodLoss("y"), TIMED, silent)
    near, samples = images(tmp_path / "near")
    x = samples.arrays(0, 96)["x"]
    with torch.no_grad():
        y = near(torch.from_numpy(x)).numpy() * (1 + 1e-4)
    samples = SliceSamples.of(store_of(tmp_path / "close", {"x": x, "y": y}), ["x"], ["y"], 0.2)
    train(near, samples, NeighbourhoodLoss("y"), TIMED, silent)
    assert asked == [False, True]
