"""The command line: its surface, its exit codes, what it prints where, and that it leaves nothing behind.

`python tests/cli/test_cli.py` writes the golden file of the surface anew, after a change on purpose.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from typer.main import get_command

import ndonnx
from ndonnx.config.recipe import Recipe, parse_augmentations, parse_bytes
from ndonnx.demo import data_path, teacher_path
from ndonnx.report.inspection import Coverage, Inspection
from ndonnx.report.piece import Piece
from ndonnx.runtime.units import bytes_text, count_text, seconds_text
from ndonnx_cli.main import build_app, main
from ndonnx_cli.progress import BarTeller, LineTeller, Pace
from ndonnx_cli.tables import print_inspection

GOLDEN = Path(__file__).parents[1] / "golden" / "command_line.txt"
TEACHER = str(teacher_path())
TRAIN = str(data_path("train"))
TEST = str(data_path("test"))
UNITS = [f"/unit{i}/relu2/Relu_output_0" for i in range(1, 7)]
METHODS = ["width", "sparsity", "lowrank", "activation", "removal", "custom"]
QUICK = ["--steps", "5", "--samples", "64", "--executor", "serial", "-q"]
SVG = "{http://www.w3.org/2000/svg}"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def parameters(command: str) -> dict[str, Any]:
    """The parameters of a command by their Python name."""
    return {parameter.name: parameter for parameter in get_command(build_app()).commands[command].params}  # type: ignore[attr-defined]


def commands() -> list[str]:
    return list(get_command(build_app()).commands)  # type: ignore[attr-defined]


def surface() -> str:
    """Every command, and below it a line for each of its flags: its names, what follows it, `...` if repeatable."""
    return "\n\n".join(
        "\n  ".join([command, *sorted(map(line_of, parameters(command).values()))]) for command in commands()
    )


def line_of(parameter: Any) -> str:
    if parameter.param_type_name != "option":
        return str(parameter.metavar)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return " ".join(part for part in (names, parameter.metavar, "..." if parameter.multiple else "") if part)


def write_golden() -> None:
    GOLDEN.write_text(surface() + "\n", encoding="utf-8")


# The surface


def test_surface_changes_only_on_purpose() -> None:
    assert surface() + "\n" == GOLDEN.read_text(encoding="utf-8"), "on purpose? then run: python tests/cli/test_cli.py"


def recipe_flags() -> dict[str, Any]:
    """The parameters of `compress` that are keys of the recipe."""
    aside = {"model", "data", "eval_data", "output", "recipe", "run_dir", "json", "quiet", "verbose"}
    aside |= {"input_settings", "shapes"}  # together they are the table `[inputs]`
    return {name: parameter for name, parameter in parameters("compress").items() if name not in aside}


def test_every_recipe_key_is_a_flag_and_the_other_way_round() -> None:
    flags = recipe_flags()
    assert set(flags) == set(Recipe.model_fields) - {"data", "search", "model_inputs", "extra"}
    for name, parameter in flags.items():
        assert parameter.opts == [f"--{name.replace('_', '-')}"]


@pytest.mark.parametrize("name", sorted(recipe_flags()))
def test_help_tells_the_default_of_the_recipe(name: str) -> None:
    default = Recipe.model_fields[name].default
    told = re.search(r"\(default: (.*)\)$", recipe_flags()[name].help)
    assert told is not None
    if default is None:
        assert not told[1][0].isupper() and told[1] != "none"  # in words
    elif name == "cache_budget":
        assert parse_bytes(told[1]) == default
    elif name == "augment":
        assert parse_augmentations(told[1]) == default
    else:
        assert told[1] == ({False: "off", True: "on"}[default] if isinstance(default, bool) else str(default)) or (
            default == () and not told[1][0].isupper()
        )


@pytest.mark.parametrize("name", ["method", "init", "executor", "device", "precision"])
def test_help_names_every_choice(name: str) -> None:
    parameter = recipe_flags()[name]
    for choice in METHODS if name == "method" else get_args(Recipe.model_fields[name].annotation):
        assert choice in f"{parameter.metavar} {parameter.help}"


def test_help_of_every_command_imports_nothing_heavy() -> None:
    code = f"""
import sys
from ndonnx_cli.main import main
for command in {[[], *([name] for name in commands())]}:
    assert main([*command, "--help"]) == 0
