"""Sources that are functions or made up, and what holds for sources of every kind."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from ndonnx.config.recipe import DataRecipe
from ndonnx.data import InputSpec, open_source
from tests.helpers.data_files import (
    IMAGE,
    PLAIN,
    TOKENS,
    VECTOR,
    pixels,
    png,
    read,
    refused,
    taken,
    vectors,
)
from tests.helpers.models import Net

# Functions


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module in the current directory with many functions to read data from."""
    name = f"loader_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(
        "import numpy as np\n"
        "def rows(n): return np.arange(n * 4, dtype=np.float32).reshape(n, 4)\n"
        "def samples(): return ({'x': row} for row in rows(7))\n"
        "def labelled(): return [({'x': row}, i) for i, row in enumerate(rows(7))]\n"
        "def uneven(): return (({'x': rows(7)[a:b]}, list(range(a, b))) for a, b in [(0, 5), (5, 5), (5, 6), (6, 7)])\n"
        "def nothing(): return []\n"
        "def number(): return 3\n"
        "def arrays(): return [rows(2)]\n"
        "def wrong_key(): return [{'y': rows(2)}]\n"
        "def wrong_shape(): return [{'x': rows(2)[:, :3]}]\n"
        "def ragged(): return [{'x': [[1.0, 2.0], [1.0]]}]\n"
        "def bad_labels(): return [({'x': rows(2)}, [1])]\n"
        "def some_labels(): return [({'x': rows(2)}, [1, 2]), {'x': rows(2)}]\n"
        "def late_nan(): return [{'x': rows(2)}, {'x': rows(2) * np.float32('nan')}]\n"
        "def raises():\n"
        "    yield {'x': rows(2)}\n"
        "    raise KeyError('lost\\nin two lines')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("function", ["samples", "labelled", "uneven"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_functions_give_samples_or_batches(module: str, function: str, batch_size: int) -> None:
    source = open_source(f"{module}:{function}", [VECTOR], PLAIN)
    assert source.length is None and source.has_labels == (function != "samples")
    for samples in (None, 5):
        batch = read(source, batch_size, samples)
        np.testing.assert_array_equal(batch.inputs["x"], vectors()[:samples])
        if batch.labels is not None:
            np.testing.assert_array_equal(batch.labels, np.arange(7)[:samples])


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nothing", "no samples"),
        ("number", "TypeError"),
        ("arrays", "found ndarray"),
        ("wrong_key", "expected the inputs ['x'], found ['y']"),
        ("wrong_shape", "item 0: 'x': expected float32 [N, 4], found float32 [2, 3]"),
        ("ragged", "cannot be read as an array"),
        ("bad_labels", "each of 2 samples, found 1 labels"),
        ("some_labels", "some items have a label"),
        ("late_nan", "sample 2: NaN"),
        ("raises", "KeyError"),
        ("absent", "has no function 'absent'; it has ['rows', 'samples'"),
        ("np", "has no function 'np'"),
    ],
)
def test_functions_that_do_not_fit(module: str, function: str, words: str) -> None:
    assert words in refused(f"{module}:{function}", [VECTOR])


def test_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "cannot import 'no_such_module'" in refused("no_such_module:f", [VECTOR])
    Path("broken_loader.py").write_text("1 +\n")
    assert "SyntaxError" in refused("broken_loader:f", [VECTOR])


# Made up


@pytest.mark.parametrize("kind", ["gaussian", "smooth", "leaves"])
def test_made_up_samples_depend_on_nothing_but_the_seed(kind: str) -> None:
    inputs = [IMAGE, InputSpec("z", np.dtype(np.float16), (1, 5))]
    source = open_source(f"{kind}:500", inputs, PLAIN, seed=3)
    assert (source.length, source.has_labels) == (500, False)
    one, other = read(source, 7).inputs, read(source, 500).inputs
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert one["z"].dtype == np.float16 and one["z"].shape == (500, 5)
    assert one["image"].dtype == np.float32 and one["image"].shape == (500, 3, 8, 6)
    assert abs(one["image"].mean()) < 0.1 and abs(one["image"].std() - 1) < 0.1
    np.testing.assert_allclose(one["z"].astype(np.float64).std(axis=0), 1, atol=0.12)
    np.testing.assert_array_equal(taken(source, [400, 3]).inputs["z"], one["z"][[400, 3]])
    assert not np.array_equal(read(open_source(f"{kind}:500", inputs, PLAIN, seed=4)).inputs["image"], one["image"])
    assert open_source(kind, inputs, PLAIN).length == 20_000


