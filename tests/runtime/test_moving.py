"""Moving a job's files to a node and back: each goes once, arrives whole or not at all, goes when nothing reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ndonnx.errors import RunDirError
from ndonnx.runtime.executor import moving
from ndonnx.runtime.executor.moving import Part, Store, Warehouse, collect, pack, put_down, under, unpack
from ndonnx.runtime.run_directory import Entry, RunDir


class Network:
    """Parts by number, and how often each was fetched."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.fetched: list[int] = []

    def put(self, part: Part) -> int:
        self.parts.append(part)
        return len(self.parts) - 1

    def get(self, key: int) -> Part:
        self.fetched.append(key)
        return self.parts[key]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    """Small parts."""
    monkeypatch.setattr(moving, "PART", 4)
    return Network()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A node with an empty store."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(moving.tempfile, "gettempdir", lambda: str(tmp_path / "node"))
    store = Store("run", "node")
    yield store
    store.close()


@pytest.fixture
def values(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "store" / "v0.npy"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"0123456789")
    return path


@dataclass(frozen=True)
class Held:
    """A job that holds paths wherever it can."""

    name: str
    entry: Entry
    stores: Mapping[str, tuple[Path, str]]

    def __call__(self, on_step: Any) -> None: ...


def test_every_path_of_a_job_leads_into_the_tree(tmp_path: Path) -> None:
    job = Held("job", RunDir("run").entry("students", "n02"), {"x": (tmp_path / "store", "/not/a/path")})
    moved = unpack(pack(job), Path("/node"))
    assert isinstance(moved, Held) and moved.name == "job"
    assert moved.entry.path == under(Path("/node"), Path.cwd() / "run" / "students" / "n02")
    assert moved.stores == {"x": (under(Path("/node"), tmp_path / "store"), "/not/a/path")}


def test_a_file_goes_once_to_the_network_and_once_to_a_node(network: Network, node: Store, values: Path) -> None:
    house = Warehouse(network.put)
    first, second = house.send([values, values]), house.send([values])
    assert first == second and house.sent_bytes == 10 and len(network.parts) == 3
    for _ in range(2):
        with node.tree(first, network.get) as root:
            assert under(root, values).read_bytes() == b"0123456789"
    assert network.fetched == [0, 1, 2] and not root.exists()


def test_one_that_changes_is_another_and_the_old_one_is_let_go(network: Network, node: Store, values: Path) -> None:
    house = Warehouse(network.put)
    old = house.send([values])
    with node.tree(old, network.get) as before:
        values.write_bytes(b"abc")
        new = house.send([values])
        gone = house.forget_deleted()
        assert gone == [old[0].digest]
        node.drop(gone)
        with node.tree(new, network.get) as after:
            assert under(after, values).read_bytes() == b"abc"
        assert under(before, values).read_bytes() == b"0123456789", "a job that still runs keeps what it reads"
    values.unlink()
    assert set(house.forget_deleted()) == {old[0].digest, new[0].digest}
    values.write_bytes(b"0123456789")
    house.send([values])
    assert house.forget_deleted() == [new[0].digest], "what came back is not deleted behind its back"


def test_what_is_written_again_unchanged_does_not_go_again(network: Network, values: Path) -> None:
    house = Warehouse(network.put)
    (first,) = house.send([values])
    values.unlink()
    values.write_bytes(b"0123456789")
    (second,) = house.send([values])
    assert first == second and len(network.parts) == 3


def test_one_that_arrives_damaged_is_refused_and_comes_again(network: Network, node: Store, values: Path) -> None:
    sent = Warehouse(network.put).send([values])
    good, network.parts[1] = network.parts[1], network.parts[0]
    with pytest.raises(RunDirError, match=r"v0\.npy changed on its way here"), node.tree(sent, network.get):
        pass
    network.parts[1] = good
    with node.tree(sent, network.get) as root:
        assert under(root, values).read_bytes() == b"0123456789"


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
def test_what_a_killed_process_left_on_a_node_goes_with_the_next_run(node: Store) -> None:
    code = "import tempfile, sys, os; tempfile.gettempdir = lambda: sys.argv[1]\n"
    code += "from ndonnx.runtime.executor.moving import Store\nprint(Store('killed', 'node').path, flush=True); "
    home = str(node.path.parent.parent)
    living = subprocess.Popen([sys.executable, "-c", code + "input()", home], stdin=-1, stdout=-1, text=True)
    assert living.stdout is not None
    folder = Path(living.stdout.readline().strip())
    Store("second", "node")
    assert folder.is_dir(), "its process lives"
    living.kill()
    living.communicate()
    Store("third", "node")
    assert not folder.exists() and node.path.is_dir()


def test_what_comes_back_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = (
        RunDir(tmp_path / "there").entry("students", "n02"),
        RunDir(tmp_path / "here").entry("students", "n02"),
    )
    (there.begin() / "sub").mkdir()
    (there.path / "sub" / "student.onnx").write_bytes(b"student")
    there.commit({"nmse": 0.5})
    files = collect(there.path)
    write, written = moving.atomic_write, []

    def stopped(path: Path, contents: bytes) -> None:
        written.append(path.name)
        if path.name == "student.onnx":
            raise RunDirError("the disk is full")
        write(path, contents)

    monkeypatch.setattr(moving, "atomic_write", stopped)
    with pytest.raises(RunDirError, match="full"):
        put_down(files, here.path)
    assert not here.done and "done.json" not in written
    monkeypatch.setattr(moving, "atomic_write", write)
    put_down(files, here.path)
    assert here.done and here.meta() == {"nmse": 0.5} and collect(here.path) == files
    assert os.listdir(here.path.parent) == ["n02"]
