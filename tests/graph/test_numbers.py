"""Numbers of whole runs mean what they say: for the shape of the data, for all files, for what can go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

import ndonnx
from ndonnx.config.recipe import Recipe
from ndonnx.errors import UsageError
from ndonnx.graph import load, slice_cost
from ndonnx.partition.removable import kept_width
from ndonnx_cli.main import main
from tests.helpers.models import BUILDERS, Net, residual_cnn
from tests.helpers.runs import SMALL, Bench

pytestmark = pytest.mark.usefixtures("one_core")

SEARCHED: dict[str, Any] = SMALL | {"search": {"candidates": ("width 0.25,0.5",), "steps": 2}, "samples": 64}


def open_cnn(*size: int | str, batch: int | str = "N") -> onnx.ModelProto:
    net = Net()
    x = net.relu(net.conv(net.input("x", batch, 3, *size), 3, 8, stride=2), out="stem")
    y = net.conv(net.relu(net.conv(x, 8, 8)), 8, 8)
    return net.proto(net.pooled_classifier(net.relu(net.op("Add", y, x)), 8))


def inspected(model: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(model), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


# MACs


def test_a_run_tells_macs_for_the_shape_of_its_data(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(open_cnn("H", "W"), free=open_cnn(20, 12))
    report = bench.compress(keep=0.5, steps=2).report
    assert report.shapes == {"x": [1, 3, 20, 12]}
    onnx.save(open_cnn(20, 12), tmp_path / "fixed.onnx")
    teacher, student = report.teacher.macs, report.student.macs
    assert teacher == slice_cost(load(tmp_path / "fixed.onnx"), {"x": (1, 3, 20, 12)}).macs
    assert student is not None and teacher is not None
    saved = {n.name: n.macs for n in report.neighbourhoods}
    before = {p.name: p.macs for p in ndonnx.inspect(tmp_path / "fixed.onnx").neighbourhoods}
    changed = sum((before[name] or 0) - (macs or 0) for name, macs in saved.items())
    assert teacher - student == changed > 0


def test_a_fixed_batch_counts_per_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for batch in ("N", 4):
        onnx.save(open_cnn(20, 12, batch=batch), tmp_path / "model.onnx")
        document = inspected(tmp_path / "model.onnx", capsys)
        found.append([document["macs"], *(piece["macs"] for piece in document["neighbourhoods"])])
    assert found[0] == found[1]


def test_inspect_tells_no_macs_of_open_sizes_and_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(open_cnn("H", "W"), tmp_path / "model.onnx")
    document = inspected(tmp_path / "model.onnx", capsys)
    assert document["macs"] is None and document["coverage"]["macs"] is None and document["shapes"] is None
    assert document["open_sizes"] == ["x[2] (H)", "x[3] (W)"]
    assert document["parameters"] > 0 and document["coverage"]["parameters"] > 0
    assert main(["inspect", str(tmp_path / "model.onnx")]) == 0
    assert "MACs not told: nothing states x[2] (H), x[3] (W); state" in capsys.readouterr().out.splitlines()[0]
    assert "<svg" in ndonnx.inspect(tmp_path / "model.onnx").to_svg()


@pytest.mark.parametrize("shape", ["1,3,20,12", "4,3,20,12"])
def test_inspect_tells_macs_of_a_stated_shape(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(open_cnn("H", "W"), tmp_path / "open.onnx")
    onnx.save(open_cnn(20, 12), tmp_path / "fixed.onnx")
    assert main(["inspect", str(tmp_path / "open.onnx"), "--shape", f"x={shape}", "--json"]) == 0
    found, expected = json.loads(capsys.readouterr().out), inspected(tmp_path / "fixed.onnx", capsys)
    assert found["macs"] == expected["macs"] > 0
    assert [piece["macs"] for piece in found["neighbourhoods"]] == [p["macs"] for p in expected["neighbourhoods"]]
    assert found["shapes"] == {"x": [1, 3, 20, 12]} and found["open_sizes"] == []  # MACs are told for one sample


def test_a_search_for_macs_works_on_open_sizes(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(open_cnn("H", "W"), samples=80, free=open_cnn(20, 12))
    target = bench.compress(**SEARCHED, target=("macs=0.7",)).report.target
    assert target is not None and target.missed is None
    assert target.reached["macs"] <= 0.7


def test_a_target_of_macs_that_nobody_can_tell_is_refused(tmp_path: Path) -> None:
    net = Net()
    x = net.op("NonZero", net.input("x", "N", 6), out="found")
    x = net.op("Cast", net.op("Transpose", x, perm=[1, 0]), to=TensorProto.FLOAT)
    net.op("MatMul", x, net.weight("w", 2, 3), out="points")
    y = net.gemm(net.relu(net.gemm("x", 6, 8)), 8, 4, out="y")
    bench = Bench(tmp_path).put(net.proto(y, "points"))
    with pytest.raises(UsageError, match=r"MACs cannot be told.*give another target than macs"):
        bench.compress(**SEARCHED, target=("macs=0.5",))


# Files


def test_a_target_of_size_is_a_part_of_all_files(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(residual_cnn(), samples=80)
    inside = bench.model.stat().st_size
    onnx.save(residual_cnn(), bench.model, save_as_external_data=True, location="teacher.weights", size_threshold=0)
    report = bench.compress(**SEARCHED, target=("size=0.9",)).report
    files = bench.model.stat().st_size + (tmp_path / "teacher.weights").stat().st_size
    assert report.teacher.bytes == files and files >= 0.9 * inside
    assert report.student.bytes == bench.student.stat().st_size
    assert report.target is not None and report.target.missed is None
    assert report.target.reached["size"] == pytest.approx(bench.student.stat().st_size / files)
    assert report.target.reached["size"] <= 0.9


# What can go


@pytest.mark.parametrize("name", ["residual_cnn", "inverted_bottleneck", "vgg", "mlp", "transformer", "tied"])
def test_what_can_go_is_what_the_smallest_student_is_without(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path).put(BUILDERS[name]())
    document = inspected(bench.model, capsys)
    report = bench.compress(keep=0.1, steps=0).report
    left = {n.name: n.parameters for n in report.neighbourhoods}
    for piece in document["neighbourhoods"]:
        assert piece["parameters"] - left[piece["name"]] == piece["removable"], piece
        assert piece["removable"] <= piece["parameters"]
    gone = 1 - report.student.parameters / report.teacher.parameters
    assert document["coverage"]["removable"] == pytest.approx(gone)


def test_what_lies_inside_is_not_what_can_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wide layer on the residual stream and a narrow one beside it: nearly all lies inside, little can go."""
    net = Net()
    x = net.input("x", "N", 32)
    wide = net.matmul(x, 32, 32)
    narrow = net.matmul(net.relu(net.matmul(x, 32, 2)), 2, 32)
    onnx.save(net.proto(net.op("Add", wide, narrow, out="y")), tmp_path / "model.onnx")
    document = inspected(tmp_path / "model.onnx", capsys)
    coverage = document["coverage"]
    assert coverage["parameters"] == 1
    assert coverage["removable"] == pytest.approx(2 * 32 * (2 - kept_width(2, 0.1, None)) / document["parameters"])


def test_methods_whose_students_are_not_known_beforehand_tell_nothing(tmp_path: Path) -> None:
    onnx.save(residual_cnn(), tmp_path / "model.onnx")
    found = ndonnx.inspect(tmp_path / "model.onnx", Recipe(method="sparsity"))
    assert found.smallest is None and found.coverage.removable is None
    assert {piece.removable for piece in found.neighbourhoods} == {None}
