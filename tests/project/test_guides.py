"""The guides of the site: their files, commands and figures, on small models with the interfaces of the real ones."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from ndonnx_cli.main import main
from tests.helpers.guides import FETCH, Step, steps_of
from tests.helpers.models import Net

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS.parent / "benchmarks" / "RESULTS.md"
ENDS = (0, 3)
"""Exit codes of a command that was understood: done, or done and something fell short."""
SMALL = {
    "compress": ["--executor", "serial", "-q"],
    "evaluate": ["-q"],
    "benchmark": ["--processes", "2", "--rounds", "2", "-q"],
    "inspect": ["-q"],
    "report": ["-q"],
}


def classifier() -> onnx.ModelProto:
    net = Net()
    x = _unit(net, _stem(net, 8))
    flat = net.op("Flatten", net.op("GlobalAveragePool", x))
    return net.proto(net.op("Softmax", net.gemm(flat, 8, 2), out="save_infer_model/scale_0.tmp_1"), opset=11)


def reader() -> onnx.ModelProto:
    net = Net(1)
    row = net.op("ReduceMean", _unit(net, _stem(net, 8)), axes=[2], keepdims=0)
    scores = net.matmul(net.op("Transpose", row, perm=[0, 2, 1]), 8, 9)
    return net.proto(net.op("Softmax", scores, axis=2, out="softmax_11.tmp_0"), opset=12)


def detector() -> onnx.ModelProto:
    net = Net(2)
    scales = net.constant("scales", np.array([1, 1, 8, 8], np.float32))
    large = net.op("Resize", _unit(net, _stem(net, 8)), net.constant("roi", np.zeros(0, np.float32)), scales)
    return net.proto(net.op("Sigmoid", net.conv(large, 8, 1, 1), out="sigmoid_0.tmp_0"), opset=12)


def _stem(net: Net, stride: int) -> str:
    return net.relu(net.conv(net.input("x", "N", 3, "H", "W"), 3, 8, 9, stride=stride))


def _unit(net: Net, x: str) -> str:
    return net.op("Add", net.conv(net.relu(net.conv(x, 8, 16)), 16, 8), x)


def embedder() -> onnx.ModelProto:
    net = Net(3)
    ids, mask = (net.input(name, "N", "S", dtype=TensorProto.INT64) for name in ("input_ids", "attention_mask"))
    x = net.op("Gather", net.weight("table", 64, 16), ids)
    x = net.op("Add", net.matmul(net.relu(net.matmul(x, 16, 32)), 32, 16), x, out="onnx::Shape_422")
    filled = net.op("Cast", net.op("Unsqueeze", mask, net.ints(2)), to=TensorProto.FLOAT)
    total, count = (net.op("ReduceSum", v, net.ints(1), keepdims=0) for v in (net.op("Mul", x, filled), filled))
    return net.proto(x, net.op("Div", total, count, out="461"), opset=17)


def listener() -> onnx.ModelProto:
    net = Net(4)
    heard, state = net.input("input", "N", "samples"), net.input("state", 2, "N", 128)
    rate = net.input("sr", dtype=TensorProto.INT64)
    x = net.gemm(net.relu(net.gemm(heard, 576, 32)), 32, 16)
    before = net.op("Squeeze", net.op("Slice", state, net.ints(0), net.ints(1), net.ints(0)), net.ints(0))
    x = net.op("Tanh", net.op("Add", x, net.gemm(before, 128, 16)))
    right = net.op("Cast", net.op("Equal", rate, net.constant("rate", np.array(16000))), to=TensorProto.FLOAT)
    speech = net.op("Sigmoid", net.op("Mul", net.gemm(x, 16, 1), right), out="output")
    after = net.op("Unsqueeze", net.op("Tanh", net.gemm(x, 16, 128)), net.ints(0))
    return net.proto(speech, net.op("Concat", after, after, axis=0, out="stateN"), opset=15)


def _put_tokenizer() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415 - for one guide

    words = ("[PAD]", "[UNK]", "the", "of", "a", "is", "to", "and", "in", "object", "class", "if", "for")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("tokenizer.json")


GUIDES: dict[str, Callable[[], onnx.ModelProto]] = {
    "image-classification": classifier,
    "ocr": reader,
    "embeddings": embedder,
    "detection": detector,
    "audio": listener,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_runs_as_written(guide: str, folder: Path) -> None:
    onnx.save(GUIDES[guide](), "model.onnx")
    if guide == "embeddings":
        _put_tokenizer()
    steps = list(steps_of(DOCS / "guides" / f"{guide}.md"))
    assert [step.kind for step in steps].count(FETCH) == 1
    for step in steps:
        carry_out(step)
    assert (folder / "student.onnx").exists() and (folder / "student.run" / "report.html").exists()


def carry_out(step: Step) -> None:
    """Save a file, or run commands, with little data and few steps."""
    if step.kind == FETCH:
        return
    if step.name:
        text, count = re.subn(r"^TRAIN, TEST = .*$", "TRAIN, TEST = 40, 12", step.body, flags=re.MULTILINE)
        assert count == (step.name == "inputs.py")
        Path(step.name).write_text(text, encoding="utf-8")
        return
    assert step.kind == "sh", f"a block of {step.kind} that nothing is done with"
    for words in step.commands:
        run(words)


def run(words: list[str]) -> None:
    program, *arguments = words
    if program == "python":
        sys.argv[:] = arguments
        runpy.run_path(arguments[0], run_name="__main__")
        return
    assert program == "ndonnx", words
    if "--time-budget" in arguments:
        at = arguments.index("--time-budget")
        arguments[at : at + 2] = ["--steps", "2", "--finetune-steps", "2"]
    elif "--target" in arguments:
        with Path("recipe.toml").open("a", encoding="utf-8") as recipe:
            recipe.write('[search]\ncandidates = ["width 0.5"]\nsteps = 1\n')
        arguments += ["--steps", "2", "--finetune-steps", "0"]
    assert main([*arguments, *SMALL[arguments[0]]]) in ENDS, words


def test_what_a_guide_fetches_is_what_the_field_benchmark_measures() -> None:
    subjects = (DOCS.parent / "benchmarks" / "field" / "subjects.py").read_text(encoding="utf-8")
    pinned = {found for guide in GUIDES for found in re.findall(r"[\w-]+==[\d.]+", _text(f"guides/{guide}.md"))}
    assert len(pinned) == 4
    assert all(f'"{requirement}"' in subjects for requirement in pinned)


@pytest.mark.parametrize("page", ["index.md", "guides/choosing.md"])
def test_figures_of_a_page_stand_in_the_results(page: str) -> None:
    results = RESULTS.read_text(encoding="utf-8")
    rows = [line for line in _text(page).splitlines() if line.startswith("|")]
    told = {number for row in rows for number in re.findall(r"(?<![\w.`-])\d[\d,]*\.?\d+%?(?!\w)", _plain(row))}
    missing = sorted(number for number in told if number not in results)
    assert told and not missing


def _plain(row: str) -> str:
    """A row without the commands in it."""
    return re.sub(r"`[^`]*`", "", row)


def _text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")
