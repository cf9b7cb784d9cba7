"""The run directory: nothing half-written is ever read as whole, and the next run continues."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ndonnx.errors import RunDirError
from ndonnx.runtime.run_directory import Entry, RunDir
from tests.helpers.run_folders import kill_after_first_line, posix, run

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
