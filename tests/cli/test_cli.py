"""The command line: its surface, its exit codes, what it prints where, and that it leaves nothing behind.

`python tests/cli/test_cli.py` writes the golden file of the surface anew, after a change on purpose."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from typer.main import get_command

import ndonnx
from ndonnx.config.recipe import Recipe, parse_augmentations, parse_bytes
from ndonnx.demo import teacher_path
from ndonnx.report.inspection import Coverage, Inspection
from ndonnx.report.piece import Piece
from ndonnx_cli.main import build_app
from ndonnx_cli.tables import print_inspection
from tests.helpers.command import QUICK, TEACHER, TEST, TRAIN, UNITS, Run, parameters

GOLDEN = Path(__file__).parents[1] / "golden" / "command_line.txt"
METHODS = ["width", "sparsity", "lowrank", "activation", "removal", "custom"]
SVG = "{http://www.w3.org/2000/svg}"


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
    "wrong key in the data to look at": (["inspect", TEACHER, "--data", "wrong_key.npz"], "image"),
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


def test_what_libraries_log_stays_out_of_the_answer(tmp_path: Path) -> None:
    """onnx_ir warns of an input that nothing makes, and Python prints what nobody handles."""
    model = onnx.load(TEACHER)
    model.graph.node[-1].input[0] = "nowhere"
    onnx.save(model, tmp_path / "broken.onnx")
    command = "import sys; from ndonnx_cli.main import main; sys.exit(main())"
    done = subprocess.run(  # in this process pytest handles what is logged
        [sys.executable, "-c", command, "inspect", str(tmp_path / "broken.onnx")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "'nowhere'" in done.stderr


def test_error_comes_after_the_progress_without_a_traceback(run: Run) -> None:
    code, out, err = run("compress", TEACHER, "--data", "nothing.npz")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: nothing.npz")
    assert "Traceback" not in err


def test_a_lack_of_memory_is_told_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 288. GiB")

    monkeypatch.setattr("ndonnx.evaluate", refuses)
    code, out, err = run("evaluate", TEACHER, "--data", "nothing.npz")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: there is too little memory for this (Unable to allocate 288. GiB)")


# inspect


def test_inspect_json_keeps_its_contract(run: Run) -> None:
    code, out, err = run("inspect", TEACHER, "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    keys = "model opset parameters macs neighbourhoods coverage smallest shapes open_sizes data"
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


def test_inspect_shows_what_the_data_are_taken_for(run: Run) -> None:
    code, out, _ = run("inspect", TEACHER, "--data", TEST)
    assert code == 0 and "taken for" in out and "pictures of" in out and "classification (logits)" in out
    code, out, _ = run("inspect", TEACHER, "--data", TEST, "--task", "regression", "--json")
    found = json.loads(out)["data"]
    assert code == 0 and found["samples"] == 64 and [each["looks"] for each in found["outputs"]] == ["regression"]


if __name__ == "__main__":
    write_golden()
