"""The thresholding effect: noise and tolerances against numbers by hand, and the study from end to end."""

from __future__ import annotations

import csv
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ndonnx
from ndonnx.demo import data_path, teacher_path
from ndonnx.distill.losses import target_variance
from ndonnx.errors import UsageError
from ndonnx.metrics.partial import Judged, PartialModels, Quality
from ndonnx.metrics.sensitivity import Draws, Point, StudyPlan, ThresholdReport, study, tolerances
from ndonnx.metrics.sensitivity.noise import JointNoise, error_curve, noise_curve, noisy_weights
from ndonnx.metrics.sensitivity.tolerance import isotonic, tolerance_of
from ndonnx.report.threshold import write_threshold
from ndonnx_cli.main import main
from tests.helpers.models import Net, inputs_of, parted, residual_cnn, several_heads
from tests.helpers.partials import batches_of, half
from tests.helpers.studies import opened

GAIN = 3.0


def linear_net() -> onnx.ModelProto:
    """A hidden layer, then `h -> 3 h`, all of it linear: NMSE behind the first is the NMSE of the output."""
    net = Net(3)
    h = net.gemm(net.op("Tanh", net.gemm(net.input("x", "N", 6), 6, 12, out="inner")), 12, 4, out="h")
    return net.proto(
        net.op("Mul", net.op("Unsqueeze", h, net.ints(1)), net.constant("gain", np.float32([GAIN])), out="y")
    )


def report_of(partials: PartialModels) -> ThresholdReport:
    return study(partials, StudyPlan((0.1, 0.5), repeats=2, keep=(0.5, 0.75), max_drop=0.05, seed=3))


# Noise


def test_the_variance_is_that_of_trainings(tmp_path: Path) -> None:
    with opened(residual_cnn(2), tmp_path) as partials:
        for name in partials.names:
            expected = target_variance(torch.from_numpy(np.array(partials.exit(name))))
            assert partials.variance(name) == pytest.approx(expected, rel=1e-9)


def test_no_noise_costs_nothing_exactly(tmp_path: Path) -> None:
    with opened(residual_cnn(2), tmp_path) as partials:
        for name in partials.names:
            (point,) = noise_curve(partials, partials.quality, name, Draws([0.0], repeats=2))
            assert point == Point(0.0, 0.0, 0.0, 0.0, 0.0)
        joint = JointNoise(partials, partials.quality, partials.names)
        for relative in (True, False):
            none = joint.point(0.0, Draws(), relative=relative, on_step=lambda: None)
            assert none.drop == none.divergence == none.nmse == 0


def test_noise_has_the_size_that_it_is_said_to_have(tmp_path: Path) -> None:
    with opened(residual_cnn(2), tmp_path) as partials:
        for name in partials.names:
            for point in noise_curve(partials, partials.quality, name, Draws([0.1, 0.5])):
                count = partials.exit(name).size
                assert point.nmse == pytest.approx(point.amplitude**2, rel=5 * math.sqrt(2 / count))
                assert point.epsilon == pytest.approx(point.amplitude * math.sqrt(partials.variance(name)))


def test_noise_in_one_place_of_the_whole_is_that_of_the_partial_model(tmp_path: Path) -> None:
    """`several_heads` ends in neighbourhoods whose exit is read and put out, or only put out."""
    for model in (residual_cnn(2), several_heads()):
        with opened(model, tmp_path / model.graph.output[0].name, 80) as partials:
            for name in partials.names:
                (alone,) = noise_curve(partials, partials.quality, name, Draws([0.4], seed=5))
                joint = JointNoise(partials, partials.quality, [name])
                found = joint.point(0.4, Draws(seed=5), relative=True, on_step=lambda: None)
                assert found.drop == pytest.approx(alone.drop, rel=1e-4)
                assert found.divergence == pytest.approx(alone.divergence, rel=1e-3)
                assert found.nmse == pytest.approx(0.16)


