"""The run directory: nothing half-written is ever read as whole, and the next run continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ndonnx.errors import RunDirError
from ndonnx.runtime.atomic import atomic_write, atomic_write_json
from ndonnx.runtime.fingerprints import fingerprint, fingerprint_file
from ndonnx.runtime.run_directory import Entry, RunDir

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
structures = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def run(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process that has this package at hand."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def kill_after_first_line(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() != ""
    process.kill()
    process.communicate()


# Fingerprints


def test_fingerprints_never_change() -> None:
    # A change here makes every block library and run directory in the world start anew.
    parts: list[Any] = [b"\x00", "ü", 1, 0.1, True, None, {"b": 1, "a": [1, 2]}, (1.0, ("x",))]
    assert fingerprint(*parts) == "2c36eecef55e2ca83b87214823723ff6"
    assert fingerprint() == "050d7cdba20a7abd11b4ff3b37aff114"


def test_fingerprints_tell_types_and_groupings_apart() -> None:
    lookalikes: list[tuple[Any, ...]] = [
        ("1",), (1,), (1.0,), (True,), (b"1",), (None,), ("",), (), ([],), ({},), ("1", ""), ("", "1"), (["1"],),
        ([["1"]],), ({"1": None},), ("s", "1"), (["s", "1"],), (0.0,), (-0.0,), (0,), (False,), ({"a": 1}, {"b": 2}),
        ({"a": 1, "b": 2},), (float("nan"),), ("nan",), ("\udc80",), ("\\udc80",), (10**5000,),
    ]  # fmt: skip
    assert len({fingerprint(*parts) for parts in lookalikes}) == len(lookalikes)


@settings(max_examples=60, deadline=None)
@given(structures, structures)
def test_equal_fingerprints_mean_equal_parts(one: Any, two: Any) -> None:
    # repr tells 1 from True and from 1.0, which == does not; sorted keys make it canonical.
    def canonical(part: Any) -> str:
        if isinstance(part, dict):
            return repr(sorted((key, canonical(value)) for key, value in part.items()))
        return f"[{[canonical(item) for item in part]}]" if isinstance(part, list) else repr(part)

    assert (fingerprint(one) == fingerprint(two)) == (canonical(one) == canonical(two))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), scalars, max_size=6), st.lists(scalars))
def test_order_of_keys_and_kind_of_sequence_do_not_count(mapping: dict[str, Any], items: list[Any]) -> None:
    assert fingerprint(mapping) == fingerprint(dict(reversed(mapping.items())))
    assert fingerprint(items) == fingerprint(tuple(items))


@pytest.mark.parametrize("part", [{1: "a"}, {1, 2}, object(), [object()], {"a": 1j}])
def test_what_has_no_stable_form_is_refused(part: Any) -> None:
    with pytest.raises(TypeError, match="cannot fingerprint"):
        fingerprint(part)


def test_fingerprint_of_a_file(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    contents = bytes(range(256)) * 5000
    one.write_bytes(contents)
    two.write_bytes(contents)
    assert fingerprint_file(one) == fingerprint_file(str(two))
    two.write_bytes(contents[:-1] + b"\x00")
    assert fingerprint_file(one) != fingerprint_file(two)
    with pytest.raises(RunDirError, match=r"missing: cannot read: No such file"):
        fingerprint_file(tmp_path / "missing")


# Atomic writes


def test_atomic_write_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for contents in (b"old" * 1000, b"", b"new"):
        atomic_write(path, contents)
        assert path.read_bytes() == contents
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_writer_gets_another_name_in_the_same_folder_with_the_same_suffix(tmp_path: Path) -> None:
    given_paths = []

    def write(path: Path) -> None:
        given_paths.append(path)
        path.write_text("model")

    atomic_write(tmp_path / "student.onnx", write)
    assert given_paths[0].parent == tmp_path
    assert given_paths[0].name != "student.onnx"
    assert given_paths[0].suffix == ".onnx"
    assert os.listdir(tmp_path) == ["student.onnx"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), ValueError("broken"), GeneratorExit()])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, write)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_refused_write_says_where_and_why(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"a\.bin: cannot write: No such file or directory; create the missing"):
        atomic_write(tmp_path / "missing" / "a.bin", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunDirError, match=r"folder: cannot write: ") as caught:
        atomic_write(tmp_path / "folder", b"x")
    assert "\n" not in str(caught.value)
    with pytest.raises(RunDirError, match=r"a\.bin: cannot write: "):
        atomic_write(tmp_path / "a.bin", lambda temporary: None)
    assert os.listdir(tmp_path) == ["folder"]


@posix
@pytest.mark.parametrize("contents", ["bytes(3_000_000)", "lambda path: path.write_bytes(bytes(3_000_000)) and None"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, contents: str) -> None:
    # A limit on the size of files fails in the middle of a write, as a full disk does.
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    code = f"""
import resource, sys
from pathlib import Path
from ndonnx.errors import RunDirError
from ndonnx.runtime.atomic import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    atomic_write(Path(sys.argv[1]), {contents})
except RunDirError as error:
    print(error)
