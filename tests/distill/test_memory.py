"""Bounded memory: steps and workers fit what they are given, and what is trained hardly depends on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndonnx.config.recipe import Recipe
from ndonnx.convert import to_torch
from ndonnx.distill import steps
from ndonnx.distill.formats import Format
from ndonnx.distill.losses import NeighbourhoodLoss
from ndonnx.distill.memory import MemoryPlan
from ndonnx.distill.plan import Plan
from ndonnx.distill.samples import SliceSamples
from ndonnx.distill.steps import THREAD_BYTES, positions_of, samples_in_memory, with_fitting_batch
from ndonnx.distill.trainer import train
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.partition import partition
from ndonnx.runtime.machine import memory_bytes
from ndonnx.teacher import ActivationStore
from tests.helpers.models import Net, inputs_of, residual_cnn, run, transformer

PLAN = Plan(steps=30, batch_size=16, lr=0.1, warmup=0.05, seed=0)


def model_of(net: Net, output: str) -> ir.Model:
    return infer_shapes(ir.from_proto(net.proto(output)))


def images() -> ir.Model:
    """A 3x3 convolution on 20x30 and a strided one: 600 and 150 positions."""
    net = Net(0)
    y = net.relu(net.conv(net.input("x", "N", 3, 20, 30), 3, 8, out="a"))
    weight, bias = net.weight("b.weight", 4, 8, 3, 3), net.weight("b.bias", 4)
    return model_of(net, net.op("Conv", y, weight, bias, out="b", strides=[2, 2], pads=[1, 1, 1, 1]))


def samples_of(model: ir.Model, folder: Path, count: int = 40) -> SliceSamples:
    values = inputs_of(ir.to_proto(model), count)
    values |= run(model, values, [model.graph.outputs[0].name or ""])
    writer = ActivationStore.create(folder, {name: (a.dtype, a.shape[1:]) for name, a in values.items()}, count)
    for name, array in values.items():
        writer.append(name, array)
    return SliceSamples.of(writer.finish(), ["x"], [model.graph.outputs[0].name or ""], 0.1)


# Steps


def test_positions_are_those_of_the_operator_that_is_applied_most_often() -> None:
    model = images()
    assert positions_of(model, inputs_of(ir.to_proto(model), 5)) == 600
    net = Net(0)
    sequence = model_of(net, net.matmul(net.relu(net.matmul(net.input("x", "N", "T", 6), 6, 9)), 9, 4))
    assert positions_of(sequence, {"x": np.zeros((3, 48, 6), np.float32)}) == 48
    assert positions_of(sequence, {"x": np.zeros((3, 7, 6), np.float32)}) == 7
    net = Net(0)
    plain = model_of(net, net.op("Tanh", net.input("x", "N", 6)))
    assert positions_of(plain, {"x": np.zeros((3, 6), np.float32)}) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 400))
def test_batches_shrink_where_samples_have_many_positions_but_not_below_a_few(batch: int, side: int) -> None:
    net = Net(0)
    model = model_of(net, net.conv(net.input("x", "N", 1, "H", 8), 1, 1, 1))
    found = with_fitting_batch(replace(PLAN, batch_size=batch), model, {"x": np.zeros((2, 1, side, 8), np.float32)})
    positions = side * 8
    assert found == replace(PLAN, batch_size=found.batch_size)
    assert min(batch, 16) <= found.batch_size <= batch
    assert found.batch_size * positions <= steps.MOST_POSITIONS or found.batch_size == min(batch, 16)
    if batch * positions <= steps.MOST_POSITIONS:
        assert found.batch_size == batch


def test_what_a_step_keeps_is_weighed_in_the_types_of_the_training(tmp_path: Path) -> None:
    model = images()
    samples, module, loss = samples_of(model, tmp_path), to_torch(model), NeighbourhoodLoss("b")
    own = samples.bytes_per_sample()
    x, a, b = 3 * 600 * 4, 8 * 600 * 4, 4 * 150 * 4
    at_once = samples_in_memory(module, samples, loss, PLAN, 1, Format())
    # The convolutions keep their inputs, the ReLU its answer, which is one of these; the loss both its operands.
    assert at_once == pytest.approx(THREAD_BYTES / (own + 1.5 * (x + a + 2 * b)), rel=0.1)
    halves = samples_in_memory(module, samples, loss, PLAN, 1, Format(bf16=True))
    assert halves > at_once
    assert samples_in_memory(module, samples, loss, replace(PLAN, memory=THREAD_BYTES), 2, Format()) == at_once // 2
    assert samples_in_memory(module, samples, loss, replace(PLAN, memory=1), 2, Format()) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_batch_in_parts_trains_as_the_whole_does(threads: int, tmp_path: Path) -> None:
    model = images()
    samples = samples_of(model, tmp_path)
    ended = []
    for memory in (None, 1, 400_000):
        module = to_torch(model)
        with torch.no_grad():
            module.weights[0].mul_(0.7)
        plan = replace(PLAN, memory=memory)
        training = train(module, samples, NeighbourhoodLoss("b"), replace(plan, threads=threads), lambda *told: None)
        assert training.nmse < training.nmse_start
        ended.append(training)
    for other in ended[1:]:
        assert other.nmse_start == pytest.approx(ended[0].nmse_start, rel=1e-4)
        assert other.nmse == pytest.approx(ended[0].nmse, rel=0.05)


def test_plans_have_the_key_of_older_ones_where_memory_is_no_matter() -> None:
    assert "memory" not in PLAN.key()
    assert replace(PLAN, memory=1).key()["memory"] == 1


# Workers

PARTS = [partition(infer_shapes(ir.from_proto(model))) for model in (residual_cnn(), transformer())]


@given(st.sampled_from(PARTS), st.integers(10**8, 10**11), st.integers(1, 64), st.integers(1, 64))
def test_workers_fit_the_budget_or_there_is_one(parts: object, budget: int, cores: int, wanted: int) -> None:
    plan = MemoryPlan.of(Recipe(memory_budget=budget), parts, cores)  # type: ignore[arg-type]
    workers = plan.workers(wanted)
    assert 1 <= workers <= wanted
    threads = max(1, cores // workers)
    step = plan.step(workers)
    held = THREAD_BYTES * threads if step is None else step
    assert held <= THREAD_BYTES * threads
    if workers > 1 or plan.least <= budget:
        assert plan.main + workers * (plan.slice + held) <= budget
    more = MemoryPlan.of(Recipe(memory_budget=2 * budget), parts, cores)  # type: ignore[arg-type]
    assert more.workers(wanted) >= workers
    whole = plan.whole_step()
    assert plan.least > budget or plan.main + plan.whole + (THREAD_BYTES * cores if whole is None else whole) <= budget


def test_the_budget_is_a_quarter_of_the_machine_where_none_is_given() -> None:
    assert MemoryPlan.of(Recipe(), PARTS[0], 2).budget == memory_bytes() // 4
    assert Recipe(memory_budget="3GB").memory_budget == 3 * 10**9
