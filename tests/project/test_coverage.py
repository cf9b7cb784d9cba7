"""The measurements of coverage and of scale: what counts, what is told, and that a failure is a finding."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from benchmarks import scale
from benchmarks.corpus import CORPUS, Feed, calibrate, exporters, unsettle
from benchmarks.coverage.__main__ import main
from benchmarks.coverage.findings import Coverage, Failure, Kept
from benchmarks.coverage.fleet import Subject, files_of, run_limited
from benchmarks.coverage.measure import measure
from benchmarks.coverage.table import causes, kept_lines, markdown, summary
from benchmarks.coverage.weights import classifiers, embeddings
from ndonnx.errors import UsageError
from ndonnx.graph import load
from tests.helpers.models import Net, loaded, residual_cnn, several_heads


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


# One model


def test_a_sound_model_passes_every_check(tmp_path: Path) -> None:
    found = measure(saved(residual_cnn(2), tmp_path / "m.onnx"), steps=2)
    assert found.failures == []
    assert found.clean and found.opens and found.respliced and found.identity
    assert found.student_runs and found.other_batch and found.interface
    assert (found.distillable, found.parity, found.trains, found.distilled) == (2, 2, 2, 2)
    weights = 3 * 8 * 9 + 8, 2 * (8 * 8 * 9 + 8)  # the stem, a unit; the classifier counts for nothing
    inside = 2 * weights[1]
    assert found.share is not None and found.share >= inside / (weights[0] + inside)
    assert found.largest is not None and found.largest < found.share
    assert found.ratio == pytest.approx(0.5, abs=0.05)
    assert found.worst_error is not None and found.worst_error < 1e-4


def test_without_steps_nothing_is_compressed(tmp_path: Path) -> None:
    found = measure(saved(residual_cnn(1), tmp_path / "m.onnx"))
    assert found.clean and found.parity == 1
    assert (found.identity, found.distilled, found.student_runs, found.ratio) == (None, None, None, None)


def test_a_file_that_does_not_open_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    found = measure(tmp_path / "m.onnx", steps=2)
    assert not found.opens and not found.clean
    assert [failure.stage for failure in found.failures] == ["open"]


def test_a_slice_that_does_not_convert_is_a_finding_and_the_rest_goes_on(tmp_path: Path) -> None:
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8))
    y = net.op("Sigmoid", net.conv(net.relu(net.conv(x, 8, 8)), 8, 8))
    x = net.op("Add", net.op("Bernoulli", y, seed=1.0), x)
    found = measure(saved(net.proto(net.pooled_classifier(x, 8)), tmp_path / "m.onnx"))
    (failure,) = [failure for failure in found.failures if failure.stage == "parity"]
    assert failure.reason.startswith("Bernoulli '")
    assert found.parity == found.distillable - 1
    (cause,) = [cause for cause in causes([found]) if cause.stage == "parity"]
    assert (cause.operator, cause.count, cause.models) == ("Bernoulli", 1, ("m",))


def test_samples_beside_a_model_are_taken(tmp_path: Path) -> None:
    path = saved(residual_cnn(1), tmp_path / "m.onnx")
    np.savez(path.with_suffix(".npz"), x=np.full((4, 3, 8, 8), np.nan, np.float32))
    found = measure(path)
    assert any("holds NaN or Inf" in failure.reason for failure in found.failures)


def test_embeddings_and_last_classifiers_are_set_aside() -> None:
    net = Net()
    tokens = net.input("tokens", "N", 4, dtype=onnx.TensorProto.INT64)
    x = net.op("Gather", net.weight("table", 9, 6), tokens)
    x = net.op("Add", x, net.matmul(net.relu(net.matmul(x, 6, 12, out="up")), 12, 6, out="down"))
    graph = loaded(net.proto(net.op("Softmax", net.matmul(x, 6, 9, out="head"), out="y"))).graph
    assert {value.name for value in embeddings(graph)} == {"table"}
    assert {value.name for value in classifiers(graph)} == {"head.weight"}
    heads = {value.name for value in classifiers(loaded(several_heads()).graph)}
    assert len(heads) >= 2


# Many models


def finding(model: str, **values: object) -> Coverage:
    return Coverage(model, opens=True, **values)  # type: ignore[arg-type]


def test_findings_travel_as_json() -> None:
    found = finding("m", share=0.5, kept=[Kept("n1", 0.5, "no", ["Conv"])], failures=[Failure("a", "b", "c", ["Add"])])
    assert Coverage.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_failures_of_one_cause_are_counted_together() -> None:
    reason = "Resize 'up{0}': the converted slice differs from onnxruntime by 0.{0} of its scale (at most 0.0001)"
    found = [finding(f"m{i}", failures=[Failure("parity", f"n0{i}", reason.format(i))]) for i in (1, 2)]
    found[0].failures.append(Failure("compress", "", "other"))
    first, second = causes(found)
    assert (first.operator, first.count, first.models) == ("Resize", 2, ("m1", "m2"))
    assert first.example == f"m1 n01: {reason.format(1)}"
    assert (second.stage, second.operator, second.count) == ("compress", "", 1)


def test_table_and_summary() -> None:
    found = [
        finding("a", share=0.9, ratio=0.5, distillable=4, neighbourhoods=5, parity=4, identity=True, respliced=True),
        finding("long_name", share=0.7, ratio=0.8, distillable=2, neighbourhoods=2, parity=1, respliced=False),
        Coverage("c", failures=[Failure("open", "", "no")]),
    ]
    head, rule, *rows = markdown(found).splitlines()
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["a", "long_name", "c"]
    assert cells[0][4] == "4 of 5" and cells[1][7] == "1/2"
    assert [row[9] for row in cells] == ["yes", "NO", "-"]
    totals = summary(found)
    assert (totals["models"], totals["open"], totals["clean"]) == (3, 2, 2)
    assert totals["share_median"] == pytest.approx(0.8) and totals["share_min"] == 0.7
    assert (totals["slices"], totals["slices_at_parity"], totals["identity"]) == (6, 5, 1)
    assert (totals["ratio_in_range"], totals["ratios"]) == (1, 2)
    assert summary([])["share_median"] is None


def test_kept_pieces_are_told_by_reason_with_the_largest() -> None:
    pieces = [Kept("n1", 0.1, "makes 'x'", ["Conv"]), Kept("n2", 0.4, "makes 'y'", ["MatMul"])]
    (line,) = kept_lines([finding("a", kept=pieces[:1]), finding("b", kept=pieces[1:])])
    assert line == "kept 2 x: makes ~; largest: b n2, 40.00% of its weights (MatMul)"


def test_files_are_those_named_and_those_in_folders(tmp_path: Path) -> None:
    paths = [saved(residual_cnn(1), tmp_path / name) for name in ("b.onnx", "a.onnx")]
    assert files_of([tmp_path]) == [Subject(path) for path in reversed(paths)]
    assert files_of(paths) == [Subject(path) for path in paths]
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "c.onnx"):
        with pytest.raises(UsageError, match="no such model"):
            files_of([tmp_path / missing])


def test_a_process_that_fails_or_takes_too_long_says_so() -> None:
    assert run_limited(["timeit", "-n1", "-r1", "import time; time.sleep(60)"], 1).reason == "not done after 1 s"
    assert "no_such_module" in (run_limited(["no_such_module"], 60).reason or "")
    assert run_limited(["json.tool", "--help"], 60).reason is None


@pytest.mark.slow
def test_models_are_measured_in_processes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    good = saved(residual_cnn(1), tmp_path / "good.onnx")
    out = tmp_path / "found.json"
    main([str(good), str(tmp_path / "broken.onnx"), "--steps", "0", "--out", str(out)])
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [(m["model"], m["opens"]) for m in document["models"]] == [("good", True), ("broken", False)]
    assert document["summary"]["clean"] == 1 and document["skipped"] == {}
    printed = capsys.readouterr()
    assert "| good " in printed.out and "1 x open" in printed.out
    assert sorted(line.split(":")[0] for line in printed.err.splitlines()) == ["broken", "good"]


# The corpus


def test_feeds_are_what_their_kind_says() -> None:
    rng = np.random.default_rng(0)
    tokens, masks = (Feed((16,), kind).draw(50, rng) for kind in ("tokens", "mask"))  # type: ignore[arg-type]
    assert tokens.dtype == masks.dtype == np.int64
    assert tokens.min() >= 3
    assert (np.diff(masks, axis=1) <= 0).all() and (masks.sum(axis=1) >= 8).all()
    assert Feed((2, 3)).draw(4, rng).shape == (4, 2, 3)


def test_every_model_of_the_corpus_has_a_way_out() -> None:
    assert all(set(exporters(name)) <= {"script", "export"} and exporters(name) for name in CORPUS)


def test_calibrated_norms_neither_explode_nor_vanish() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(30)]
    model = unsettle(nn.Sequential(*layers).eval())
    with torch.no_grad():
        for layer in layers:
            layer[0].weight.mul_(5)
    x = torch.randn(16, 8, 6, 6)
    with torch.no_grad():
        before = float(model(x).std())
        calibrate(model, [x])
        after = float(model(torch.randn(16, 8, 6, 6)).std())
    assert before > 1e3 or before < 1e-3
    assert 0.2 < after < 5
    assert not any(module.training for module in model.modules())


# Scale


@pytest.mark.parametrize("shape", scale.SHAPES)
def test_graphs_of_a_number_of_nodes(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "m.onnx"
    scale.many_nodes(shape, 50, path)
    onnx.checker.check_model(str(path))
    found = scale.measure(shape, path)
    assert 40 <= found.nodes <= 50
    assert found.neighbourhoods >= 8
    assert found.weight_bytes == 4 * 2 * 8 * 16 * (found.nodes // 5)
    assert found.seconds > 0


def test_the_large_model_keeps_its_weights_beside_it_and_reads_none(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    scale.many_bytes(1_000_000, path, hidden=64)
    data = path.with_suffix(".data")
    found = scale.measure("weights", path)
    assert found.weight_bytes == data.stat().st_size >= 1_000_000
    assert path.stat().st_size < 10_000
    assert data.stat().st_blocks == 0, "the file is all holes"
    assert len(load(path).graph.initializers) == 2 * found.neighbourhoods


def test_growth_is_the_exponent_of_the_processor_time() -> None:
    sizes = [scale.Scale("units", n, 0, 0, 0, 0, 0, 0, cpu, 0) for n, cpu in ((10, 1.0), (20, 2.0), (40, 8.0))]
    assert scale.growth(sizes) == [None, pytest.approx(1), pytest.approx(2)]
    assert scale.growth([]) == []


@pytest.mark.slow
def test_scale_prints_a_table_and_writes_its_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale.main(["--nodes", "10,20", "--shapes", "units", "--gigabytes", "0", "--out", str(tmp_path)])
    with (tmp_path / "scale.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["nodes"] for row in rows] == ["10", "20"]
    assert all(float(row["peak_bytes"]) >= 0 for row in rows)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert "exponent" in capsys.readouterr().out
