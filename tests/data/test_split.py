"""One draw of rows for every stage: nothing is told of rows that anything else has seen, whatever the source."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from ndonnx.config.recipe import DataRecipe
from ndonnx.data import DataSource, InputSpec, open_source
from ndonnx.data.source import RowSource
from ndonnx.data.specs import Batch
from ndonnx.data.split import MOST_COMPARED, Split, draw, held_out
from ndonnx.data.subset import Joined, Subset
from ndonnx.errors import DataError

CLASSES, EACH = 5, 20
ROWS = CLASSES * EACH
IMAGE = InputSpec("x", np.dtype(np.float32), ("N", 3, 4, 4))


class Numbers(RowSource):
    """Samples that hold their own number."""

    def __init__(self, length: int) -> None:
        super().__init__("numbers", [InputSpec("x", np.dtype(np.float32), ("N", 1))], DataRecipe())
        self.length = length

    def _fetch(self, rows: NDArray[np.int64]) -> Batch:
        return Batch({"x": rows[:, None].astype(np.float32)}, None)

    def _content(self) -> Any:
        yield str(self.length).encode()


def pixels(row: int) -> NDArray[np.uint8]:
    """An image that tells its number."""
    return np.full((4, 4, 3), row, np.uint8)


def png(row: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(row)).save(buffer, "PNG")
    return buffer.getvalue()


def images() -> NDArray[np.float32]:
    return np.stack([pixels(row).transpose(2, 0, 1) for row in range(ROWS)]).astype(np.float32) / 255


def as_npz(folder: Path) -> str:
    np.savez(folder / "d.npz", x=images(), label=np.arange(ROWS) // EACH)
    return str(folder / "d.npz")


def as_npy(folder: Path) -> str:
    np.save(folder / "d.npy", images())
    return str(folder / "d.npy")


def as_parquet(folder: Path) -> str:
    rows = [{"image": {"bytes": png(row)}, "label": row // EACH} for row in range(ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet", row_group_size=30)
    return str(folder / "d.parquet")


def as_folder(folder: Path) -> str:
    for row in range(ROWS):
        path = folder / "images" / f"class-{row // EACH}" / f"{row:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(row))
    return str(folder / "images")


def as_function(folder: Path) -> str:
    (folder / "sorted_rows.py").write_text(
        "import numpy as np\n\ndef rows():\n"
        f"    for row in range({ROWS}):\n"
        f"        yield {{'x': np.full((3, 4, 4), row / 255, np.float32)}}, row // {EACH}\n"
    )
    return "sorted_rows:rows"


SOURCES: dict[str, Callable[[Path], str]] = {
    name.removeprefix("as_"): make for name, make in list(globals().items()) if name.startswith("as_")
}


def opened(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> DataSource:
    monkeypatch.chdir(folder)
    return open_source(SOURCES[kind](folder), [IMAGE], DataRecipe())


def numbers(source: DataSource) -> list[int]:
    """The numbers of the samples that really come out, in order."""
    batches = list(source.batches(7))
    assert all(len(batch) == 7 for batch in batches[:-1])
    return np.concatenate([np.rint(batch.inputs["x"][:, 0, 0, 0] * 255) for batch in batches]).astype(int).tolist()


@pytest.mark.parametrize("kind", SOURCES)
def test_sets_share_no_sample_and_each_has_all_classes_of_a_sorted_source(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = draw(opened(kind, tmp_path, monkeypatch), 80, seed=3, holdout=0.1, choosing=2000, confirming=2000)
    sets = {
        "training": numbers(split.to_fit(1000)),
        "choosing": numbers(split.to_choose()),
        "confirming": numbers(split.to_confirm()),
        "comparing": numbers(split.to_compare()),
    }
    assert sorted(chain(*sets.values())) == list(range(ROWS)), "each row is in one set"
    for name, rows in sets.items():
        assert len({row // EACH for row in rows}) >= 4, f"{name}: {rows}"
    assert numbers(split.to_train(20)) != sorted(numbers(split.to_train(20)))


@pytest.mark.parametrize("kind", SOURCES)
def test_all_kinds_of_sources_are_split_alike(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(kind, tmp_path, monkeypatch)
    found = draw(source, 50, seed=1, holdout=0.1)
    other = draw(Numbers(ROWS), 50, seed=1, holdout=0.1)
    for mine, theirs in zip(parts(found), parts(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert sorted(numbers(found.to_train(50))) == sorted([*found.validation[:5], *found.training[:45]])
    assert set(numbers(found.to_train(50))[:5]) == set(found.validation[:5]), "what chooses comes first"


def parts(split: Split) -> list[NDArray[np.int64]]:
    return [split.training, split.validation, split.confirmation, split.comparison]


@settings(max_examples=100)
@given(
    length=st.integers(3, 400) | st.integers(3, 60_000),
    samples=st.integers(2, 20_000),
    choosing=st.integers(0, 12_000),
    confirming=st.integers(0, 12_000),
    holdout=st.floats(0.01, 0.9),
)
def test_every_set_that_is_needed_has_rows_and_no_row_has_two_uses(
    length: int, samples: int, choosing: int, confirming: int, holdout: float
) -> None:
    if length < 3 + bool(confirming):
        with pytest.raises(DataError, match=f"at least {3 + bool(confirming)} are needed"):
            draw(Numbers(length), samples, seed=0, holdout=holdout, choosing=choosing, confirming=confirming)
        return
    split = draw(Numbers(length), samples, seed=0, holdout=holdout, choosing=choosing, confirming=confirming)
    rows = np.concatenate(parts(split))
    np.testing.assert_array_equal(np.sort(rows), np.arange(length))
    assert len(split.training) and len(split.validation) and 1 <= len(split.comparison) <= MOST_COMPARED
    assert bool(len(split.confirmation)) == bool(confirming) and len(split.confirmation) <= confirming
    assert split.available >= min(samples, length / 2), "training keeps at least half"
    if length >= samples + choosing + confirming + MOST_COMPARED:
        assert len(split.confirmation) == confirming and len(split.validation) >= choosing
    for size in {1, 2, split.available // 2, split.available, samples}:
        if 2 <= size <= split.available:
            chosen = split.to_train(size)
            assert chosen.length == size
            assert split.held(size) == min(held_out(size, holdout), len(split.validation))


@pytest.mark.parametrize("length", [400, 2000])
def test_with_rows_enough_a_training_is_the_same_whatever_is_held_out_beside_it(length: int) -> None:
    alone = draw(Numbers(length), 100, seed=5, holdout=0.05)
    searched = draw(Numbers(length), 100, seed=5, holdout=0.05, choosing=30, confirming=60)
    for size in (20, 100):
        assert alone.to_train(size).fingerprint() == searched.to_train(size).fingerprint()
    np.testing.assert_array_equal(alone.comparison, searched.comparison)
    assert alone.key() != searched.key() != draw(Numbers(length), 100, seed=6, holdout=0.05).key()


def test_a_smaller_training_has_the_first_rows_of_a_larger_one() -> None:
    split = draw(Numbers(300), 200, seed=0, holdout=0.1)
    small, large = (np.concatenate([b.inputs["x"][:, 0] for b in split.to_train(n).batches(64)]) for n in (50, 200))
    assert small[:5].tolist() == large[:5].tolist() and small[5:].tolist() == large[20:65].tolist()


def test_a_function_is_counted_only_as_far_as_rows_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endless_rows.py").write_text(
        "import itertools\nimport numpy as np\n\ndef rows():\n"
        "    return ({'x': np.full((3, 4, 4), row, np.float32)} for row in itertools.count())\n"
    )
    monkeypatch.chdir(tmp_path)
    split = draw(open_source("endless_rows:rows", [IMAGE], DataRecipe()), 300, seed=0, holdout=0.05)
    assert sum(map(len, parts(split))) == 300 + MOST_COMPARED and split.available >= 300


def test_a_function_that_gives_less_the_second_time_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fewer_rows.py").write_text(
        "import numpy as np\nfrom pathlib import Path\n\ndef rows():\n"
        "    return [{'x': np.zeros((3, 4, 4), np.float32)}] * int(Path('count').read_text())\n"
    )
    monkeypatch.chdir(tmp_path)
    Path("count").write_text("30")
    split = draw(open_source("fewer_rows:rows", [IMAGE], DataRecipe()), 300, seed=0, holdout=0.05)
    Path("count").write_text("9")
    with pytest.raises(DataError, match="ended after 9 samples, and gave more on an earlier pass"):
        list(split.to_train(20).batches(4))


def test_made_up_rows_behind_the_others_are_held_out() -> None:
    both = Joined(Numbers(50), Subset(Numbers(500), np.arange(100, 125)))
    split = draw(both, 50, seed=0, holdout=0.1, choosing=10, confirming=10, made_up=50)
    assert [*split.validation[:5], *split.training] == list(range(50))
    values = [
        np.concatenate([b.inputs["x"][:, 0] for b in s.batches(4)]) for s in (split.to_confirm(), split.to_compare())
    ]
    assert values[0].tolist() == [*range(110, 120)] and values[1].tolist() == [*range(120, 125)]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(st.integers(0, 11), min_size=1, max_size=30), size=st.integers(1, 9))
def test_joined_sources_keep_the_order_that_is_asked_for(rows: list[int], size: int) -> None:
    both = Joined(Numbers(5), Subset(Numbers(9), np.arange(7)))
    found = np.concatenate([b.inputs["x"][:, 0] for b in both.take(np.array(rows), size)])
    assert found.tolist() == [row if row < 5 else row - 5 for row in rows]