def test_more_places_and_more_noise_are_worse(tmp_path: Path) -> None:
    with opened(residual_cnn(4), tmp_path, 512) as partials:
        quality = partials.quality
        joint = JointNoise(partials, quality, partials.names)
        wholes = [joint.point(a, Draws(), relative=True, on_step=lambda: None) for a in (0.1, 0.2, 0.4)]
        assert wholes[0].divergence < wholes[1].divergence < wholes[2].divergence
        for name in partials.names:
            singles = noise_curve(partials, quality, name, Draws([0.1, 0.2, 0.4]))
            assert all(one.divergence < whole.divergence for one, whole in zip(singles, wholes, strict=True))


def test_the_number_of_threads_leaves_no_trace(tmp_path: Path) -> None:
    found = []
    for threads in (1, 3):
        with opened(residual_cnn(2), tmp_path / str(threads), threads=threads) as partials:
            found.append(report_of(partials))
    assert found[0] == found[1]


def test_another_seed_draws_other_noise(tmp_path: Path) -> None:
    with opened(residual_cnn(1), tmp_path) as partials:
        name = partials.names[0]
        one, same, other = (noise_curve(partials, partials.quality, name, Draws([0.3], seed=s)) for s in (0, 0, 1))
        assert one == same != other


def test_weight_noise_is_in_proportion_and_on_linear_operators_only(tmp_path: Path) -> None:
    _, parts = parted(residual_cnn(1, norm=True))
    n = parts.distillable[0]
    slice_ = parts.slice_of(n)
    noisy = noisy_weights(slice_, n.name, 0.1, (0, 0))
    assert noisy is not None
    changed = set()
    for name, value in noisy.graph.initializers.items():
        new, old = (v.const_value.numpy() for v in (value, slice_.graph.initializers[name]))  # type: ignore[union-attr]
        if not np.array_equal(new, old):
            changed.add(name)
            assert np.std(new - old) == pytest.approx(0.1 * old.std(), rel=0.2)
    assert changed == {name for name in slice_.graph.initializers if name.endswith("weight")}
    bare = ir.from_proto(Net().proto())
    assert noisy_weights(bare, "n", 0.1, (0, 0)) is None


# ErrorBudgets


def test_the_tolerance_of_a_linear_net_is_the_number_by_hand(tmp_path: Path) -> None:
    """The gain scales error and spread alike, so the output's NMSE is that of the exit over its own spread."""
    with opened(linear_net(), tmp_path, 512) as partials:
        (name,) = partials.names
        assert partials.quality.kind == "nmse"
        exit_ = np.array(partials.exit(name), np.float64)
        pooled = np.square(exit_ - exit_.mean()).mean()  # the outputs' NMSE has one mean for all elements
        slope = partials.variance(name) / pooled
        found = tolerances(partials, partials.quality, 0.02)[name]
        assert found.nmse == pytest.approx(0.02 / slope, rel=1e-3)
        assert found.sensitivity == pytest.approx(slope, rel=1e-3)
        never = tolerances(partials, partials.quality, 0.9, draws=Draws([0.01, 0.1]))[name]
        assert never.nmse is None
        assert never.largest == pytest.approx(0.01, rel=0.1)


def test_a_students_own_error_takes_the_noises_place(tmp_path: Path) -> None:
    with opened(residual_cnn(2), tmp_path, 128) as partials:
        quality, name = partials.quality, partials.names[0]
        student = half(partials.parts, name, partials)
        own = partials.measured(name, partials.answer_of(name, student))
        amplitude = math.sqrt(own[1])
        first, same = error_curve(partials, quality, name, student, [amplitude / 3, amplitude])
        assert same.nmse == pytest.approx(own[1])
        assert first.nmse == pytest.approx(own[1] / 9, rel=1e-4)
        assert (same.drop, same.divergence) == pytest.approx(
            (quality.drop(own[0]), quality.divergence(own[0])), rel=1e-3
        )
        slice_ = next(partials.parts.slice_of(n) for n in partials.parts.distillable if n.name == name)
        unlimited = tolerances(partials, quality, 0.01, names=[name], students={name: slice_})[name]
        assert unlimited.nmse is None and unlimited.sensitivity is None
        limited = tolerances(partials, quality, 0.01, students={name: student})
        assert limited[name] != tolerances(partials, quality, 0.01)[name]
        assert set(limited) == set(partials.names)


