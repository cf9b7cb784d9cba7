"""Least squares: rows are what operators compute with, moments and solutions are numpy's, and bounds hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndonnx.errors import ShrinkError
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.students.least_squares import (
    Accumulator,
    FeatureEnergies,
    Regression,
    cholesky,
    moments,
    output_rows,
    rows,
    rows_of,
    solve,
    solve_masked,
)
from tests.helpers.models import Array, Net, run


def strided(net: Net) -> str:
    """A convolution whose strides, dilations and paddings differ between its axes."""
    weight, bias = net.weight("weight", 3, 5, 3, 2), net.weight("bias", 3)
    attributes = {"strides": [2, 1], "dilations": [1, 2], "pads": [0, 2, 1, 1]}
    return net.op("Conv", net.input("x", "N", 5, 7, 8), weight, bias, out="y", **attributes)


def same_padded(net: Net) -> str:
    """Padding that follows from the size, and no offset."""
    return net.op(
        "Conv", net.input("x", "N", 6, 6, 5), net.weight("weight", 3, 6, 2, 2), out="y", auto_pad="SAME_UPPER"
    )


def grouped(net: Net) -> str:
    x = net.input("x", "N", 6, 5, 5)
    return net.op("Conv", x, net.weight("weight", 4, 3, 3, 3), net.weight("bias", 4), out="y", group=2)


def along_a_line(net: Net) -> str:
    x = net.input("x", "N", 6, 11)
    return net.op("Conv", x, net.weight("weight", 4, 6, 3), net.weight("bias", 4), out="y", strides=[2], pads=[1, 0])


def dense(net: Net) -> str:
    return net.op("Gemm", net.input("x", "N", 9), net.weight("weight", 3, 9), net.weight("bias", 3), out="y", transB=1)


def over_a_sequence(net: Net) -> str:
    return net.op("MatMul", net.input("x", "N", 4, 6), net.weight("weight", 6, 7), out="y")


NETS: dict[str, Callable[[Net], str]] = {
    f.__name__: f for f in (strided, same_padded, grouped, along_a_line, dense, over_a_sequence)
}


class Operator:
    """One linear operator, what it reads and what it gives."""

    def __init__(self, name: str, samples: int, seed: int = 0) -> None:
        net = Net(seed)
        proto: onnx.ModelProto = net.proto(NETS[name](net))
        self.model = infer_shapes(ir.from_proto(proto))
        self.node = next(iter(self.model.graph))
        shape = self.model.graph.inputs[0].shape
        assert shape is not None
        self.x = (net.rng.standard_normal((samples, *(int(d) for d in list(shape)[1:]))) + 3).astype(np.float32)
        self.y: Array = run(proto, {"x": self.x})["y"]
        self.weight = numbers(self.model, "weight")
        self.bias = numbers(self.model, "bias") if "bias" in self.model.graph.initializers else None
        self.kernel = self.weight.shape[2:]
        self.groups = self.node.attributes["group"].as_int() if "group" in self.node.attributes else 1

    def matrices(self) -> Array:
        """The weight as (groups, features, outputs), written out once more."""
        if self.node.op_type == "Conv":
            return self.weight.reshape(self.groups, len(self.weight) // self.groups, -1).transpose(0, 2, 1)
        return (self.weight.T if self.node.op_type == "Gemm" else self.weight)[None]

    def all_rows(self) -> tuple[Array, Array]:
        """Every row of features and of outputs."""
        last = np.moveaxis(self.y, 1, -1) if self.node.op_type == "Conv" else self.y
        index = np.arange(last.size // last.shape[-1])
        return rows_of(self.node, self.x, self.kernel, index).numpy(), output_rows(self.node, self.y, index).numpy()

    def problem(self, batch: int = 1000, *, y: bool = True) -> Regression:
        """Its regression, fed in batches."""
        problem = Regression(self.node, len(self.x))
        for start in range(0, len(self.x), batch):
            samples = range(start, min(start + batch, len(self.x)))
            part = slice(samples.start, samples.stop)
            problem.add(samples, self.x[part], self.y[part] if y else None)
        return problem


def numbers(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


# Rows


@pytest.mark.parametrize("name", NETS)
def test_the_weights_turn_rows_of_features_into_rows_of_outputs(name: str) -> None:
    operator = Operator(name, 5)
    x, y = operator.all_rows()
    assert sorted(y.ravel()) == sorted(operator.y.ravel())
    by_group = x.reshape(len(x), operator.groups, -1).transpose(1, 0, 2)
    found = (by_group @ operator.matrices()).transpose(1, 0, 2).reshape(len(x), -1)
    np.testing.assert_allclose(found + (0 if operator.bias is None else operator.bias), y, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(NETS)), st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))
def test_rows_are_bounded_and_every_sample_has_its_share(name: str, samples: int, batch: int, most: int) -> None:
    operator = Operator(name, samples)
    taken = np.zeros(samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_LEAST_ROWS", most)
        patch.setattr(rows, "_ROWS_PER_UNKNOWN", 0)
        sampler = rows.RowSampler(operator.node, samples)
        last = np.moveaxis(operator.y, 1, -1) if operator.node.op_type == "Conv" else operator.y
        each = last[0].size // last.shape[-1]
        for start in range(0, samples, batch):
            part = operator.x[start : start + batch]
            index = sampler.index(len(part), part)
            assert (np.diff(index) >= 0).all()
            np.add.at(taken, start + index // each, 1)
    batches = -(-samples // batch)
    assert min(most, samples * each) <= taken.sum() <= min(most + batches, samples * each)
    if most >= 2 * samples and each > 1:
        assert taken.min() >= min(each, most // samples - 1)


def test_with_many_positions_the_rows_needed_depend_on_the_width_alone() -> None:
    few, many = (Operator("strided", samples).problem().rows for samples in (1000, 4000))
    assert few == many == rows.rows_needed(30)
    assert rows.rows_needed(10_000) >= 20 * 10_000


# Moments


@pytest.mark.parametrize(("chunk", "precise"), [(1, 256), (500, 0), (2**24, 0), (2**24, 256)])
@pytest.mark.parametrize("name", NETS)
def test_moments_are_those_of_the_rows(name: str, chunk: int, precise: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_CHUNK_NUMBERS", chunk)
    monkeypatch.setattr(moments, "_PRECISE_FEATURES", precise)
    operator = Operator(name, 60)
    found = operator.problem(batch=25).moments()
    zero = found.about_zero()
    x, y = (rows.astype(np.float64) for rows in operator.all_rows())
    assert found.rows == len(x)
    assert found.energy == pytest.approx(((y - y.mean(0)) ** 2).sum(axis=1).mean(), rel=1e-4)
    assert zero.energy == pytest.approx((y**2).sum(axis=1).mean(), rel=1e-4)
    for group in range(operator.groups):
        xg, yg = (np.split(rows, operator.groups, axis=1)[group] for rows in (x, y))
        centred = xg - xg.mean(0)
        np.testing.assert_allclose(found.mean_x[group], xg.mean(0), atol=1e-5)
        np.testing.assert_allclose(found.mean_y[group], yg.mean(0), atol=1e-4)
        np.testing.assert_allclose(found.square[group], centred.T @ centred / len(x), atol=1e-4)
        np.testing.assert_allclose(found.cross[group], centred.T @ (yg - yg.mean(0)) / len(x), atol=1e-3)
        np.testing.assert_allclose(zero.square[group], xg.T @ xg / len(x), atol=1e-3)
        np.testing.assert_allclose(zero.cross[group], xg.T @ yg / len(x), atol=1e-2)
        np.testing.assert_allclose(found.square[group], found.square[group].T)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6))
def test_moments_of_two_parts_merge_into_those_of_both(one: int, other: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = (torch.from_numpy(rng.standard_normal((one + other, size)).astype(np.float32)) + 5 for size in (4, 3))

    def of(rows: slice) -> moments.Moments:
        accumulator = Accumulator()
        accumulator.add(x[rows], y[rows])
        return accumulator.moments()

    whole, merged = of(slice(None)), of(slice(None, one)).merged(of(slice(one, None)))
    assert merged.rows == whole.rows
    assert merged.energy == pytest.approx(whole.energy, abs=1e-6)
    for field in ("mean_x", "mean_y", "square", "cross"):
        np.testing.assert_allclose(getattr(merged, field), getattr(whole, field), atol=1e-6)
    weights = torch.from_numpy(rng.standard_normal((1, 4, 3)))
    offset = torch.from_numpy(rng.standard_normal((1, 3)))
    left = (x.double() @ weights[0] + offset[0] - y.double()).square().sum(dim=1).mean()
    assert whole.error(weights, offset) == pytest.approx(float(left), abs=1e-5)


def test_energies_are_the_diagonal_of_the_moments() -> None:
    for name in NETS:
        operator = Operator(name, 40)
        energies = FeatureEnergies(operator.node, 40)
        energies.add(range(40), operator.x)
        square = operator.problem().moments().about_zero().square
        np.testing.assert_allclose(energies.energies(), square.diagonal(dim1=1, dim2=2).flatten(), rtol=1e-4)


def test_a_large_mean_does_not_drown_what_varies_about_it() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5000, 300)).astype(np.float32)
    found = []
    for offset in (0, 4000):
        accumulator = Accumulator()
        accumulator.add(torch.from_numpy(x + np.float32(offset)))
        found.append(accumulator.moments().square[0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-2)


# Solutions


@pytest.mark.parametrize("name", NETS)
def test_the_solution_is_the_operator_where_it_explains_everything(name: str) -> None:
    operator = Operator(name, 200)
    weights, offset = operator.problem(batch=77).solve(offset=operator.bias is not None)
    np.testing.assert_allclose(weights, operator.matrices(), atol=1e-3)
    expected = np.zeros(offset.shape) if operator.bias is None else operator.bias.reshape(offset.shape)
    np.testing.assert_allclose(offset, expected, atol=5e-3)


@pytest.mark.parametrize("samples", [1, 2, 12, 20])
def test_scarce_rows_choose_a_ridge_that_does_well_on_others(samples: int) -> None:
    rng = np.random.default_rng(samples)
    operator = Operator("dense", samples)
    noise = rng.standard_normal(operator.y.shape).astype(np.float32)
    operator.y = operator.y + noise * 2
    weights, offset = operator.problem().solve(offset=True)
    fresh = Operator("dense", 2000).x
    error = fresh @ weights[0].numpy() + offset[0].numpy() - (fresh @ operator.matrices()[0] + operator.bias)
    assert np.isfinite(error).all()
    assert np.square(error).mean() < 100 * np.square(noise).mean()


@pytest.mark.parametrize("size", [3, 40, 192])
def test_systems_that_rounding_made_indefinite_are_solved_all_the_same(size: int) -> None:
    """Several at once, and on two threads: there, pivoting fails on some processors from a size of 160 on."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, size // 2, size))
    square = torch.from_numpy(x.transpose(0, 2, 1) @ x)
    square[1] -= 1e-9 * torch.eye(size, dtype=torch.float64)
    square[2] = 0
    cross = square @ torch.from_numpy(rng.standard_normal((4, size, 2)))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = solve(square, cross, 0.0)
    finally:
        torch.set_num_threads(before)
    assert found.isfinite().all()
    np.testing.assert_allclose((square @ found)[[0, 1, 3]], cross[[0, 1, 3]], atol=1e-3)


