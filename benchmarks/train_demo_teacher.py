"""Train the demo's teacher and write the three files that ship in `ndonnx/demo`.

    python -m benchmarks.train_demo_teacher [--out DIR]

Needs scikit-learn for its bundled copy of the digits (1797 grey images of 8x8 pixels, 17 levels).
The test split takes no part in training, and nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

ASSETS = Path(__file__).resolve().parents[1] / "ndonnx" / "demo"
SEED = 0
TEST_SAMPLES = 500
WIDTHS = (24, 40, 48)
EPOCHS = 40
BATCH = 64
PEAK_LR = 3e-3
WEIGHT_DECAY = 1e-2
BACKGROUND = -1.0
OPSET = 17


class Split(NamedTuple):
    """`image` float32 [N, 1, 8, 8] in -1..1; `label` int64 [N] in 0..9."""

    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.int64]


class Residual(nn.Module):
    """conv-BN-ReLU-conv-BN plus a skip; the skip is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(x))
        return out


class Teacher(nn.Module):
    """A stem, six residual units (two at 8x8, four at 4x4 pixels), global average pool, ten logits."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.conv = nn.Conv2d(1, first, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.unit1 = Residual(first, first, 1)
        self.unit2 = Residual(first, first, 1)
        self.unit3 = Residual(first, second, 2)
        self.unit4 = Residual(second, second, 1)
        self.unit5 = Residual(second, third, 1)
        self.unit6 = Residual(third, third, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(third, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.unit3(self.unit2(self.unit1(x)))
        x = self.unit6(self.unit5(self.unit4(x)))
        logits: Tensor = self.classifier(self.flatten(self.pool(x)))
        return logits


def load_splits() -> dict[str, Split]:
    """The digits as `train` and `test`, stratified by class; 0..16 ink becomes -1..1, exact in float32."""
    ink, label = load_digits(return_X_y=True)
    image = (ink.reshape(-1, 1, 8, 8) / 16 - 0.5) / 0.5
    parts = train_test_split(
        image.astype(np.float32), label.astype(np.int64), test_size=TEST_SAMPLES, stratify=label, random_state=SEED
    )
    return {"train": Split(parts[0], parts[2]), "test": Split(parts[1], parts[3])}


def shift(image: Tensor) -> Tensor:
    """Move each image by -1, 0 or 1 pixel along each axis, filling with background."""
    count, _, height, width = image.shape
    padded = nn.functional.pad(image, (1, 1, 1, 1), value=BACKGROUND)
    rows = torch.randint(0, 3, (count, 1)) + torch.arange(height)
    columns = torch.randint(0, 3, (count, 1)) + torch.arange(width)
    sample = torch.arange(count)[:, None, None]
    return padded[sample, 0, rows[:, :, None], columns[:, None, :]][:, None]


def train(split: Split, epochs: int = EPOCHS) -> Teacher:
    """Train from scratch; the same machine and thread count give the same weights."""
    torch.manual_seed(SEED)
    model = Teacher().train()
    images, labels = torch.from_numpy(split.image), torch.from_numpy(split.label)
    batches = len(labels) // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LR, total_steps=epochs * batches)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels))[: batches * BATCH].reshape(batches, BATCH):
            loss = nn.functional.cross_entropy(model(shift(images[batch])), labels[batch])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return model.eval()


def fold_batchnorm(model: Teacher) -> Teacher:
    """Fold each BatchNorm into its convolution in place, as a deployed model has it.

    Done here and not left to the exporter, which would rename the folded weights to running numbers.
    """
    model.conv, model.bn = fuse_conv_bn_eval(model.conv, model.bn), nn.Identity()  # type: ignore[assignment]
    for unit in model.children():
        if isinstance(unit, Residual):
            unit.conv1, unit.bn1 = fuse_conv_bn_eval(unit.conv1, unit.bn1), nn.Identity()  # type: ignore[assignment]
            unit.conv2, unit.bn2 = fuse_conv_bn_eval(unit.conv2, unit.bn2), nn.Identity()  # type: ignore[assignment]
    return model


def export(model: Teacher, path: Path) -> None:
    """Write the trained model as ONNX with a dynamic batch axis `N`; it gets its name once it is checked."""
    unchecked = path.with_suffix(".unchecked")
    torch.onnx.export(
        fold_batchnorm(model),
        (torch.zeros(2, 1, 8, 8),),
        unchecked,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        opset_version=OPSET,
        dynamo=False,
    )
    onnx.checker.check_model(unchecked, full_check=True)
    unchecked.replace(path)


def count_correct(teacher: Path, data: Path) -> tuple[int, int]:
    """Right answers and samples, by onnxruntime on the written files."""
    session = ort.InferenceSession(teacher, providers=["CPUExecutionProvider"])
    with np.load(data) as arrays:
        logits = session.run(["logits"], {"image": arrays["image"]})[0]
        return int((logits.argmax(axis=1) == arrays["label"]).sum()), len(arrays["label"])


def main(arguments: list[str] | None = None) -> None:
    """Write `teacher.onnx`, `train.npz` and `test.npz`, and print what was measured on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write into (default: ndonnx/demo)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the train split (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)  # sums in one order, so that the weights do not depend on the number of cores
    began = time.perf_counter()
    splits = load_splits()
    for name, split in splits.items():
        np.savez_compressed(options.out / f"{name}.npz", image=split.image, label=split.label)
    model = train(splits["train"], options.epochs)
    teacher = options.out / "teacher.onnx"
    export(model, teacher)

    weights = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(teacher).graph.initializer)
    print(f"{weights} weights, trained and written in {time.perf_counter() - began:.0f} s")
    for file in (teacher, *(options.out / f"{name}.npz" for name in splits)):
        print(f"{file.name}: {file.stat().st_size} bytes")
    for name in splits:
        correct, samples = count_correct(teacher, options.out / f"{name}.npz")
        print(f"{name}: {correct} of {samples} right ({correct / samples:.1%})")


if __name__ == "__main__":
    main()