def test_a_curve_is_followed_no_further_than_needed(tmp_path: Path) -> None:
    with opened(linear_net(), tmp_path) as partials:
        runs: list[int] = []
        found = tolerances(partials, partials.quality, 0.01, on_step=lambda: runs.append(1))
        assert len(runs) < 6
        assert all(one.nmse is not None for one in found.values())
        assert tolerances(partials, partials.quality, 0.01, names=[]) == {}


def test_a_tolerance_is_read_off_between_the_points() -> None:
    def curve(*points: tuple[float, float]) -> list[Point]:
        return [Point(math.sqrt(nmse), 0.0, nmse, drop, 2 * nmse) for nmse, drop in points]

    straight = tolerance_of("n", curve((0.1, 0.0), (0.2, 0.02), (0.4, 0.1)), 0.01)
    assert straight.nmse == pytest.approx(0.15)
    assert straight.largest == 0.4
    assert straight.sensitivity == pytest.approx(2)
    # 0.03 and 0.01 are out of order: both become 0.02.
    assert tolerance_of("n", curve((0.1, 0.03), (0.2, 0.01), (0.4, 0.1)), 0.04).nmse == pytest.approx(0.25)
    assert tolerance_of("n", curve((0.1, -0.5), (0.2, 0.2)), 0.1).nmse == pytest.approx(0.15)
    assert tolerance_of("n", curve((0.1, 0.0), (0.2, math.inf)), 0.1).nmse == pytest.approx(0.1)
    assert tolerance_of("n", curve((0.1, 0.0)), 0.0).nmse is None
    assert tolerance_of("n", curve(), 0.1).sensitivity is None


@given(st.lists(st.floats(-1, 1), max_size=12))
def test_isotonic_is_the_nearest_monotone_sequence(values: list[float]) -> None:
    found = isotonic(values)
    assert len(found) == len(values)
    assert all(a <= b + 1e-12 for a, b in pairwise(found))
    # Minimax formula of isotonic regression.
    for i, value in enumerate(found):
        expected = max(min(float(np.mean(values[a : b + 1])) for b in range(i, len(values))) for a in range(i + 1))
        assert value == pytest.approx(expected, abs=1e-9)


@pytest.mark.filterwarnings("ignore:invalid value")  # Inf less Inf, in the comparison with torch
def test_a_neighbourhood_that_is_not_finite_has_a_reason(tmp_path: Path) -> None:
    net = Net(1)
    h = net.gemm(net.relu(net.gemm(net.input("x", "N", 6), 6, 8)), 8, 4, out="broken")
    net.weights["broken.bias"][0] = np.inf
    h = net.op("Clip", h, "", net.constant("most", np.array(1, np.float32)))
    tail = net.gemm(net.relu(net.gemm(h, 4, 8)), 8, 3, out="y")
    _, parts = parted(net.proto(tail), cut=["broken"])
    data = inputs_of(net.proto(tail), 40)
    with PartialModels(parts, Judged(batches_of(data), 40), tmp_path, threads=1) as partials:
        found = tolerances(partials, partials.quality, 0.01)
        bad = [one for one in found.values() if one.reason]
        assert len(bad) == 1 and "NaN or Inf" in (bad[0].reason or "")
        report = report_of(partials)
        assert set(report.kept) == {bad[0].name}


# The study


