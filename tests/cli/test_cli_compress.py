"""The command in whole runs: compress, evaluate, demo, and its progress."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ndonnx.runtime.units import bytes_text, count_text, seconds_text
from ndonnx_cli.progress import BarTeller, LineTeller, Pace
from tests.helpers.command import QUICK, TEACHER, TEST, TRAIN, UNITS, Run

# compress


def test_compress_json_keeps_its_contract(run: Run, folder: Path) -> None:
    code, out, err = run("compress", TEACHER, "--data", TRAIN, "-o", "s.onnx", *QUICK, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    contract = ["teacher", "student", "metrics", "neighbourhoods", "finetune", "seconds", "peak_rss_bytes", "run_dir"]
    origin = ["task", "asked", "command", "files", "versions", "machine", "warnings"]
    assert list(report) == [*contract, "shapes", "stages", *origin]
    assert report["student"]["path"] == "s.onnx"
    assert report["student"]["bytes"] == (folder / "s.onnx").stat().st_size
    assert report["student"]["parameters"] < report["teacher"]["parameters"]
    assert report["run_dir"] == "s.run"
    assert list(report["metrics"]) == ["teacher", "student"]
    stages = ["load", "partition", "capture", "distil", "refit", "splice", "finetune", "quantise", "evaluate", "total"]
    assert list(report["seconds"]) == stages
    for neighbourhood in report["neighbourhoods"]:
        assert {"name", "candidate", "status", "nmse", "steps", "seconds", "reason"} <= set(neighbourhood)
    assert [n["status"] for n in report["neighbourhoods"]] == ["kept", *["reused"] * 6, "kept"]


def test_compress_table_and_plain_progress(run: Run, folder: Path) -> None:
    code, out, err = run("compress", TEACHER, "--data", TRAIN, "-o", "s.onnx", *QUICK[:-1], "--eval", TEST)
    assert code == 0
    assert re.search(r"^parameters +156,210 +\d[\d,]+ +0\.\d\d$", out, re.MULTILINE)
    assert re.search(r"^accuracy on 500 samples +99\.6% +\d", out, re.MULTILINE)
    assert re.search(r"^n02 +width k=0\.5 +reused +\S+ → \S+ +5 ", out, re.MULTILINE)
    assert "student written to s.onnx\nrun directory s.run\n" in out
    lines = err.splitlines()
    assert [line for line in lines if line in ("load", "partition", "splice")] == ["load", "partition", "splice"]
    assert sum(" reused, NMSE " in line for line in lines) == 6
    assert lines[-1] == "evaluate: 500 samples"
    assert "\x1b" not in err and "\r" not in err


def test_compress_writes_beside_nothing_else_by_default(run: Run, tmp_path: Path) -> None:
    shutil.copy(TEACHER, tmp_path / "net.onnx")
    frozen = [part for unit in UNITS[1:] for part in ("--freeze", unit)]
    code, out, err = run("compress", "net.onnx", "--data", TRAIN, *frozen, *QUICK)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net-student.onnx", "net-student.run", "net.onnx"]
    assert (tmp_path / "net.onnx").read_bytes() == Path(TEACHER).read_bytes()
    assert "student written to net-student.onnx" in out


def test_nothing_to_distil_saves_the_teacher_and_exits_with_3(run: Run, tmp_path: Path) -> None:
    frozen = [part for unit in UNITS for part in ("--freeze", unit)]
    code, out, err = run("compress", TEACHER, "--data", TRAIN, "-o", "s.onnx", *frozen, *QUICK)
    assert (code, err) == (3, "")
    assert "nothing was distilled" in out
    code, out, _ = run("evaluate", "s.onnx", "--teacher", TEACHER, "--data", TEST, "--json", "-q")
    assert json.loads(out)["metrics"]["max_error"] == 0


def test_failing_neighbourhoods_are_kept_with_their_reason_and_exit_with_3(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("compress", TEACHER, "--data", TRAIN, "-o", "s.onnx", *QUICK, "--parity", "1e-30", "--json")
    report = json.loads(out)
    assert code == 3
    assert (tmp_path / "s.onnx").is_file()
    assert {n["status"] for n in report["neighbourhoods"]} == {"kept"}
    assert all(n["reason"] for n in report["neighbourhoods"])


SOURCE = """
from pathlib import Path
import numpy as np
def noisy():
    print("reading samples")
    for i in range(4):
        yield {"image": np.full((8, 1, 8, 8), i / 4, np.float32)}
def stopped():
    if any(Path("s.run").glob("students/*/done.json")):
        raise KeyboardInterrupt
    yield from noisy()