@pytest.mark.parametrize("kind", ["gaussian", "smooth", "leaves"])
@pytest.mark.parametrize("count", ["0", "-3", "x", "1.5", "", "9" * 5000, "²"])
def test_made_up_samples_need_a_count(kind: str, count: str) -> None:
    message = refused(f"{kind}:{count}", [VECTOR])
    assert f"expected {kind}:N with a number of samples N" in message


def test_an_unknown_kind_of_made_up_samples_lists_the_known_ones() -> None:
    assert "gaussian, smooth, leaves" in refused("perlin", [VECTOR])
    assert "gaussian, smooth, leaves" in refused("perlin:-3", [VECTOR])


def test_made_up_samples_or_a_path_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("leaves").mkdir()
    Path("leaves", "1.png").write_bytes(png(pixels(0)))
    assert "write leaves:20000 or" in refused("leaves", [IMAGE])
    assert open_source("./leaves", [IMAGE], PLAIN).length == 1
    assert open_source("leaves:7", [IMAGE], PLAIN).length == 7


def test_made_up_pictures_go_through_the_preprocessing_of_real_ones() -> None:
    recipe = DataRecipe(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    plain = read(open_source("leaves:60", [IMAGE], PLAIN)).inputs["image"]
    pixels = 0.5 + 0.25 * plain
    assert pixels.min() == 0 and pixels.max() == 1
    mean, std = (np.asarray(part).reshape(3, 1, 1) for part in (recipe.mean, recipe.std))
    shown = read(open_source("leaves:60", [IMAGE], recipe)).inputs["image"]
    np.testing.assert_allclose(shown, (pixels - mean) / std, atol=1e-5)
    bytes_ = read(open_source("leaves:60", [IMAGE], DataRecipe(scale=1.0, mean=127.0, std=128.0))).inputs["image"]
    np.testing.assert_allclose(bytes_, (255 * pixels - 127) / 128, atol=1e-4)
    turned = InputSpec("image", np.dtype(np.uint8), ("N", 8, 6, 3))
    raw = read(open_source("leaves:60", [turned], PLAIN)).inputs["image"]
    np.testing.assert_allclose(raw, 255 * pixels.transpose(0, 2, 3, 1), atol=0.51)


@pytest.mark.parametrize(
    "shape", [("N", 7), ("N", 1, 50), ("N", 3, 1, 1), ("N", 2, 3, 8, 8), (1, 12, 3), ("N", 1, 2, 2)]
)
@pytest.mark.parametrize("kind", ["smooth", "leaves"])
def test_made_up_samples_for_inputs_that_are_no_images(kind: str, shape: tuple[int | str, ...]) -> None:
    values = read(open_source(f"{kind}:400", [InputSpec("x", np.dtype(np.float32), shape)], PLAIN)).inputs["x"]
    assert values.shape[1:] == shape[1:] and np.isfinite(values).all()
    assert 0.4 < values.std() < 1.2


def test_columns_of_a_made_up_table_depend_on_each_other() -> None:
    table = read(open_source("leaves:3000", [InputSpec("x", np.dtype(np.float32), ("N", 8))], PLAIN)).inputs["x"]
    np.testing.assert_allclose(table.std(axis=0), 1, atol=0.06)
    off = np.corrcoef(table.T)[np.triu_indices(8, 1)]
    assert np.abs(off).max() > 0.3 and np.abs(off).max() < 0.6


def test_made_up_samples_need_floats_of_known_size() -> None:
    dynamic = InputSpec("image", np.dtype(np.float32), ("N", 3, None, "W"))
    for kind in ("gaussian", "leaves"):
        assert "dimension 2 (?)" in refused(kind, [dynamic])
        assert "set size = [height, width] under [data]" in refused(kind, [dynamic])
        source = open_source(f"{kind}:2", [dynamic], DataRecipe(size=(4, 5)))
        assert read(source).inputs["image"].shape == (2, 3, 4, 5)
        assert "give data" in refused(kind, [InputSpec("x", np.dtype(np.float32), ("N", "features"))])
        assert "holds no floats" in refused(kind, [TOKENS])
        assert "check the model" in refused(kind, [InputSpec("x", np.dtype(np.float32), ("N", 2**40))])


def test_made_up_tokens_are_rows_of_the_table_in_which_they_are_looked_up() -> None:
    net = Net()
    ids = net.input("ids", "N", 12, dtype=TensorProto.INT32)
    mask = net.input("mask", "N", 12, dtype=TensorProto.INT64)
    x = net.op("Gather", net.weight("table", 30, 4), net.op("Cast", ids, to=TensorProto.INT64))
    graph = ir.from_proto(net.proto(x, net.op("Neg", mask))).graph
    inputs = [InputSpec("ids", np.dtype(np.int32), ("N", 12)), InputSpec("mask", np.dtype(np.int64), ("N", 12))]
    source = open_source("leaves:200", inputs, PLAIN, seed=1, graph=graph)
    one, other = read(source, 9).inputs, read(source, 200).inputs
    assert one["ids"].dtype == np.int32
    assert (one["ids"].min(), one["ids"].max()) == (0, 29)
    np.testing.assert_array_equal(one["ids"], other["ids"])
    assert (one["mask"] == 1).all() and len(np.unique(one["ids"], axis=0)) == 200


# All of them


def test_unknown_sources_list_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("1,2")
    for spec in (str(tmp_path / "d.csv"), "nowhere", "", "a:b:c", "bad\0name", "x" * 5000):
        message = refused(spec, [VECTOR])
        assert "a .npz or .npy file, a directory of images, module:function" in message or "cannot be read" in message


def test_inputs_without_a_sample_axis() -> None:
    assert "no axis for the samples" in refused("gaussian", [InputSpec("x", np.dtype(np.float32), ())])


def test_fingerprints_follow_content_and_preprocessing(tmp_path: Path, module: str) -> None:
    def digest(spec: object, recipe: DataRecipe = PLAIN, seed: int = 0) -> str:
        return open_source(str(spec), [VECTOR], recipe, seed=seed).fingerprint()

    np.save(tmp_path / "a.npy", vectors())
    np.save(tmp_path / "b.npy", vectors())
    np.save(tmp_path / "c.npy", vectors() + 1)
    assert digest(tmp_path / "a.npy") == digest(tmp_path / "b.npy") != digest(tmp_path / "c.npy")
    assert digest(tmp_path / "a.npy") != digest(tmp_path / "a.npy", DataRecipe(mean=0.5))
    assert len({digest("gaussian:5"), digest("gaussian:6"), digest("gaussian:5", seed=1), digest("leaves:5")}) == 4
    assert digest(f"{module}:samples") != digest(f"{module}:labelled")
    before = digest(f"{module}:samples")
    with Path(f"{module}.py").open("a") as file:
        file.write("# changed\n")
    assert digest(f"{module}:samples") != before
    assert re.fullmatch("[0-9a-f]{32}", before)


def test_the_fingerprint_of_a_folder_follows_names_and_bytes(tmp_path: Path) -> None:
    def digest() -> str:
        return open_source(str(tmp_path), [IMAGE], PLAIN).fingerprint()

    (tmp_path / "1.png").write_bytes(png(pixels(0)))
    digests = [digest()]
    (tmp_path / "1.png").write_bytes(png(pixels(1)))
    digests.append(digest())
    (tmp_path / "1.png").rename(tmp_path / "2.png")
    digests.append(digest())
    assert len(set(digests)) == 3
