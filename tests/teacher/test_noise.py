"""Without data: pictures have the spectrum that was asked for, noise at a neighbourhood the moments that it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto

from ndonnx.config.recipe import DataRecipe
from ndonnx.data import InputSpec, open_source
from ndonnx.data.source import RowSource
from ndonnx.data.sources.textures import Painter, expose, soften
from ndonnx.errors import SliceError
from ndonnx.graph import fold_constants
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.partition import Partition, partition
from ndonnx.teacher import make_session
from ndonnx.teacher.balance import balanced, choose
from ndonnx.teacher.moments import batchnorm_moments, entry_noise, noise_kind
from ndonnx.teacher.noise import ChannelMoments, noise_store
from ndonnx.teacher.rectified import rectified_moments, rectified_parameters
from tests.helpers.models import Net, residual_cnn


def numbers(painter: Painter, count: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((count, painter.normals), dtype=np.float32)
    return normal, rng.random((count, painter.uniforms), dtype=np.float32)


# Pictures


@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 20)])
@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_the_spectrum_falls_as_asked(slope: float, height: int, width: int) -> None:
    painter = Painter(2, height, width, slopes=(slope, slope))
    pictures = painter.paint(*numbers(painter, 300)).astype(np.float64)
    power = np.square(np.abs(np.fft.fft2(pictures))).mean(axis=(0, 1))
    rows, columns = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    frequency = np.hypot(rows, columns)
    seen = frequency > 0
    fitted, _ = np.polyfit(np.log(frequency[seen]), np.log(power[seen]), 1)
    assert fitted == pytest.approx(-2 * slope, abs=0.06)  # power is the square of the amplitude
    # The columns at the edge of the half spectrum, which are their own conjugates, have their share.
    flat = np.where(seen, power * frequency ** (2 * slope), np.nan)
    by_column = np.nanmean(flat, axis=0)
    assert by_column.max() / by_column.min() < 1.3


@pytest.mark.parametrize("painter", [Painter(3, 32, 32), Painter.of_leaves(3, 32, 32), Painter.of_leaves(1, 9, 40)])
def test_pictures_have_mean_0_and_deviation_1_but_differ_in_brightness_and_contrast(painter: Painter) -> None:
    pictures = painter.paint(*numbers(painter, 800))
    assert pictures.shape == (800, painter.channels, painter.height, painter.width)
    assert abs(pictures.mean()) < 0.08 and pictures.std() == pytest.approx(1, abs=0.04)
    assert pictures.mean(axis=(1, 2, 3)).std() == pytest.approx(0.5, abs=0.08)
    inside = pictures.std(axis=(2, 3)).mean(axis=1)
    assert np.percentile(inside, 90) > 1.8 * np.percentile(inside, 10)


def test_channels_vary_together_but_are_not_the_same() -> None:
    painter = Painter.of_leaves(3, 32, 32)
    pictures = painter.paint(*numbers(painter, 300))
    flat = (pictures - pictures.mean(axis=(2, 3), keepdims=True)).transpose(1, 0, 2, 3).reshape(3, -1)
    together = np.corrcoef(flat)[np.triu_indices(3, 1)]
    assert (together > 0.6).all() and (together < 0.98).all()


def test_leaves_have_edges_that_noise_of_the_same_spectrum_has_not() -> None:
    painter, plain = Painter.of_leaves(1, 32, 32), Painter(1, 32, 32)

    def heavy_tails(pictures: NDArray[np.float32]) -> float:
        steps = np.diff(pictures, axis=3)
        steps = steps / steps.std(axis=(1, 2, 3), keepdims=True)
        return float(np.mean(steps**4))

    noise, leaves = (heavy_tails(own.paint(*numbers(own, 300))) for own in (plain, painter))
    assert noise < 3.5 and leaves > 6  # 3 for a normal distribution


@settings(max_examples=15)
@given(
    channels=st.integers(1, 4), height=st.integers(1, 40), width=st.integers(1, 40), leaves=st.booleans(),
    split=st.integers(1, 6),
)  # fmt: skip
def test_a_picture_is_the_same_in_any_batch(channels: int, height: int, width: int, leaves: bool, split: int) -> None:
    painter = (Painter.of_leaves if leaves else Painter)(channels, height, width)
    normal, uniform = numbers(painter, 7)
    whole = painter.paint(normal, uniform)
    assert np.isfinite(whole).all()
    parts = [painter.paint(normal[i : i + split], uniform[i : i + split]) for i in range(0, 7, split)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_large_picture_is_as_its_part() -> None:
    painter = Painter.of_leaves(1, 200, 200)  # more pixels than are worked on at a time
    normal, uniform = numbers(painter, 3)
    np.testing.assert_array_equal(painter.paint(normal, uniform)[2], painter.paint(normal[2:], uniform[2:])[0])


def test_softening_is_a_weighted_mean_with_repeated_edges() -> None:
    picture = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3) ** 2
    row = np.array([[0, 1, 4], [9, 16, 25]], np.float32)
    down = 0.75 * row + 0.25 * row[::-1]
    wide = np.pad(down, ((0, 0), (1, 1)), mode="edge")
    wanted = 0.5 * down + 0.25 * (wide[:, :-2] + wide[:, 2:])
    np.testing.assert_allclose(soften(picture, np.array([0.25], np.float32))[0, 0], wanted, rtol=1e-6)


def test_a_picture_without_anything_in_it_stays_finite() -> None:
    assert np.isfinite(expose(np.full((1, 2, 3, 3), 7, np.float32), np.zeros((1, 4), np.float32))).all()


# Rectified normals


def test_rectified_moments_are_those_of_samples() -> None:
    drawn = np.random.default_rng(0).standard_normal(400_000)
    for mean, std in ((0.0, 1.0), (-1.5, 0.7), (2.0, 0.5), (-0.3, 3.0)):
        found = rectified_moments([mean], [std])
        sample = np.maximum(mean + std * drawn, 0)
        np.testing.assert_allclose([found[0][0], found[1][0]], [sample.mean(), sample.std()], rtol=0.02, atol=1e-3)


def test_constants_through_a_relu() -> None:
    mean, std = rectified_moments([-1.0, 0.0, 2.0], [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(mean, [0, 0, 2])
    np.testing.assert_array_equal(std, [0, 0, 0])
    mu, sigma = rectified_parameters([0.0, 2.0], [0.0, 0.0])
    np.testing.assert_array_equal(np.maximum(mu, 0), [0, 2])
    np.testing.assert_array_equal(sigma, [0, 0])


@given(mean=st.floats(-4, 50), std=st.floats(0.01, 10))
def test_a_normal_is_found_for_every_rectified_moment(mean: float, std: float) -> None:
    wanted = rectified_moments([max(mean, -4 * std)], [std])
    again = rectified_moments(*rectified_parameters(*wanted))
    np.testing.assert_allclose(again, wanted, rtol=2e-3)


# Noise at a neighbourhood


def parts_of(proto: onnx.ModelProto) -> Partition:
    return partition(fold_constants(infer_shapes(ir.from_proto(proto))))


def units() -> Partition:
    return parts_of(residual_cnn(3))


def test_targets_are_what_onnxruntime_answers_to_the_stored_inputs(tmp_path: Path) -> None:
    parts = units()
    neighbourhood = parts.distillable[-1]
    slice_ = parts.slice_of(neighbourhood)
    assert neighbourhood.entry is not None and neighbourhood.exit is not None
    entry, exit_ = neighbourhood.entry.name or "", neighbourhood.exit.name or ""
    store = noise_store(slice_, tmp_path / "s", 150, seed=3, kind="rectified", threads=1)
    assert set(store.names) == {entry, exit_} and store.samples == 150
    inputs = store.array(entry)
    assert inputs.dtype == np.float16 and inputs.min() == 0 and 0.4 < np.mean(inputs == 0) < 0.6
    (answer,) = make_session(slice_, threads=1).run([exit_], {entry: inputs.astype(np.float32)})
    np.testing.assert_allclose(store.array(exit_).astype(np.float32), answer, rtol=1e-3, atol=1e-4)
    assert [value.name for value in slice_.graph.inputs] == [entry]  # the slice itself is left alone


def test_noise_depends_on_the_seed_alone(tmp_path: Path) -> None:
    parts = units()
    slice_ = parts.slice_of(parts.distillable[0])
    name = slice_.graph.inputs[0].name or ""
    one, again, other, longer = (
        np.array(noise_store(slice_, tmp_path / f"{place}", count, seed, threads=threads).array(name))
        for place, (count, seed, threads) in enumerate(((70, 1, 1), (70, 1, 2), (70, 2, 1), (130, 1, 1)))
    )
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one, longer[:70])
    assert not np.array_equal(one, other)
    assert abs(one.astype(np.float64).mean()) < 0.02 and one.astype(np.float64).std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["white", "rectified"])
def test_noise_has_the_moments_that_are_given(tmp_path: Path, kind: str) -> None:
    parts = units()
    slice_ = parts.slice_of(parts.distillable[0])
    mean = np.array([0.1, 1, 2, 0.5, 0, 3, 0.2, 1], np.float32)
    std = np.array([0.3, 1, 0.5, 1, 0, 1, 0.1, 2], np.float32)
    moments = ChannelMoments(mean, std)
    store = noise_store(slice_, tmp_path, 512, 0, "rectified" if kind == "rectified" else "white", moments, threads=1)
    found = store.array(slice_.graph.inputs[0].name or "").astype(np.float64)
    np.testing.assert_allclose(found.mean(axis=(0, 2, 3)), mean, atol=0.05)
    np.testing.assert_allclose(found.std(axis=(0, 2, 3)), std, rtol=0.04, atol=1e-3)


def test_a_fixed_batch_size_and_float64(tmp_path: Path) -> None:
    net = Net()
    x = net.input("x", 4, 6, dtype=TensorProto.DOUBLE)
    net.constant("w", net.rng.standard_normal((6, 5)))
    model = ir.from_proto(net.proto(net.op("Relu", net.op("MatMul", x, "w"), out="y")))
    store = noise_store(model, tmp_path, 10, 0, threads=1)
    assert store.array("x").dtype == np.float64 and store.samples == 10
    weight = net.weights["w"]
    np.testing.assert_allclose(store.array("y"), np.maximum(store.array("x") @ weight, 0), rtol=1e-6)


def test_outputs_beyond_half_precision_are_kept_whole(tmp_path: Path) -> None:
    net = Net()
    x = net.input("x", "N", 6)
    net.constant("big", np.array(1e6, np.float32))
    store = noise_store(ir.from_proto(net.proto(net.op("Mul", x, "big", out="y"))), tmp_path, 8, 0, threads=1)
    assert store.array("y").dtype == np.float32 and not store.nonfinite
    np.testing.assert_allclose(store.array("y"), store.array("x").astype(np.float32) * 1e6, rtol=1e-6)


def test_what_noise_cannot_stand_for_is_told(tmp_path: Path) -> None:
    masked, ids, open_ = Net(), Net(), Net()
    both = masked.op("Add", masked.input("x", "N", 4), masked.input("mask", "N", 4))
    tokens = ids.op("Cast", ids.input("ids", "N", 4, dtype=TensorProto.INT64), to=1)
    sizes = open_.relu(open_.input("x", "N", 3, "H", "W"))
    wide = Net()
    for net, output, words in (
        (masked, both, "reads 'mask' beside its input 'x'"),
        (ids, tokens, "'ids' is INT64"),
        (open_, sizes, "'x': dimension 2 (H) is open"),
        (wide, wide.relu(wide.input("x", "N", 2**40)), "1,099,511,627,776 values"),
    ):
        with pytest.raises(SliceError) as caught:
            noise_store(ir.from_proto(net.proto(output)), tmp_path, 4, 0)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SliceError, match="3 moments given for 4 channels"):
        model = ir.from_proto(_scaled().proto("y"))
        noise_store(model, tmp_path, 4, 0, moments=ChannelMoments(np.zeros(3, np.float32), np.ones(3, np.float32)))


def _scaled() -> Net:
    net = Net()
    net.relu(net.input("x", "N", 4), out="y")
    return net


# Balance


def test_few_of_each_class_are_chosen_first() -> None:
    classes = np.array([2, 2, 0, 2, 1, 2, 0, 2, 2])
    np.testing.assert_array_equal(choose(classes, 3), [0, 2, 4])
    np.testing.assert_array_equal(choose(classes, 5), [0, 1, 2, 4, 6])
    np.testing.assert_array_equal(choose(classes, 8), [0, 1, 2, 3, 4, 5, 6, 7])


@given(classes=st.lists(st.integers(0, 5), min_size=1, max_size=60), samples=st.integers(1, 60))
def test_no_class_has_two_more_than_one_that_could_have_more(classes: list[int], samples: int) -> None:
    labels = np.array(classes)
    chosen = choose(labels, samples)
    assert len(set(chosen.tolist())) == len(chosen) == min(samples, len(labels))
    assert (np.diff(chosen) > 0).all()
    taken, there = np.bincount(labels[chosen], minlength=6), np.bincount(labels, minlength=6)
    assert taken.max() - min((n for n, all_ in zip(taken, there, strict=True) if n < all_), default=taken.max()) <= 1


@pytest.mark.parametrize("batch", ["N", 24])
def test_made_up_samples_are_balanced_by_the_teacher(batch: int | str) -> None:
    net = Net()
    net.constant("w", np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32))
    net.constant("b", np.array([1.5, 0, 0], np.float32))  # class 0 is what most samples look like
    model = ir.from_proto(net.proto(net.op("Add", net.op("MatMul", net.input("x", batch, 3), "w"), "b", out="y")))
    spec = InputSpec("x", np.dtype(np.float32), (batch, 3))
    source = open_source("gaussian:1000", [spec], DataRecipe(), seed=1)
    assert isinstance(source, RowSource)
    chosen = balanced(source, model, 90, threads=1)
    (given,) = (part.inputs["x"] for part in chosen.batches(90))
    seen = np.argmax(given + net.weights["b"], axis=1)
    np.testing.assert_array_equal(np.bincount(seen), [30, 30, 30])
    whole = next(iter(source.batches(1000))).inputs["x"]
    assert {row.tobytes() for row in given} <= {row.tobytes() for row in whole}
    other = balanced(source, model, 60, threads=1)
    assert len({source.fingerprint(), chosen.fingerprint(), other.fingerprint()}) == 3


def test_where_there_is_nothing_to_balance_the_source_stays() -> None:
    spec = InputSpec("x", np.dtype(np.float32), ("N", 4))
    source = open_source("gaussian:20", [spec], DataRecipe())
    net = Net()
    pooled = ir.from_proto(
        net.proto(net.op("ReduceMean", net.input("x", "N", 4), keepdims=1, out="y", axes=[1]), opset=17)
    )
    assert isinstance(source, RowSource)
    assert balanced(source, pooled, 5, threads=1) is source
    assert balanced(source, ir.from_proto(_scaled().proto("y")), 20, threads=1) is source


# Moments


def test_moments_are_carried_from_slice_to_slice(tmp_path: Path) -> None:
    parts = units()
    found = entry_noise(parts, samples=256, seed=5, threads=1)
    assert list(found) == [n.name for n in parts.distillable]
    for before, after in zip(parts.distillable, parts.distillable[1:], strict=False):
        assert before.exit is after.entry and before.exit is not None
        noise, wanted = found[before.name], found[after.name].moments
        assert noise.kind == found[after.name].kind == "rectified" and wanted is not None
        slice_ = parts.slice_of(before)
        store = noise_store(slice_, tmp_path / before.name, 256, 11, noise.kind, noise.moments, threads=1)
        answer = store.array(before.exit.name or "").astype(np.float64)
        np.testing.assert_allclose(wanted.mean, answer.mean(axis=(0, 2, 3)), rtol=0.05, atol=0.02)
        np.testing.assert_allclose(wanted.std, answer.std(axis=(0, 2, 3)), rtol=0.05, atol=0.02)


def test_the_first_moments_are_those_behind_a_standard_normal_input() -> None:
    parts = units()
    first = entry_noise(parts, samples=512, threads=1)[parts.distillable[0].name].moments
    assert first is not None
    drawn = np.random.default_rng(9).standard_normal((512, 3, 8, 8), dtype=np.float32)
    probe = parts.model.clone()
    value = ir.convenience.create_value_mapping(probe.graph)["unit0"]
    probe.graph.outputs.append(value)
    (stem,) = make_session(probe, threads=1).run(["unit0"], {"x": drawn})
    np.testing.assert_allclose(first.mean, stem.mean(axis=(0, 2, 3)), rtol=0.03, atol=0.005)
    np.testing.assert_allclose(first.std, stem.std(axis=(0, 2, 3)), rtol=0.03, atol=0.02)


def test_a_batch_normalization_tells_the_moments_behind_it() -> None:
    net = Net()
    x = net.norm(net.conv(net.input("x", "N", 3, 8, 8), 3, 4), 4, out="normed")
    net.relu(x, out="on")
    graph = ir.from_proto(net.proto("on")).graph
    values = ir.convenience.create_value_mapping(graph)
    plain, rectified = batchnorm_moments(values["normed"]), batchnorm_moments(values["on"])
    assert plain is not None and rectified is not None and batchnorm_moments(values["x"]) is None
    np.testing.assert_array_equal(plain.mean, net.weights["normed.bias"])
    np.testing.assert_array_equal(plain.std, net.weights["normed.scale"])
    wanted = rectified_moments(net.weights["normed.bias"], net.weights["normed.scale"])
    np.testing.assert_allclose([rectified.mean, rectified.std], wanted, rtol=1e-6)
    assert (noise_kind(values["normed"]), noise_kind(values["on"])) == ("white", "rectified")


def test_without_carrying_only_batch_normalizations_tell() -> None:
    parts = units()
    found = entry_noise(parts, carry=False)
    assert all(noise.moments is None and noise.kind == "rectified" for noise in found.values()) and found


def test_neighbourhoods_behind_tokens_are_left_out() -> None:
    net = Net()
    ids = net.input("ids", "N", 4, dtype=TensorProto.INT64)
    x = net.op("Gather", net.weight("table", 10, 8), ids)
    for _ in range(2):
        x = net.op("Add", x, net.matmul(net.relu(net.matmul(x, 8, 16)), 16, 8))
    parts = parts_of(net.proto(x))
    assert parts.distillable and entry_noise(parts) == {}