def test_a_system_that_is_definite_gets_no_ridge_beside_one_that_is_not() -> None:
    good, bad = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64)), -torch.eye(2, dtype=torch.float64)
    factors = cholesky(torch.stack([good, bad]))
    assert torch.equal(factors[0], torch.linalg.cholesky(good))


def test_no_numbers_are_this_slices_fault() -> None:
    with pytest.raises(ShrinkError, match="NaN or Inf"):
        cholesky(torch.full((2, 2), torch.nan, dtype=torch.float64))
    for width in (8, 300):
        accumulator = Accumulator()
        accumulator.add(torch.full((4, width), 1e25) * torch.tensor([1.0, -1.0, 2.0, 0.0])[:, None])
        with pytest.raises(ShrinkError, match="overflow when they are squared"):
            accumulator.moments()


def test_the_remaining_weights_solve_their_least_squares_problem() -> None:
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((80, 9)) @ rng.standard_normal((9, 9)), rng.random((9, 5)) < 0.5
    y = rng.standard_normal((80, 5))
    found = solve_masked(*(torch.from_numpy(a) for a in (x.T @ x, x.T @ y, mask))).numpy()
    for column in range(5):
        kept = mask[:, column]
        expected = np.linalg.lstsq(x[:, kept], y[:, column], rcond=None)[0]
        np.testing.assert_allclose(found[kept, column], expected, rtol=1e-5, atol=1e-8)
        assert (found[~kept, column] == 0).all()