print(sorted({{"numpy", "onnx", "onnx_ir", "onnxruntime", "pandas", "torch"}} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
    assert "--cache-budget" in ended.stdout


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"ndonnx {ndonnx.__version__}\n", "")


def test_public_names_survive_the_import_of_modules_that_are_called_the_same() -> None:
    for name in ndonnx.__all__:
        before = getattr(ndonnx, name)
        for module in ("ndonnx.partition", "ndonnx.metrics.evaluation", "ndonnx.metrics.latency"):
            importlib.import_module(module)
        assert not isinstance(before, ModuleType) and getattr(ndonnx, name) is before


# Bad input


def hostile_inputs(folder: Path) -> None:
    """Files that a command must refuse."""
    whole = teacher_path().read_bytes()
    (folder / "truncated.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "text.onnx").write_text("this is a shopping list: milk, eggs\n" * 20)
    (folder / "empty.onnx").touch()
    (folder / "folder.onnx").mkdir()
    np.savez(folder / "wrong_key.npz", picture=np.zeros((4, 1, 8, 8), np.float32))
    np.savez(folder / "wrong_shape.npz", image=np.zeros((4, 3, 8, 8), np.float32))
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 not really")
    (folder / "unknown.toml").write_text("keap = 0.5\n")
    (folder / "out_of_range.toml").write_text("keep = 1.5\n")
    (folder / "no.toml").write_text("keep = = 1\n")
    (folder / "occupied").write_text("a file, no folder")


COMPRESS = ["compress", TEACHER, "-q"]
REFUSED = {
    "no command": ([], "Usage"),
    "unknown command": (["compres", TEACHER], "compres"),
    "unknown flag": ([*COMPRESS, "--kep", "0.5"], "--kep"),
    "flag without a number": ([*COMPRESS, "--data", TRAIN, "--steps", "many"], "--steps"),
    "no model": (["compress"], "MODEL"),
    "missing model": (["compress", "nothing.onnx", "--data", TRAIN, "-q"], "nothing.onnx: no such file"),
    "truncated model": (["compress", "truncated.onnx", "--data", TRAIN, "-q"], "truncated.onnx"),
    "text as model": (["compress", "text.onnx", "--data", TRAIN, "-q"], "text.onnx"),
    "empty model": (["inspect", "empty.onnx"], "empty.onnx"),
    "folder as model": (["inspect", "folder.onnx"], "folder.onnx"),
    "missing model to evaluate": (["evaluate", "nothing.onnx", "--data", TEST, "-q"], "nothing.onnx"),
    "missing teacher": (["evaluate", TEACHER, "--teacher", "nothing.onnx", "--data", TEST, "-q"], "nothing.onnx"),
    "no data": (COMPRESS, "--data-free works without data"),
    "no data to evaluate": (["evaluate", TEACHER], "--data is missing"),
    "missing data": ([*COMPRESS, "--data", "nothing.npz"], "nothing.npz: no such file"),
    "missing data for the comparison": ([*COMPRESS, "--data", TRAIN, "--eval", "nothing.npz"], "nothing.npz"),
    "unknown kind of data": ([*COMPRESS, "--data", "things.csv"], "expected a .npz"),
    "wrong key in the data": ([*COMPRESS, "--data", "wrong_key.npz"], "image"),
    "wrong shape of the data": ([*COMPRESS, "--data", "wrong_shape.npz"], "image"),
    "broken data": ([*COMPRESS, "--data", "broken.npz"], "broken.npz"),
    "no such folder to write to": ([*COMPRESS, "--data", TRAIN, "-o", "no/such/s.onnx"], "no/such/s.onnx"),
    "output is a folder": ([*COMPRESS, "--data", TRAIN, "-o", "folder.onnx"], "folder.onnx"),
    "run directory under a file": ([*COMPRESS, "--data", TRAIN, "--run-dir", "occupied/run"], "occupied"),
    "data to inspect on without a check": (["inspect", TEACHER, "--data", TEST], "--check"),
    "wrong key in the data to check on": (["inspect", TEACHER, "--check", "--data", "wrong_key.npz"], "image"),
    "drawing into no folder": (["inspect", TEACHER, "--svg", "no/such/a.svg"], "a.svg"),
    "missing recipe": ([*COMPRESS, "--data", TRAIN, "--recipe", "nothing.toml"], "nothing.toml"),
    "recipe that is no TOML": ([*COMPRESS, "--data", TRAIN, "--recipe", "no.toml"], "no.toml"),
    "unknown key in the recipe": ([*COMPRESS, "--data", TRAIN, "--recipe", "unknown.toml"], "'keap'"),
    "value out of range in the recipe": (["inspect", TEACHER, "--recipe", "out_of_range.toml"], "'keep'"),
    "flag out of range": ([*COMPRESS, "--data", TRAIN, "--keep", "0"], "'keep'"),
    "unknown choice": ([*COMPRESS, "--data", TRAIN, "--init", "magic"], "'least-squares'"),
    "size without sense": ([*COMPRESS, "--data", TRAIN, "--cache-budget", "4 apples"], "4 apples"),
    "unknown granularity": (["inspect", TEACHER, "--granularity", "crumb"], "crumb"),
    "unknown value to cut": (["inspect", TEACHER, "--cut", "nowhere"], "nowhere"),
    "unknown value to freeze": ([*COMPRESS, "--data", TRAIN, "--freeze", "nowhere"], "nowhere"),
    "quiet and verbose": ([*COMPRESS, "--data", TRAIN, "-v"], "-q and -v"),
    "a name that would command the terminal": (["inspect", "a\x1b[31m\nb.onnx"], "b.onnx"),
}


@pytest.mark.parametrize(("arguments", "told"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    run: Run, tmp_path: Path, arguments: list[str], told: str
) -> None:
    hostile_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*arguments)
    assert code == 2
    assert told in out + err
    assert sorted(tmp_path.rglob("*")) == before
    if arguments:
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1
        assert err.strip().isprintable()


def test_unknown_method_is_told_with_the_known_ones(run: Run) -> None:
    code, out, err = run("compress", TEACHER, "--data", TRAIN, "-o", "s.onnx", "--method", "magic", *QUICK)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "'method' = 'magic': Input should be " in err and all(method in err for method in METHODS)


def test_error_comes_after_the_progress_without_a_traceback(run: Run) -> None:
    code, out, err = run("compress", TEACHER, "--data", "nothing.npz")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: nothing.npz")
    assert "Traceback" not in err


# inspect


def test_inspect_json_keeps_its_contract(run: Run) -> None:
    code, out, err = run("inspect", TEACHER, "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    keys = "model opset parameters macs neighbourhoods coverage smallest shapes open_sizes"
    assert list(document) == keys.split()
    pieces = document["neighbourhoods"]
    for piece in pieces:
        keys = "name input context output nodes parameters macs widths status reason parity frozen note removable"
        assert list(piece) == [*keys.split(), "student_of"]
        assert (piece["status"] == "kept") == (piece["reason"] is not None)
        assert piece["status"] == "kept" or piece["widths"]
    assert (document["opset"], document["parameters"]) == (17, 156_210)
    assert sum(piece["parameters"] for piece in pieces) == document["parameters"]
    assert sum(piece["macs"] for piece in pieces) == document["macs"]
    assert [piece["output"] for piece in pieces if piece["status"] == "distillable"] == UNITS
    inside = sum(piece["parameters"] for piece in pieces if piece["status"] == "distillable")
    coverage = document["coverage"]
    assert coverage["parameters"] == pytest.approx(inside / document["parameters"])
    assert coverage["removable"] == pytest.approx(sum(p["removable"] for p in pieces) / document["parameters"])
    assert (document["smallest"], document["shapes"]) == ("width 0.1", {"image": [1, 1, 8, 8]})


def test_inspect_obeys_flags_before_the_recipe(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f'freeze = ["{UNITS[0]}"]\n')

    def frozen(*more: str) -> list[str]:
        _, out, _ = run("inspect", TEACHER, "--json", "--recipe", "r.toml", *more)
        pieces = json.loads(out)["neighbourhoods"]
        return [piece["output"] for piece in pieces if (piece["reason"] or "").startswith("frozen")]

    assert frozen() == UNITS[:1]
    assert frozen("--freeze", UNITS[2], "--freeze", UNITS[4]) == [UNITS[2], UNITS[4]]


def test_inspect_table_has_a_row_for_each_neighbourhood(run: Run) -> None:
    code, out, _ = run("inspect", TEACHER)
    head, coverage, _, _, *rows = out.rstrip().splitlines()
    assert code == 0
    assert "opset 17" in head and "156,210" in head
    assert "6 of 8 neighbourhoods" in coverage and "99.5%" in coverage
    assert [row.split()[0] for row in rows] == [f"n{i:02}" for i in range(1, 9)]
    assert f"image → {'/relu/Relu_output_0'}" in rows[0] and "no width" in rows[0]
    assert not any(line.endswith(" ") for line in out.splitlines())


def test_inspect_table_leaves_out_what_is_long(capsys: pytest.CaptureFixture[str]) -> None:
    name = "/model/layers.0/self_attn/projection_of_the_values/Transpose_output_0"
    piece = Piece("n01", name, ["mask", "b", "c"], "y", 3, 750, 1000, [*range(20)], "kept", "why", 1.5e-6)
    print_inspection(Inspection("m.onnx", 17, 1000, 1000, [piece], Coverage(0.0, 0.0)))
    row = capsys.readouterr().out.splitlines()[4].split()
    assert len(row[1]) == 36 and row[1].startswith("/model…") and row[1].endswith("Transpose_output_0")
    assert row[2:9] == ["→", "y", "mask", "and", "2", "more", "3"]
    assert row[9:13] == ["750", "75.0%", "1,000", "100.0%"]
    assert row[13:] == ["0,", "1,", "2,", "3,", "4,", "…", "(20)", "kept", "1.5e-06", "why"]


def test_inspect_can_check_what_it_tells(run: Run) -> None:
    code, out, err = run("inspect", TEACHER, "--check", "--json")
    pieces = json.loads(out)["neighbourhoods"]
    assert code == 0
    assert all((piece["parity"] is not None) == (piece["status"] == "distillable") for piece in pieces)
    assert all(piece["parity"] < 1e-4 for piece in pieces if piece["parity"] is not None)
    assert err.splitlines() == ["start", "check: 6 neighbourhoods"]
    code, out, err = run("inspect", TEACHER, "--check", "--data", TEST, "-q")
    assert (code, err) == (0, "")
    assert "parity" in out.splitlines()[2]


def test_drawing_has_a_box_for_each_neighbourhood(run: Run, tmp_path: Path) -> None:
    assert run("inspect", TEACHER, "--svg", "a.svg")[0] == 0
    groups = ElementTree.parse(tmp_path / "a.svg").getroot().findall(f"{SVG}g")
    boxes = [(group.find(f"{SVG}rect"), group.findtext(f"{SVG}title")) for group in groups]
    assert [title.split(":")[0] for _, title in boxes if title] == [f"n{i:02}" for i in range(1, 9)]
    widths = [float(box.get("width", "")) for box, _ in boxes if box is not None]
    assert widths[6] == max(widths)  # 41,568 of 156,210 parameters
    assert widths[5] / widths[6] == pytest.approx(40_080 / 41_568, rel=1e-2)
    colours = [box.get("fill") for box, _ in boxes if box is not None]
    assert colours[0] == colours[7] != colours[1]
    assert len(set(colours[1:7])) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]


def test_drawing_survives_hostile_names() -> None:
    name = "</text><script>alert(1)</script>&\x00\x1b]0;\ud800\"'" + "x" * 500
    piece = Piece("n01", name, [name], name, 1, 0, 0, [], "kept", name)
    drawing = Inspection(name, 17, 0, 0, [piece, piece], Coverage(0.0, 0.0)).to_svg()
    root = ElementTree.fromstring(drawing.encode("utf-8"))
    assert not list(root.iter(f"{SVG}script"))
    assert all(len(text.text or "") < 120 for text in root.iter(f"{SVG}text"))


def test_drawing_of_a_model_without_neighbourhoods() -> None:
    ElementTree.fromstring(Inspection("m.onnx", 17, 0, 0, [], Coverage(0.0, 0.0)).to_svg())


# compress


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a tiny run has ended: `s.onnx` and `s.run`."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ["--data", TRAIN, "-o", str(folder / "s.onnx"), *QUICK]
    assert main(["compress", TEACHER, *flags]) == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """The same, as a copy in the current folder of `run`."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


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


if __name__ == "__main__":
    write_golden()