"""


def test_what_a_data_source_prints_does_not_reach_stdout(run: Run, tmp_path: Path) -> None:
    (tmp_path / "noisy_source.py").write_text(SOURCE)
    code, out, err = run("evaluate", TEACHER, "--data", "noisy_source:noisy", "--json", "-q")
    assert code == 0
    assert json.loads(out)["metrics"]["samples"] == 32
    assert set(err.splitlines()) == {"reading samples"}


def test_ctrl_c_names_the_run_directory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "stopped_source.py").write_text(SOURCE)
    code, out, err = run("compress", TEACHER, "--data", "stopped_source:stopped", "-o", "s.onnx", *QUICK)
    assert (code, out) == (130, "")
    assert not (tmp_path / "s.onnx").exists()
    told = "interrupted; the same command continues where it stopped (run directory s.run)"
    assert err.splitlines()[-1] == told
    assert list((tmp_path / "s.run").glob("students/*/done.json"))


def test_ctrl_c_before_there_is_anything_to_continue(run: Run, tmp_path: Path) -> None:
    (tmp_path / "stopping_source.py").write_text("def stop():\n    raise KeyboardInterrupt\n")
    code, out, err = run("evaluate", TEACHER, "--data", "stopping_source:stop", "-q")
    assert (code, out, err) == (130, "", "interrupted\n")


# evaluate


def test_evaluate_alone_and_beside_a_teacher(run: Run) -> None:
    code, out, _ = run("evaluate", TEACHER, "--data", TEST, "--json", "-q")
    document = json.loads(out)
    assert code == 0
    assert list(document) == ["model", "teacher", "data", "metrics"]
    assert document["metrics"]["accuracy"] == pytest.approx(0.996)
    assert document["metrics"]["agreement"] is None
    code, out, err = run("evaluate", TEACHER, "--teacher", TEACHER, "--data", TEST)
    assert code == 0
    assert re.search(r"^agreement with the teacher +100\.0%$", out, re.MULTILINE)
    assert "evaluate: 500 samples" in err.splitlines()


def test_output_survives_a_reader_that_has_gone() -> None:
    code = f"import sys; from ndonnx_cli.main import main; sys.exit(main(['inspect', {TEACHER!r}, '--json']))"
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert command.stdout is not None and command.stderr is not None
    command.stdout.close()
    assert command.stderr.read() == ""
    assert command.wait() == 0
    command.stderr.close()


# demo


@pytest.mark.slow
def test_demo_compares_teacher_and_student(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("demo", "--json", "-q", "-o", "s.onnx")
    document = json.loads(out)
    assert code == 0
    assert document["student"]["parameters"] < 0.6 * document["teacher"]["parameters"]
    assert document["metrics"]["student"]["accuracy"] > 0.97
    assert document["latency"]["batch_size"] == 64
    assert 0 < document["latency"]["ratio"]["low"] <= document["latency"]["ratio"]["high"]
    assert [path.name for path in tmp_path.iterdir()] == ["s.onnx"]


# Progress and numbers


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pace_counts_what_is_running_and_goes_on_when_a_stage_is_entered_again() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.enter(4)
    assert pace.left is None
    clock.now = 10
    pace.running["n01"] = (5, 10)
    assert pace.left == pytest.approx(70)  # half of one in 10 s, three and a half to go
    pace.running.clear()
    pace.done = 2
    clock.now = 20
    pace.enter(4)
    pace.done += 2  # told again by the run
    assert pace.left == pytest.approx(20)


def console_on(stream: io.StringIO, *, terminal: bool) -> Console:
    return Console(file=stream, force_terminal=terminal, width=100, markup=False, emoji=False, highlight=False)


def tell(teller: LineTeller | BarTeller) -> None:
    teller.stage("capture", 64, "samples")
    teller.advance(64)
    teller.note("[red]a note[/red] :smile:")
    teller.stage("distil", 2, "neighbourhoods")
    for step in range(1, 101):
        teller.step("[b]n01", step, 100, 0.5 / step)
    teller.finished("[b]n01", "distilled", 0.005, None)
    teller.advance()
    teller.finished("n02", "kept", None, "holds \x1b[31mIf")
    teller.advance()


@pytest.mark.parametrize(("verbose", "steps"), [(False, 0), (True, 10)])
def test_lines_are_plain_and_few(verbose: bool, steps: int) -> None:
    stream = io.StringIO()
    tell(LineTeller(console_on(stream, terminal=False), verbose))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "capture: 64 samples"
    assert "[red]a note[/red] :smile:" in lines
    assert sum(" step " in line for line in lines) == steps
    assert sum(line.startswith("[b]n01 distilled, NMSE 0.005") for line in lines) == 1
    assert "n02 kept: holds \\x1b[31mIf" in lines
    assert "\x1b" not in stream.getvalue()


def test_bars_leave_the_finished_lines_on_the_screen() -> None:
    stream = io.StringIO()
    with BarTeller(console_on(stream, terminal=True), verbose=False) as bars:
        tell(bars)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "[b]n01 distilled, NMSE 0.005" in shown
    assert "n02 kept: holds \\x1b[31mIf" in shown


def test_numbers_are_readable() -> None:
    assert [count_text(n) for n in (7, 156_210, 11_700_000, 25_000_000_000)] == ["7", "156,210", "11.7 M", "25.0 G"]
    assert [bytes_text(n) for n in (12, 626_400, 4e9)] == ["12 B", "626.4 kB", "4.0 GB"]
    assert [seconds_text(n) for n in (0.44, 12, 59.7, 185, 7800)] == [
        "0.4 s",
        "12 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
