"""Training of one slice: the numbers by hand, the best state kept, and every failure with its reason."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ndonnx.convert import TorchSlice, to_torch
from ndonnx.distill.job import DistilJob, load_student, read_result
from ndonnx.distill.losses import NeighbourhoodLoss, nmse, target_variance
from ndonnx.distill.samples import Blocks, SliceSamples
from ndonnx.distill.trainer import Training, _batches, learning_rate, train
from ndonnx.errors import ConversionError, TrainingError
from ndonnx.graph import save
from ndonnx.graph.save import serialise
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.partition import find_groups
from ndonnx.runtime.run_directory import Entry
from ndonnx.students.methods.width import Width
from ndonnx.teacher import ActivationStore
from tests.helpers.models import Net, run
from tests.helpers.training import PLAN, linear, regression, silent, store_of


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state(module: TorchSlice) -> bytes:
    return b"".join(array.tobytes() for array in module.trained_weights().values())


# The step size


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),  # half of the warm-up, the cosine still at 1
        (1, 0.5 * 0.97552826),
        (5, 0.25),
        (9, 0.5 * 0.02447174),
    ],
)
def test_the_learning_rate_rises_and_then_follows_half_a_cosine(step: int, expected: float) -> None:
    assert learning_rate(step / 10, replace(PLAN, steps=10, lr=0.5, warmup=0.2)) == pytest.approx(expected)


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(1e-4, 10))
def test_the_learning_rate_stays_within_bounds_and_ends_near_zero(steps: int, warmup: float, lr: float) -> None:
    plan = replace(PLAN, steps=steps, warmup=warmup, lr=lr)
    rates = [learning_rate(step / steps, plan) for step in range(steps)]
    assert all(0 < rate <= lr for rate in rates)
    assert rates[-1] <= lr * (math.pi / 2 / steps) ** 2 * 1.01 or steps == 1
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


# The measure


def test_the_nmse_is_the_error_over_the_variance_across_samples() -> None:
    rng = np.random.default_rng(0)
    target = rng.standard_normal((50, 3, 4)).astype(np.float32) * np.arange(1, 5, dtype=np.float32)
    variance = target_variance(torch.from_numpy(target))
    assert variance == pytest.approx(target.astype(np.float64).var(axis=0).mean())
    mean = np.broadcast_to(target.mean(axis=0), target.shape)
    assert nmse(float(np.square(mean - target).mean()), variance) == pytest.approx(1, rel=1e-5)
    assert nmse(0.0, variance) == 0


def test_the_nmse_of_a_constant_target_is_the_plain_error() -> None:
    assert target_variance(torch.full((5, 3), 2.0)) == 0
    assert nmse(0.25, 0.0) == 0.25


def test_the_held_out_error_is_that_of_numpy(tmp_path: Path) -> None:
    samples, module = regression(tmp_path), to_torch(linear(Net()))
    found = train(module, samples, NeighbourhoodLoss("y"), replace(PLAN, steps=0), silent)
    held = samples.arrays(0, 20)
    weights = module.trained_weights()
    answer = held["x"].astype(np.float64) @ weights["w"] + weights["b"]
    expected = np.square(answer - held["y"]).mean() / held["y"].astype(np.float64).var(axis=0).mean()
    assert found.nmse == found.nmse_start == pytest.approx(expected, rel=1e-5)


# Training


def test_a_linear_slice_finds_the_least_squares_solution(tmp_path: Path) -> None:
    module = to_torch(linear(Net()))
    found = train(module, regression(tmp_path), NeighbourhoodLoss("y"), replace(PLAN, steps=300, batch_size=32), silent)
    assert found.nmse < 1e-4 and found.nmse_start > 0.1
    assert found.steps == 300 and 0 < found.best_step <= 300


def test_with_noise_it_comes_as_near_as_least_squares_does(tmp_path: Path) -> None:
    samples, module = regression(tmp_path, 400, noise=0.5), to_torch(linear(Net()))
    found = train(module, samples, NeighbourhoodLoss("y"), replace(PLAN, steps=300, batch_size=360), silent)
    rows, held = samples.training_rows(1000), samples.arrays(0, 40)
    solution, *_ = np.linalg.lstsq(np.hstack([rows["x"], np.ones((360, 1))]), rows["y"], rcond=None)
    best = np.square(np.hstack([held["x"], np.ones((40, 1))]) @ solution - held["y"]).mean()
    assert found.nmse == pytest.approx(best / held["y"].var(axis=0).mean(), rel=0.03)


@pytest.mark.parametrize("lr", [0.01, 1.0, 100.0, 1e4])
def test_a_training_never_ends_worse_than_it_began(tmp_path: Path, lr: float) -> None:
    """From the very solution, every step leads away."""
    samples, module = regression(tmp_path), to_torch(linear(Net()))
    train(module, samples, NeighbourhoodLoss("y"), replace(PLAN, steps=300), silent)
    before = state(module)
    found = train(module, samples, NeighbourhoodLoss("y"), replace(PLAN, lr=lr, seed=1), silent)
    assert found.nmse <= found.nmse_start
    again = train(module, samples, NeighbourhoodLoss("y"), replace(PLAN, steps=0), silent)
    assert again.nmse_start == found.nmse
    if found.best_step == 0:
        assert state(module) == before


def test_the_state_that_is_kept_is_the_one_that_was_reported(tmp_path: Path) -> None:
    samples, module = regression(tmp_path, noise=1.0), to_torch(linear(Net()))
    events: list[tuple[int, int, float]] = []
    found = train(module, samples, NeighbourhoodLoss("y"), replace(PLAN, steps=45), lambda *event: events.append(event))
    steps, totals, errors = zip(*events, strict=True)
    assert set(totals) == {45} and steps[-1] == 45 and list(steps) == sorted(set(steps))
    assert list(errors) == sorted(errors, reverse=True), "the best so far is told"
    assert errors[-1] == found.nmse
    assert train(module, samples, NeighbourhoodLoss("y"), replace(PLAN, steps=0), silent).nmse == found.nmse


def test_with_a_time_the_steps_are_told_that_it_has_room_for(tmp_path: Path) -> None:
    samples, module = regression(tmp_path, noise=1.0), to_torch(linear(Net()))
    events: list[tuple[int, int]] = []
    plan = replace(PLAN, steps=10**7, seconds=0.5)
    found = train(module, samples, NeighbourhoodLoss("y"), plan, lambda step, steps, nmse: events.append((step, steps)))
    parts = [step / steps for step, steps in events]
    assert parts == sorted(parts) and parts[-1] == 1 and events[-1][0] == found.steps < plan.steps
    assert parts[0] < 1 and all(part < 1 for part in parts[:-1])
    # Each is told when so much of the time is over; a slow step may take more of it than one part.
    assert all(part >= (number - 0.5) / 20 for number, part in enumerate(parts, start=1))


def test_the_seed_decides_every_bit(tmp_path: Path) -> None:
    samples = regression(tmp_path, noise=0.3)

    def trained(seed: int) -> tuple[bytes, Training]:
        module = to_torch(linear(Net()))
        found = train(module, samples, NeighbourhoodLoss("y"), replace(PLAN, seed=seed), silent)
        return state(module), replace(found, seconds=0)

    assert trained(1) == trained(1)
    assert trained(1) != trained(2)


def test_a_learning_rate_that_explodes_is_told_and_not_a_crash(tmp_path: Path) -> None:
    net = Net()
    y = net.gemm(net.op("Exp", net.gemm(net.input("x", "N", 6), 6, 8)), 8, 4, out="y")
    module = to_torch(ir.from_proto(net.proto(y)))
    with pytest.raises(TrainingError, match=r"the loss became (inf|nan) by step \d+; lower --lr"):
        train(module, regression(tmp_path), NeighbourhoodLoss("y"), replace(PLAN, lr=1e20), silent)


def test_a_start_that_overflows_is_told(tmp_path: Path) -> None:
    net = Net()
    net.weight("w", 6, 4)
    net.weights["w"] *= np.float32(1e30)
    y = net.op("Exp", net.op("MatMul", net.input("x", "N", 6), "w"), out="y")
    with pytest.raises(TrainingError, match="the held-out error is inf before the first step"):
        train(to_torch(ir.from_proto(net.proto(y))), regression(tmp_path), NeighbourhoodLoss("y"), PLAN, silent)


def test_moments_are_left_alone_and_nothing_else(tmp_path: Path) -> None:
    net = Net()
    y = net.norm(net.gemm(net.input("x", "N", 6), 6, 4, out="h"), 4, out="bn")
    module = to_torch(ir.from_proto(net.proto(y)))
    before = {name: array.copy() for name, array in module.trained_weights().items()}
    train(module, regression(tmp_path), NeighbourhoodLoss("y"), PLAN, silent)
    same = {name for name, array in module.trained_weights().items() if np.array_equal(array, before[name])}
    assert same == {"bn.mean", "bn.var"}


def test_a_slice_without_weights_trains_nothing(tmp_path: Path) -> None:
    net = Net()
    net.op("Relu", net.input("x", "N", 4), out="y")
    x = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    samples = SliceSamples.of(store_of(tmp_path, {"x": x, "y": np.maximum(x, 0)}), ["x"], ["y"], 0.2)
    assert train(to_torch(ir.from_proto(net.proto("y"))), samples, NeighbourhoodLoss("y"), PLAN, silent).nmse == 0


def test_bfloat16_comes_about_as_near_as_float32(tmp_path: Path) -> None:
    samples = regression(tmp_path, noise=0.5)

    def trained(bf16: bool) -> float:
        net = Net()
        y = net.gemm(net.relu(net.gemm(net.input("x", "N", 6), 6, 16)), 16, 4, out="y")
        module = to_torch(ir.from_proto(net.proto(y)))
        found = train(module, samples, NeighbourhoodLoss("y"), replace(PLAN, steps=200, bf16=bf16), silent)
        assert all(weight.dtype == torch.float32 for weight in module.parameters())
        return found.nmse

    full, half = trained(False), trained(True)
    assert full != half
    assert half == pytest.approx(full, rel=0.25)


def test_half_precision_on_disk_is_full_precision_in_training(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {n: rng.standard_normal((30, w)).astype(np.float16) for n, w in (("x", 6), ("y", 4))}
    samples = SliceSamples.of(store_of(tmp_path, values), ["x"], ["y"], 0.1)
    assert all(array.dtype == np.float32 for array in samples.arrays(0, 5).values())
    assert train(to_torch(linear(Net())), samples, NeighbourhoodLoss("y"), PLAN, silent).nmse < math.inf


def test_values_without_sample_axis_serve_every_batch(tmp_path: Path) -> None:
    """The first axis of `table` is as long as the hold-out, `scale` has none at all."""
    net = Net()
    y = net.op("Mul", net.matmul(net.input("x", "N", 100, 6), 6, 4, out="h"), net.input("scale"))
    y = net.op("Add", y, net.input("table", 100, 4), out="y")
    rng = np.random.default_rng(0)
    x, table = rng.standard_normal((200, 100, 6)).astype(np.float32), rng.standard_normal((100, 4)).astype(np.float32)
    target = (x @ rng.standard_normal((6, 4)).astype(np.float32)) * np.float32(0.5) + table
    values = {"x": x, "scale": np.array(0.5, np.float32), "table": table, "y": target}
    samples = SliceSamples.of(store_of(tmp_path, values, ["scale", "table"]), ["x", "scale", "table"], ["y"], 0.5)
    assert samples.is_constant("table") and not samples.is_constant("x")
    module = to_torch(ir.from_proto(net.proto(y)))
    found = train(module, samples, NeighbourhoodLoss("y"), replace(PLAN, steps=20), silent)
    assert found.nmse < found.nmse_start


# Rows


@given(st.integers(2, 10**6), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_some_samples_are_held_out_and_some_are_left(samples: int, part: float) -> None:
    blocks = Blocks.split(samples, part)
    assert 1 <= blocks.holdout <= samples - 1
    assert abs(blocks.holdout - part * samples) <= 1 or blocks.holdout in (1, samples - 1)


@pytest.mark.parametrize(("samples", "size"), [(40, 6), (40, 9), (40, 36), (40, 100), (2, 8)])
def test_batches_cover_every_training_row_and_never_a_held_out_one(tmp_path: Path, samples: int, size: int) -> None:
    source = regression(tmp_path, samples)
    rows = samples - source.blocks.holdout
    each = min(size, rows)
    batches = list(_batches(source, replace(PLAN, steps=5 * (rows // each), batch_size=size)))
    assert all(len(batch) == each and list(batch) == sorted(set(batch)) for batch in batches)
    epochs = [np.concatenate(batches[i : i + rows // each]) for i in range(0, len(batches), rows // each)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == rows // each * each, "no row comes twice"
        assert min(epoch) >= source.blocks.holdout and max(epoch) < samples
    if rows % each == 0 and 1 < each < rows:
        assert any(list(batches[i]) != list(batches[i + rows // each]) for i in range(rows // each)), "a new order"


def test_threads_that_share_a_batch_train_as_one_does(tmp_path: Path) -> None:
    found = []
    for threads in (1, 2, 3):
        module = to_torch(linear(Net()))
        folder = tmp_path / str(threads)
        training = train(module, regression(folder), NeighbourhoodLoss("y"), replace(PLAN, threads=threads), silent)
        found.append((training.nmse, *(w.ravel() for w in module.trained_weights().values())))
    for other in found[1:]:
        assert other[0] == pytest.approx(found[0][0], rel=1e-4)
        np.testing.assert_allclose(np.hstack(other[1:]), np.hstack(found[0][1:]), rtol=1e-4, atol=1e-5)
    assert torch.get_num_threads() == 1


def test_a_batch_is_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    samples = regression(tmp_path)
    whole = samples.arrays(0, 200)
    rows = np.array([3, 17, 150])
    batch = samples.batch(rows)
    x, y = batch["x"], batch["y"]
    assert np.array_equal(x.numpy(), whole["x"][rows]) and np.array_equal(y.numpy(), whole["y"][rows])
    assert np.array_equal(samples.training_rows(10**6)["x"], whole["x"][20:])


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["x", "y"])
def test_activations_that_are_no_numbers_are_refused_by_name(tmp_path: Path, name: str, broken: float) -> None:
    values = {n: np.ones((20, 4), np.float32) for n in ("x", "y")}
    values[name][7, 2] = broken
    with pytest.raises(TrainingError, match=f"the teacher's activation '{name}' holds NaN or Inf"):
        SliceSamples.of(store_of(tmp_path, values), ["x"], ["y"], 0.1)


def test_a_value_that_could_not_be_captured_is_refused_with_the_reason(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"x": np.ones((20, 4), np.float32)}, unstorable={"y": "its shape has no sample axis"})
    with pytest.raises(TrainingError, match="value 'y' cannot be captured: its shape has no sample axis"):
        SliceSamples.of(store, ["x"], ["y"], 0.1)


# The job


def job_of(
    folder: Path,
    net: Net,
    output: str,
    samples: int = 60,
    shape: tuple[int, ...] = (6,),
    job: str = "n02",
    **plan: float,
) -> DistilJob:
    model = infer_shapes(ir.from_proto(net.proto(output)))
    save(model, folder / "slice.onnx")
    x = np.random.default_rng(0).standard_normal((samples, *shape)).astype(np.float32)
    fixed = model.graph.inputs[0].shape
    step = fixed[0] if fixed is not None and isinstance(fixed[0], int) else samples
    target = np.concatenate([run(model, {"x": x[i : i + step]})[output] for i in range(0, samples, step)])
    store_of(folder / "store", {"x": x, output: target})
    return DistilJob(
        name=job,
        slice_path=folder / "slice.onnx",
        groups=find_groups(list(model.graph), model.graph.outputs[0]),
        inputs=("x",),
        target=output,
        stores={"x": folder / "store", output: folder / "store"},
        entry=Entry(folder / "entry"),
        method=Width(0.5),
        plan=replace(PLAN, **plan),  # type: ignore[arg-type]
        holdout=0.1,
        parity=1e-4,
        threads=1,
    )


def mlp(batch: int | str = "N") -> tuple[Net, str]:
    net = Net()
    y = net.relu(net.gemm(net.input("x", batch, 6), 6, 16, out="h"))
    return net, net.gemm(y, 16, 4, out="y")


def test_a_job_travels_and_leaves_its_student_on_disk(tmp_path: Path) -> None:
    job = pickle.loads(pickle.dumps(job_of(tmp_path, *mlp())))
    assert not job.entry.done
    result = job(silent)
    assert job.entry.done and read_result(job.entry) == result
    assert result.candidate == "width k=0.5"
    assert 0 <= result.nmse <= result.nmse_start and result.steps == 40 and result.seconds > 0
    assert (result.parameters, result.macs) == (6 * 8 + 8 + 8 * 4 + 4, 6 * 8 + 8 * 4)
    student = load_student(job.entry)
    samples = SliceSamples.of(
        ActivationStore.open(next(iter(job.stores.values()))), job.inputs, [job.target], job.holdout
    )
    held = samples.arrays(0, samples.blocks.holdout)
    answer = run(student, {"x": held["x"]})["y"].astype(np.float64)
    assert np.square(answer - held["y"]).mean() / held["y"].var(axis=0).mean() == pytest.approx(result.nmse, rel=1e-3)


def test_a_job_has_the_same_bytes_again_and_others_by_another_name(tmp_path: Path) -> None:
    job = job_of(tmp_path, *mlp())

    def student(job: DistilJob) -> bytes:
        job(silent)
        return serialise(load_student(job.entry))

    assert student(job) == student(job)
    assert student(job) != student(replace(job, plan=replace(job.plan, seed=1)))
    drawn = replace(job, method=Width(0.5, None, "random"), plan=replace(job.plan, steps=0))
    assert student(drawn) == student(drawn) != student(replace(drawn, name="n03"))


def test_a_failed_job_leaves_nothing_that_counts(tmp_path: Path) -> None:
    job = job_of(tmp_path, *mlp())
    job(silent)
    with pytest.raises(TrainingError):
        replace(job, plan=replace(job.plan, lr=1e30))(silent)
    assert not job.entry.done


def test_a_slice_with_an_unknown_operator_is_refused_before_any_training(tmp_path: Path) -> None:
    net = Net()
    y = net.op(
        "Bernoulli",
        net.op("Sigmoid", net.gemm(net.relu(net.gemm(net.input("x", "N", 6), 6, 16)), 16, 4)),
        out="y",
        dtype=1,
    )
    with pytest.raises(ConversionError, match="Bernoulli"):
        job_of(tmp_path, net, y)(silent)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_slice_exported_for_a_fixed_batch_trains_on_any(tmp_path: Path, batch: int) -> None:
    (tmp_path / "free").mkdir()
    fixed, free = job_of(tmp_path, *mlp(batch)), job_of(tmp_path / "free", *mlp())
    assert fixed(silent).nmse == pytest.approx(free(silent).nmse, rel=1e-4)
    x = np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32)
    one, other = (run(load_student(job.entry), {"x": x})["y"] for job in (fixed, free))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("later_weights", [False, True])
def test_a_slice_whose_numbers_hold_its_batch_is_trained_at_that_batch(tmp_path: Path, later_weights: bool) -> None:
    net = Net()
    y = net.relu(net.matmul(net.input("x", 1, 2, 6), 6, 16, out="h"))
    if later_weights:
        y = net.matmul(net.op("Reshape", y, net.ints(1, 32)), 32, 4, out="y")
    else:
        y = net.op("Reshape", net.matmul(y, 16, 4, out="o"), net.ints(1, 2, -1), out="y")
    job = job_of(tmp_path, net, y, shape=(2, 6))
    result = job(silent)
    student = load_student(job.entry)
    x = np.random.default_rng(1).standard_normal((1, 2, 6)).astype(np.float32)
    assert run(student, {"x": x})["y"].shape == ((1, 4) if later_weights else (1, 2, 4))
    assert result.nmse < result.nmse_start < 1
