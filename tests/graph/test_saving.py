"""Saving: what was loaded comes back, and no kill and no full disk leaves half a file."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ndonnx.errors import RunDirError
from ndonnx.graph import load, save, serialise
from ndonnx.graph.save import check_writable, tensor_bytes
from tests.helpers.models import BUILDERS, inputs_of, loaded, mlp, residual_cnn, run
from tests.helpers.written import external

save_module = importlib.import_module("ndonnx.graph.save")
# Saving


def test_saving_what_was_loaded_changes_nothing_any_more(tmp_path: Path) -> None:
    for name, build in BUILDERS.items():
        original = build()
        first, second = tmp_path / f"{name}.1.onnx", tmp_path / f"{name}.2.onnx"
        save(loaded(original), first)
        save(load(first), second)
        assert first.read_bytes() == second.read_bytes(), name
        feed = inputs_of(original)
        for output, expected in run(original, feed).items():
            np.testing.assert_array_equal(run(onnx.load(first), feed)[output], expected)


def test_a_model_with_external_data_is_saved_whole_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    model = load(external(tmp_path))
    save(model, tmp_path / "there" / "copy.onnx")
    assert os.listdir(tmp_path / "there") == ["copy.onnx"]
    copy = load(tmp_path / "there" / "copy.onnx")
    np.testing.assert_array_equal(run(copy, inputs_of(mlp()))["y"], run(mlp(), inputs_of(mlp()))["y"])
    assert isinstance(model.graph.initializers["h1.weight"].const_value, ir.ExternalTensor)


def test_a_large_model_is_saved_with_its_data_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "PROTOBUF_LIMIT", 100)
    path = tmp_path / "large.onnx"
    for _ in range(2):  # the second time over the first, from which the model reads
        model = load(path) if path.exists() else loaded(mlp())
        save(model, path)
        name, data = sorted(os.listdir(tmp_path), key=len)
        assert name == "large.onnx"
        assert re.fullmatch(r"large\.onnx\.[0-9a-f]{16}\.data", data)
        assert path.stat().st_size < (tmp_path / data).stat().st_size
        onnx.checker.check_model(str(path))
        again = load(path)
        assert tensor_bytes(again) == tensor_bytes(loaded(mlp()))
        np.testing.assert_array_equal(
            run(onnx.load_from_string(serialise(again)), inputs_of(mlp()))["y"], run(mlp(), inputs_of(mlp()))["y"]
        )


class Killed(BaseException):
    """In place of a signal that no process survives."""


class Killing:
    """Ends what runs before or after one of its changes to names on the disk."""

    def __init__(self, moment: int) -> None:
        self.moment, self.done = moment, 0

    def watch(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*names: Any, **options: Any) -> Any:
            self._tick()
            found = change(*names, **options)
            self._tick()
            return found

        return changed

    def _tick(self) -> None:
        self.done += 1
        if self.done == self.moment:
            raise Killed


@pytest.mark.parametrize("large", [True, False])
def test_a_kill_at_any_moment_of_a_save_leaves_the_old_model_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    path, feed = tmp_path / "m.onnx", inputs_of(mlp())
    old, new = loaded(mlp()), loaded(mlp())
    for name in list(new.graph.initializers)[:2]:
        value = new.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy() * 2, name=name)  # type: ignore[union-attr]
    answers = [run(onnx.load_from_string(serialise(model)), feed)["y"] for model in (old, new)]
    assert not np.array_equal(*answers)
    kept: list[int] = []
    for moment in itertools.count(1):
        monkeypatch.setattr(save_module, "PROTOBUF_LIMIT", 100)
        save(old, path)
        monkeypatch.setattr(save_module, "PROTOBUF_LIMIT", 100 if large else 10**9)
        killing = Killing(moment)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", killing.watch(os.replace))
            patch.setattr(Path, "unlink", killing.watch(Path.unlink))
            with suppress(Killed):
                save(new, path)
        found = run(onnx.load_from_string(serialise(load(path))), feed)["y"]
        kept.append(next(number for number, answer in enumerate(answers) if np.array_equal(found, answer)))
        if killing.done < moment:  # it came to its end
            break
    assert kept == sorted(kept)
    assert set(kept) == {0, 1}
    # What was left behind went with the next save.
    assert len(list(tmp_path.iterdir())) == (2 if large else 1)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: what a full disk looks like to the writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [10**9, 100])
def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = tmp_path / "m.onnx"
    save(loaded(mlp()), path)
    before = path.read_bytes()
    monkeypatch.setattr(save_module, "PROTOBUF_LIMIT", limit)
    other = loaded(residual_cnn())
    with pytest.raises(RunDirError, match=r"m\.onnx: cannot write the model"), file_size_limit(1000):
        save(other, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("limit", [10**9, 100])
def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    def interrupt() -> ir.Tensor:
        raise KeyboardInterrupt

    path = tmp_path / "m.onnx"
    save(loaded(mlp()), path)
    before = path.read_bytes()
    monkeypatch.setattr(save_module, "PROTOBUF_LIMIT", limit)
    model = loaded(mlp())
    weight = ir.LazyTensor(interrupt, ir.DataType.FLOAT, ir.Shape([9, 7]), name="h4.weight")
    model.graph.initializers["h4.weight"].const_value = weight
    with pytest.raises(KeyboardInterrupt):
        save(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_save_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "nowhere" / "m.onnx", tmp_path / "folder"):
        with pytest.raises(RunDirError, match=path.name):
            save(loaded(mlp()), path)
        with pytest.raises(RunDirError, match=path.name):
            check_writable(path)
    assert os.listdir(tmp_path) == ["folder"]
    check_writable(tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == ["folder"]
