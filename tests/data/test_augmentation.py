"""Changed copies of images: what they are made of, and that nothing of a held-out sample is among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndonnx.config.recipe import DataRecipe, Recipe, make_recipe
from ndonnx.data import InputSpec, input_specs, open_source
from ndonnx.data.augmentation import image_axes, with_augmented
from ndonnx.data.split import Split, held_out
from ndonnx.data.subset import Remembered, Subset
from ndonnx.distill.schedule import Schedule
from ndonnx.partition import partition
from ndonnx.runtime.progress import Silent
from ndonnx.teacher import make_session
from ndonnx.teacher.outputs import TeacherOutputs, Wanted, capture_outputs
from tests.helpers.models import Array, Net, residual_cnn, run


def numbered(count: int, *shape: int) -> Array:
    """Images of random pixels whose first one, everywhere else below 1, is their number."""
    images = np.random.default_rng(0).random((count, *shape), dtype=np.float32)
    images[:, 0, 0, 0] = np.arange(count)
    return images


def views_of(images: Array, kind: str, per_sample: int = 3, **options: int) -> list[Array]:
    options = {"after": 0, "seed": 0, **options}
    return [
        batch["x"] for batch in with_augmented([{"x": images}], [kind], {"x": (2, 3)}, per_sample=per_sample, **options)
    ]


def test_a_flip_is_the_image_or_its_mirror_and_both_come() -> None:
    images = numbered(40, 3, 6, 7)
    original, *copies = views_of(images, "flip")
    np.testing.assert_array_equal(original, images)
    mirrored = [(copy == images[..., ::-1]).all(axis=(1, 2, 3)) for copy in copies]
    for copy, turned in zip(copies, mirrored, strict=True):
        np.testing.assert_array_equal(copy[~turned], images[~turned])
        assert 0 < turned.sum() < len(images)
    assert (mirrored[0] != mirrored[1]).any()


@given(height=st.integers(2, 20), width=st.integers(2, 20), seed=st.integers(0, 99))
def test_a_shift_shows_a_window_of_the_image_mirrored_at_its_edges(height: int, width: int, seed: int) -> None:
    images = numbered(3, 2, height, width)
    far = [max(1, side // 8) for side in (height, width)]
    padded = np.pad(images, ((0, 0), (0, 0), *((most, most) for most in far)), mode="reflect")
    for image, copy in zip(padded, views_of(images, "shift", 2, seed=seed)[1], strict=True):
        windows = (
            image[:, top : top + height, left : left + width]
            for top in range(2 * far[0] + 1)
            for left in range(2 * far[1] + 1)
        )
        assert any(np.array_equal(window, copy) for window in windows)


def test_mixed_images_are_at_least_half_themselves_and_the_rest_is_one_other() -> None:
    images = np.eye(16, dtype=np.float32).reshape(16, 1, 4, 4)
    mixed = views_of(images, "mixup", 2)[1].reshape(16, 16)
    np.testing.assert_allclose(mixed.sum(axis=1), 1, rtol=1e-6)
    assert (np.diag(mixed) >= 0.5).all() and (np.diag(mixed) < 1).any()
    assert ((mixed > 0).sum(axis=1) <= 2).all()


def test_only_a_single_image_input_is_changed() -> None:
    def axes(*specs: InputSpec) -> dict[str, tuple[int, int]]:
        return image_axes(specs, DataRecipe())

    floats, whole = np.dtype(np.float32), np.dtype(np.int64)
    first, last = InputSpec("x", floats, ("N", 3, 8, 8)), InputSpec("x", floats, ("N", 8, 8, 3))
    assert axes(first) == {"x": (2, 3)} and axes(last) == {"x": (1, 2)}
    assert not axes(InputSpec("x", floats, ("N", 40, 8, 8)))
    assert not axes(InputSpec("x", whole, ("N", 3, 8, 8)))
    assert not axes(InputSpec("x", floats, ("N", 12)))
    assert not axes(first, InputSpec("y", floats, ("N", 3, 8, 8)))


def captured(folder: Path, model: onnx.ModelProto, count: int, recipe: Recipe, per_sample: int) -> TeacherOutputs:
    value = model.graph.input[0].type.tensor_type.shape.dim
    shape = [dim.dim_value for dim in value][1:]
    images = numbered(count, *shape)
    np.savez(folder / "data.npz", **{model.graph.input[0].name: images, "label": np.arange(count)})
    spec = InputSpec(model.graph.input[0].name, np.dtype(np.float32), (value[0].dim_value or "N", *shape))
    source = open_source(str(folder / "data.npz"), [spec], recipe.data)
    rows, held, nothing = np.arange(count), held_out(count, recipe.holdout), np.arange(0)
    split = Split(source, recipe.holdout, rows[held:], rows[:held], nothing, nothing, count)
    wanted = Wanted(tuple(value.name for value in model.graph.output), count, per_sample)
    return capture_outputs(partition(ir.from_proto(model)), split, wanted, folder, recipe, Silent())


def test_the_teacher_answers_every_view_and_labels_and_held_out_samples_stay_with_theirs(tmp_path: Path) -> None:
    model, count, per_sample = residual_cnn(1), 90, 3
    found = captured(tmp_path, model, count, Recipe(augment=("flip",), holdout=0.2), per_sample)
    store, name = found.store, model.graph.input[0].name
    held = round(found.holdout * store.samples)
    assert held >= 0.2 * count and store.samples == held + (count - held) * per_sample
    inputs = np.asarray(store.array(name), dtype=np.float32)
    answers = run(model, {name: inputs})["logits"]
    np.testing.assert_allclose(np.asarray(store.array("logits"), dtype=np.float32), answers, rtol=2e-3, atol=2e-3)
    # The number of an image is its largest pixel, wherever a flip has brought it.
    numbers = inputs.reshape(len(inputs), -1).max(axis=1)
    assert found.labels is not None
    labels = np.load(found.labels)
    np.testing.assert_array_equal(labels[labels > 1], np.rint(numbers)[labels > 1])
    assert not set(labels[:held]) & set(labels[held:])
    assert all(count == per_sample for count in np.unique(labels[held:], return_counts=True)[1])


def test_without_views_the_samples_come_as_they_are(tmp_path: Path) -> None:
    model = residual_cnn(1)
    for number, (augment, per_sample) in enumerate(((("flip",), 1), ((), 3))):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = captured(folder, model, 20, Recipe(augment=augment), per_sample)
        assert found.store.samples == 20 and found.holdout == Recipe().holdout


def test_as_many_views_as_the_steps_can_use() -> None:
    def per_sample(samples: int, **settings: object) -> int:
        return Schedule(Recipe(**settings), True, rate=1000).per_sample(samples)  # type: ignore[arg-type]

    # 3,000 steps of 64 see 192,000 images, each answer twice.
    assert [per_sample(n, finetune_steps=3000, batch_size=64) for n in (96_000, 48_000, 9_600)] == [1, 2, 10]
    assert per_sample(500_000) == 1 and per_sample(2) == 64
    # A tenth of the time, in which a thousand are answered each second.
    assert per_sample(8_000, time_budget=600.0) == 8


def test_a_time_budget_draws_as_many_samples_as_are_answered_in_a_tenth_of_it() -> None:
    for rate, drawn in ((2, 256), (100, 6_000), (1_000, 50_000)):
        schedule = Schedule(Recipe(time_budget=600.0), True, rate=rate)
        assert schedule.finetune_samples() == drawn and schedule.distil_samples(16_000) == min(drawn, 16_000)
    free = Schedule(Recipe(), True)
    assert free.finetune_samples() == 50_000 and free.distil_samples(70_000) == 70_000


@pytest.mark.parametrize(
    ("finetune_steps", "finetunable", "seconds"), [(None, True, 60.0), (0, True, 450.0), (None, False, 450.0)]
)
def test_neighbourhoods_get_the_time_that_nothing_else_needs(
    finetune_steps: int | None, finetunable: bool, seconds: float
) -> None:
    schedule = Schedule(Recipe(time_budget=600.0, finetune_steps=finetune_steps), finetunable, rate=1000)
    assert schedule.distil(jobs=9, workers=1).seconds == pytest.approx(seconds / 9)
    assert schedule.distil(jobs=9, workers=2).seconds == pytest.approx(2 * seconds / 9)


@pytest.mark.parametrize(("given", "read"), [("none", ()), ("flip", ("flip",)), ("flip, mixup", ("flip", "mixup"))])
def test_kinds_are_read_from_text(given: str, read: tuple[str, ...]) -> None:
    assert make_recipe({"augment": given}).augment == read


def test_a_subset_that_is_remembered_is_read_once(tmp_path: Path) -> None:
    rows = np.arange(40, dtype=np.float32).reshape(20, 2)
    np.savez(tmp_path / "x.npz", x=rows, label=np.arange(20) % 3)
    net = Net()
    session = make_session(ir.from_proto(net.proto(net.gemm(net.input("x", "N", 2), 2, 3))))
    source = open_source(str(tmp_path / "x.npz"), input_specs(session), DataRecipe())
    taken: list[int] = []
    take = source.take
    source.take = lambda numbers, size: (taken.append(len(numbers)), take(numbers, size))[1]  # type: ignore[method-assign]
    numbers = np.array([7, 3, 11, 5])
    few = Remembered(Subset(source, numbers), 10**6)
    for _ in range(3):
        batches = list(few.batches(3))
        assert [len(batch) for batch in batches] == [3, 1]
        assert np.array_equal(np.concatenate([batch.inputs["x"] for batch in batches]), rows[numbers])
    assert taken == [4] and few.row_number(2) == 11
    assert [len(batch) for batch in few.batches(2, samples=3)] == [2, 1], "asked otherwise, read again"
    large = Remembered(Subset(source, numbers), 8)
    taken.clear()
    assert all(len(list(large.batches(4))) == 1 for _ in range(2)) and taken == [4, 4]