"""
    out, err = run(code, str(path)).communicate()
    assert out.startswith(f"{path}: cannot write: File too large"), err
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@posix
def test_a_killed_write_is_never_seen(tmp_path: Path) -> None:
    code = """
import sys
from itertools import cycle
from pathlib import Path
from ndonnx.runtime.atomic import atomic_write
path = Path(sys.argv[1])
for letter in cycle((b"a", b"b")):
    atomic_write(path, letter * 3_000_000)
    print("written", flush=True)
"""
    for _ in range(4):
        kill_after_first_line(run(code, str(tmp_path / "x.bin")))
        contents = (tmp_path / "x.bin").read_bytes()
        assert len(contents) == 3_000_000
        assert len(set(contents)) == 1
    (tmp_path / ".ndonnx-tmp-0123").write_bytes(b"half")
    with RunDir(tmp_path):
        assert sorted(os.listdir(tmp_path)) == ["lock", "x.bin"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(json_values)
def test_json_round_trip(tmp_path: Path, value: Any) -> None:
    atomic_write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_bytes()) == value


def test_json_is_strict_and_takes_any_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write_json(path, {"name": "caf\udce9 ü"})
    for value in (float("nan"), float("inf"), b"bytes", {1, 2}):
        with pytest.raises((TypeError, ValueError)):
            atomic_write_json(path, {"value": value})
    assert json.loads(path.read_bytes()) == {"name": "caf\udce9 ü"}
    assert os.listdir(tmp_path) == ["a.json"]


# Entries


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    """A committed entry of two files."""
    entry = RunDir(tmp_path / "run").entry("students", "n0")
    folder = entry.begin()
    (folder / "weights.bin").write_bytes(b"weights")
    (folder / "more").mkdir()
    (folder / "more" / "log.txt").write_bytes(b"log")
    entry.commit({"nmse": 0.5, "shape": (1, 2)})
    return entry


def test_an_entry_is_done_once_it_is_committed(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    entry = run_dir.entry("students", "n0")
    assert not entry.done
    folder = entry.begin()
    assert folder == tmp_path / "run" / "students" / "n0"
    (folder / "weights.bin").write_bytes(b"weights")
    assert not entry.done
    assert run_dir.entries("students") == []
    entry.commit({"nmse": 0.5, "shape": (1, 2)})
    again = RunDir(tmp_path / "run").entry("students", "n0")
    assert again.done
    assert again.meta() == {"nmse": 0.5, "shape": [1, 2]}


def test_an_entry_may_be_empty(tmp_path: Path) -> None:
    entry = RunDir(tmp_path).entry("stage", "partition")
    entry.begin()
    entry.commit({})
    assert entry.done
    assert entry.meta() == {}


@pytest.mark.parametrize("name", ["weights.bin", "more/log.txt"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "changed", "folder"])
def test_a_damaged_file_undoes_its_entry(entry: Entry, name: str, damage: str) -> None:
    path = entry.path / name
    contents = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "shorter":
            path.write_bytes(contents[:-1])
        case "longer":
            path.write_bytes(contents + b"\0")
        case "changed":
            path.write_bytes(b"\0" + contents[1:])
        case "folder":
            path.unlink()
            path.mkdir()
    assert not entry.done


@pytest.mark.parametrize(
    "marker",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"meta": {}}',
        b'{"meta": [], "files": {}}',
        b'{"meta": {}, "files": []}',
        b'{"meta": {}, "files": {"weights.bin": null}}',
        b'{"meta": {}, "files": {"weights.bin": {"size": 7}}}',
        b'{"meta": {}, "files": {"weights.bin": {"size": "7", "blake2b": null}}}',
        b'{"meta": {}, "files": {"weights.bin": {"size": 7, "blake2b": 1}}}',
        b'{"meta": {}, "files": {"weights.bin\\u0000": {"size": 7, "blake2b": null}}}',
        b'{"meta": {}, "files": {"": {"size": 7, "blake2b": null}}}',
        b'{"meta": {}, "files": {"../n0/weights.bin": {"size": 7, "blake2b": null}}}',
        b'{"meta": {}, "files": {"%s": {"size": 7, "blake2b": null}}}',
        b'{"meta": {}, "files": {"' + b"x" * 5000 + b'": {"size": 7, "blake2b": null}}}',
        b"[" * 100_000,
    ],
)
def test_a_hostile_marker_marks_nothing(entry: Entry, marker: bytes) -> None:
    if b"%s" in marker:
        marker = marker % (entry.path / "weights.bin").as_posix().encode()
    (entry.path / "done.json").write_bytes(marker)
    assert not entry.done
    entry.begin()
    assert os.listdir(entry.path) == []


def test_meta_of_an_entry_that_is_not_done(tmp_path: Path, entry: Entry) -> None:
    with pytest.raises(RunDirError, match=r"missing or damaged; run again"):
        RunDir(tmp_path).entry("students", "n9").meta()
    (entry.path / "done.json").write_bytes(b"{")
    with pytest.raises(RunDirError, match=r"done\.json"):
        entry.meta()


def test_without_digests_only_sizes_count(tmp_path: Path) -> None:
    entry = RunDir(tmp_path).entry("activations", "n0")
    path = entry.begin() / "a.bin"
    path.write_bytes(b"large")
    entry.commit({}, digest=False)
    path.write_bytes(b"LARGE")
    assert entry.done
    path.write_bytes(b"larger")
    assert not entry.done


def test_begin_starts_from_nothing(entry: Entry) -> None:
    (entry.path / ".hidden").write_bytes(b"left over")
    entry.begin()
    assert os.listdir(entry.path) == []
    assert not entry.done


def test_remove(entry: Entry) -> None:
    entry.remove()
    assert not entry.path.exists()
    assert not entry.done
    entry.remove()


def test_meta_that_is_not_json_commits_nothing(tmp_path: Path) -> None:
    entry = RunDir(tmp_path).entry("students", "n0")
    entry.begin()
    for value in (float("nan"), object()):
        with pytest.raises((TypeError, ValueError)):
            entry.commit({"value": value})
        assert not entry.done
        assert os.listdir(entry.path) == []


def test_commit_without_its_folder_says_so(tmp_path: Path) -> None:
    entry = RunDir(tmp_path).entry("students", "n0")
    with pytest.raises(RunDirError, match=r"done\.json: cannot write: No such file"):
        entry.commit({})


@posix
def test_a_read_only_file_is_committed_too(tmp_path: Path) -> None:
    entry = RunDir(tmp_path).entry("teacher", "copy")
    path = entry.begin() / "model.onnx"
    path.write_bytes(b"model")
    path.chmod(0o444)
    entry.commit({})
    assert entry.done
    entry.remove()
    assert not entry.path.exists()


@posix
def test_a_link_in_place_of_an_entry_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (tmp_path / "run" / "students").mkdir(parents=True)
    (tmp_path / "run" / "students" / "n0").symlink_to(precious)
    with pytest.raises(RunDirError, match="n0: cannot remove"):
        RunDir(tmp_path / "run").entry("students", "n0").begin()
    assert (precious / "thesis.txt").exists()


def test_entries_lists_what_is_done_by_key(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for key in ("b", "c", "a"):
        run_dir.entry("students", key).begin()
        run_dir.entry("students", key).commit({"key": key})
    run_dir.entry("students", "unfinished").begin()
    run_dir.entry("other", "d").begin()
    (tmp_path / "students" / ".hidden").mkdir()
    (tmp_path / "students" / "stray.txt").write_text("stray")
    (tmp_path / "students" / "c" / "done.json").write_text("{")
    assert [entry.key for entry in run_dir.entries("students")] == ["a", "b"]
    assert [entry.meta()["key"] for entry in run_dir.entries("students")] == ["a", "b"]
    assert run_dir.entries("nothing") == []


@posix
def test_a_killed_run_leaves_whole_entries_only(tmp_path: Path) -> None:
    code = """