def test_the_study_of_a_small_net(tmp_path: Path) -> None:
    with opened(residual_cnn(3), tmp_path / "work", 256) as partials:
        report = report_of(partials)
        names = set(partials.names)
        quality: Quality = partials.quality
        assert report.metric == quality.kind == "agreement"
    assert report.teacher == 1
    assert {curve.name for curve in report.noise if curve.where == "one"} == names
    joint = {(curve.where, curve.scale) for curve in report.noise if curve.where != "one"}
    assert joint == {(where, scale) for where in ("half", "all") for scale in ("relative", "absolute")}
    for found in report.weights:
        assert set(found.singles) == names
        assert found.total == pytest.approx(sum(found.singles.values()))
    assert report.weights[-1].composed > max(report.weights[-1].singles.values())
    assert [(one.name, one.keep) for one in report.width] == [(n, k) for n in sorted(names) for k in (0.5, 0.75)]
    by_keep = {k: np.mean([one.nmse for one in report.width if one.keep == k and one.nmse]) for k in (0.5, 0.75)}
    assert by_keep[0.75] < by_keep[0.5]
    json.dumps(report.to_json(), allow_nan=False)
    written = write_threshold(report, tmp_path)
    for name in written.files:
        assert (tmp_path / name).stat().st_size > 0
    rows = list(csv.DictReader((tmp_path / "tolerances.csv").open()))
    assert {row["neighbourhood"] for row in rows} == names
    assert [one.name for one in report.student_tolerances] == sorted(names)
    assert json.loads((tmp_path / "threshold.json").read_text())["files"] == list(written.files)
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_with_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    with opened(residual_cnn(1), tmp_path / "work", 64) as partials:
        report = report_of(partials)
    point = Point(0.1, 0.1, 0.01, math.inf, math.nan)
    broken = [type(curve)(curve.where, curve.name, curve.scale, (point,)) for curve in report.noise]
    report = ThresholdReport(**{**vars(report), "noise": tuple(broken)})
    write_threshold(report, tmp_path)
    assert json.loads((tmp_path / "threshold.json").read_text())["noise"][0]["points"][0]["drop"] is None


QUICK = ["--samples", "128", "--amplitudes", "0.2,0.8", "--repeats", "1", "--keep", "0.5"]


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    arguments = ["threshold", str(teacher_path()), "--data", str(data_path("test")), *QUICK, "-o", str(folder), "-q"]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((folder / "threshold.json").read_text())
    assert document["metric"] == "accuracy" and document["samples"] == 128
    assert sorted(path.name for path in folder.iterdir()) == sorted(document["files"])
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "tolerates NMSE" in told and "figures and tables written to" in told
    again = ndonnx.threshold(
        teacher_path(), data=str(data_path("test")), samples=128, amplitudes=[0.2, 0.8], repeats=1, keep=[0.5]
    )
    assert again.to_json()["noise"] == document["noise"] and again.files == ()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--amplitudes", "0.1,x"], "--amplitudes: expected numbers"),
        (["--amplitudes", "0.1,-1"], "--amplitudes: expected numbers above 0, found -1"),
        (["--keep", "0.5,1.5"], "--keep: expected numbers above 0 to 1, found 1.5"),
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--samples", "1"], "--samples 1: expected at least 2"),
        (["--max-drop", "much"], "max-drop 'much': expected"),
    ],
)
def test_bad_numbers_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], told: str
) -> None:
    code = main(["threshold", str(teacher_path()), "--data", str(data_path("test")), "-o", str(tmp_path), *more])
    error = capsys.readouterr().err
    assert code == 2
    assert told in error and "Traceback" not in error


def test_labels_that_are_no_classes_and_missing_data_are_one_line(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    onnx.save(residual_cnn(1), model)
    rows = inputs_of(residual_cnn(1), 16)
    np.savez(tmp_path / "d.npz", label=np.full(16, 7), **rows)
    with pytest.raises(UsageError, match="label 7 is no class of the model"):
        ndonnx.threshold(model, data=str(tmp_path / "d.npz"))
    assert main(["threshold", str(model)]) == 2


def test_a_folder_that_cannot_be_made_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make the folder"):
        ndonnx.threshold(teacher_path(), data=str(data_path("test")), output=tmp_path / "file" / "out")
