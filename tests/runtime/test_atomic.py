"""Fingerprints and atomic writes: a file is there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ndonnx.errors import RunDirError
from ndonnx.runtime.atomic import atomic_write, atomic_write_json
from ndonnx.runtime.fingerprints import fingerprint, fingerprint_file
from ndonnx.runtime.run_directory import RunDir
from tests.helpers.run_folders import kill_after_first_line, posix, run

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
structures = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
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