import itertools, sys
from ndonnx.runtime.run_directory import RunDir
with RunDir(sys.argv[1]) as run_dir:
    for number in itertools.count():
        entry = run_dir.entry("students", f"n{number}")
        if entry.done:
            assert entry.meta() == {"number": number}
            continue
        folder = entry.begin()
        for name in "abc":
            (folder / name).write_bytes(bytes([number % 256]) * 300_000)
        entry.commit({"number": number})
        print(number, flush=True)
"""
    run_dir = RunDir(tmp_path / "run")
    before = 0
    for _ in range(3):
        kill_after_first_line(run(code, str(run_dir.path)))
        entries = run_dir.entries("students")
        assert len(entries) > before
        before = len(entries)
        for entry in entries:
            number = entry.meta()["number"]
            assert all((entry.path / name).read_bytes() == bytes([number % 256]) * 300_000 for name in "abc")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a\\b", "..\\a", "C:a", ".hidden", "a\0b", "a\nb", "\udc80"]
)
def test_names_that_leave_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    run_dir = RunDir(tmp_path)
    with pytest.raises(RunDirError, match="cannot name a folder"):
        run_dir.entry("students", name)
    with pytest.raises(RunDirError, match="cannot name a folder"):
        run_dir.entry(name, "n0")
    with pytest.raises(RunDirError, match="cannot name a folder"):
        run_dir.entries(name)


def test_no_kind_takes_the_locks_place(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="cannot name a folder"):
        RunDir(tmp_path).entry("lock", "n0")


# The lock

HOLD = """
import sys, time
from ndonnx.runtime.run_directory import RunDir
with RunDir(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    process = run(HOLD, str(tmp_path / "run"))
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(RunDirError, match=rf"run: in use by process {process.pid} on .+; wait .+ --run-dir"),
        RunDir(tmp_path / "run"),
    ):
        pytest.fail("entered a directory that is in use")
    process.kill()
    process.communicate()
    assert (tmp_path / "run" / "lock").read_text().startswith(f"process {process.pid} ")
    with RunDir(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").read_text().startswith(f"process {os.getpid()} ")


def test_the_same_process_is_a_second_run_too(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with run_dir:
        with pytest.raises(RunDirError, match=f"in use by process {os.getpid()} "), RunDir(tmp_path):
            pytest.fail("entered twice")
        with pytest.raises(RunDirError, match="entered twice"), run_dir:
            pytest.fail("entered twice")
        with pytest.raises(RunDirError, match="in use by"), RunDir(tmp_path):
            pytest.fail("the failed second entry has freed the lock")
    with run_dir:
        pass


@posix
def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunDirError, match="cannot use as the run directory"), RunDir(tmp_path / "run"):
        pytest.fail("entered")
    assert (tmp_path / "precious").read_text() == "years of work"


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    for path in (tmp_path / "run", tmp_path / "run" / "inner"):
        with pytest.raises(RunDirError, match="cannot use as the run directory"), RunDir(path):
            pytest.fail("entered")


def test_a_leftover_that_cannot_go_does_not_keep_the_lock(tmp_path: Path) -> None:
    leftover = tmp_path / ".ndonnx-tmp-folder"
    leftover.mkdir()
    with pytest.raises(RunDirError, match="cannot use as the run directory"), RunDir(tmp_path):
        pytest.fail("entered")
    leftover.rmdir()
    with RunDir(tmp_path):
        pass


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunDir(tmp_path / "runs" / "one") as run_dir:
        run_dir.entry("students", "n0").begin()
        raise KeyError("bad input")
    assert os.listdir(tmp_path) == []


def test_what_a_failed_run_has_written_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunDir(tmp_path / "runs" / "one") as run_dir:
        run_dir.entry("students", "n0").begin()
        run_dir.entry("students", "n0").commit({})
        raise KeyError("a bug")
    with RunDir(tmp_path / "runs" / "one") as run_dir:
        assert [entry.key for entry in run_dir.entries("students")] == ["n0"]


def test_a_directory_that_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(KeyError), RunDir(tmp_path / "one"):
        raise KeyError("bad input")
    assert (tmp_path / "one").is_dir()


def test_an_empty_run_that_ends_well_stays(tmp_path: Path) -> None:
    with RunDir(tmp_path / "one"):
        pass
    assert (tmp_path / "one").is_dir()


def test_only_one_is_ever_inside_even_while_failed_runs_remove_the_directory(tmp_path: Path) -> None:
    inside: list[int] = []
    crowds: list[list[int]] = []
    visits: list[int] = []

    def visit(me: int) -> None:
        for _ in range(100):
            try:
                with RunDir(tmp_path / "runs" / "one"):
                    inside.append(me)
                    if inside != [me]:
                        crowds.append(list(inside))
                    visits.append(me)
                    inside.remove(me)
                    raise KeyError("bad input")
            except (KeyError, RunDirError):
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(visit, range(4)))
    assert crowds == []
    assert visits != []
