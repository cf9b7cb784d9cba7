"""Teachers of many families, exported on the spot with random seeded weights, for `benchmarks.coverage`.

    python -m benchmarks.corpus NAME EXPORTER FOLDER

writes `NAME.EXPORTER.onnx`, and beside it `NAME.EXPORTER.npz` with a few samples of its inputs.
Exporters: `script` (TorchScript, opset 17) and `export` (torch.export, opset 18), both with a
dynamic batch. Transformers are small (2 or 3 layers), and so are networks that would need large
images, so that a whole run takes minutes; their graphs have the form of the full-sized ones.
Statistics of norms are those of random inputs, so that activations neither explode nor vanish.
Needs the optional dependencies `coverage`.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def _make_torchvision_load() -> None:
    """Declare the operators without which a torchvision for CUDA fails beside a CPU-only torch, once it has failed.

    Its models, which are all that is wanted here, need none of them. Where it loads by itself nothing is declared.
    """
    try:
        import torchvision  # noqa: F401, PLC0415
    except ImportError:
        return  # models that need it say so
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_make_torchvision_load()

Exporter = Literal["script", "export"]
EXPORTERS: tuple[Exporter, ...] = ("script", "export")
OPSETS: dict[Exporter, int] = {"script": 17, "export": 18}

SAMPLES = 4
"""Samples kept beside a model."""
_CALIBRATION = 16
"""Samples that the statistics of norms are taken from."""
_TRACED_BATCH = 2
"""torch.export takes a batch of 1 for a constant."""
_VOCABULARY = 99
_TOKENS = 16
_SEED = 0


@dataclass(frozen=True)
class Feed:
    """One input: its shape without the batch axis, and what it holds."""

    shape: tuple[int, ...]
    kind: Literal["normal", "tokens", "mask"] = "normal"
    dynamic: int | None = None
    """Axis (counted with the batch axis) that is dynamic too."""

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[Any]:
        """`count` samples: float32 normal, int64 token numbers, or int64 masks of different lengths."""
        if self.kind == "normal":
            return rng.standard_normal((count, *self.shape), dtype=np.float32)
        if self.kind == "tokens":
            return rng.integers(3, _VOCABULARY, (count, *self.shape), dtype=np.int64)
        lengths = rng.integers(self.shape[-1] // 2, self.shape[-1] + 1, (count, 1))
        return (np.arange(self.shape[-1]) < lengths).astype(np.int64)


@dataclass(frozen=True)
class Specimen:
    """A model of the corpus."""

    build: Callable[[], nn.Module]
    feeds: Mapping[str, Feed]
    """Inputs by the name of the module's argument."""
    outputs: tuple[str, ...] | None = None
    """Which of the module's named outputs are exported; None: all tensors among them."""
    ways: tuple[Exporter, ...] = EXPORTERS
    """Exporters that take it."""


class _Flat(nn.Module):
    """A module called with positional tensors that answers with tensors only."""

    def __init__(self, model: nn.Module, names: Sequence[str], outputs: tuple[str, ...] | None) -> None:
        super().__init__()
        self.model = model
        self._names = tuple(names)
        self._outputs = outputs

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        by_position = self._names[0] == ""
        out = self.model(*inputs) if by_position else self.model(**dict(zip(self._names, inputs, strict=True)))
        if isinstance(out, Tensor):
            return out
        if isinstance(out, Mapping):
            out = [out[name] for name in self._outputs] if self._outputs is not None else list(out.values())
        tensors = tuple(value for value in out if isinstance(value, Tensor))
        return tensors[0] if len(tensors) == 1 else tensors


def image(size: int = 64) -> dict[str, Feed]:
    """The one input of an image model, by position."""
    return {"": Feed((3, size, size))}


def text(*, mask: bool = True, dynamic: bool = False) -> dict[str, Feed]:
    """Token numbers, and the mask of those that count."""
    axis = 1 if dynamic else None
    feeds = {"input_ids": Feed((_TOKENS,), "tokens", axis)}
    return feeds | {"attention_mask": Feed((_TOKENS,), "mask", axis)} if mask else feeds


def _vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models  # noqa: PLC0415

        extra: dict[str, Any] = {"weights": None, **options}
        model: nn.Module = models.get_model(name, **extra)
        return model

    return build


def _segmentation(name: str) -> Callable[[], nn.Module]:
    return _vision(name, weights_backbone=None, num_classes=8)


def _small_vgg() -> nn.Module:
    """VGG-11 of 64 pixels with small dense layers: those of the real one hold nine tenths of its weights."""
    model = _vision("vgg11_bn", num_classes=10, init_weights=False)()
    model.avgpool = nn.Identity()
    model.classifier = nn.Sequential(nn.Linear(512 * 4, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10))
    return model


def _small_vit() -> nn.Module:
    from torchvision.models import VisionTransformer  # noqa: PLC0415

    # As in the real one, the patch convolution holds a few per cent of the weights.
    sizes = {"image_size": 64, "patch_size": 8, "num_layers": 4, "num_heads": 4, "hidden_dim": 96, "mlp_dim": 384}
    model: nn.Module = VisionTransformer(**sizes, num_classes=10)
    return model


def _small_swin() -> nn.Module:
    from torchvision.models import SwinTransformer  # noqa: PLC0415

    sizes: dict[str, Any] = {"patch_size": [4, 4], "embed_dim": 32, "depths": [2, 2, 2], "num_heads": [2, 4, 8]}
    model: nn.Module = SwinTransformer(**sizes, window_size=[4, 4], num_classes=10)
    return model


def _small_maxvit() -> nn.Module:
    from torchvision.models import MaxVit  # noqa: PLC0415

    sizes: dict[str, Any] = {"input_size": (64, 64), "stem_channels": 16, "partition_size": 2, "head_dim": 16}
    blocks: dict[str, Any] = {"block_channels": [16, 32, 64, 128], "block_layers": [1, 1, 2, 1]}
    model: nn.Module = MaxVit(**sizes, **blocks, stochastic_depth_prob=0.0, num_classes=10)
    return model


def _pyramid() -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone  # noqa: PLC0415

    model: nn.Module = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return model


def _transformer(kind: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A class of `transformers` by name (`BertModel`), with its own configuration class in these sizes."""

    def build() -> nn.Module:
        import transformers  # noqa: PLC0415

        model_class = getattr(transformers, kind)
        config = model_class.config_class(**sizes)
        model: nn.Module = model_class(config)
        return model

    return build


def _encoder_of(kind: str, **sizes: Any) -> Callable[[], nn.Module]:
    """The encoder half of an encoder-decoder."""

    def build() -> nn.Module:
        encoder: nn.Module = _transformer(kind, **sizes)().get_encoder()  # type: ignore[operator]
        return encoder

    return build


def _clip() -> nn.Module:
    import transformers  # noqa: PLC0415

    text_sizes = {**_ENCODER, "max_position_embeddings": 32, "projection_dim": 32, "eos_token_id": 2}
    vision_sizes = {**_ENCODER, "image_size": 32, "patch_size": 8, "projection_dim": 32}
    vision_sizes.pop("vocab_size")
    model: nn.Module = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text_sizes, vision_config=vision_sizes, projection_dim=32)
    )
    return model


_ENCODER: dict[str, Any] = {
    "vocab_size": _VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128,
}  # fmt: skip
_DECODER: dict[str, Any] = {**_ENCODER, "use_cache": False, "max_position_embeddings": 64}
_GPT: dict[str, Any] = {"vocab_size": _VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "use_cache": False}
_VIT = {key: value for key, value in _ENCODER.items() if key != "vocab_size"} | {
    "image_size": 32, "patch_size": 8, "num_hidden_layers": 4, "intermediate_size": 256,
}  # fmt: skip
_SPEECH: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3),
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_MIX: dict[str, Any] = {
    "num_encoder_blocks": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64],
    "num_attention_heads": [1, 2, 4, 4], "decoder_hidden_size": 32,
}  # fmt: skip

CORPUS: dict[str, Specimen] = {
    "resnet18": Specimen(_vision("resnet18"), image()),
    "resnet50": Specimen(_vision("resnet50"), image()),
    "vgg11_bn": Specimen(_small_vgg, image()),
    "squeezenet1_1": Specimen(_vision("squeezenet1_1"), image()),
    "mobilenet_v2": Specimen(_vision("mobilenet_v2"), image()),
    "mobilenet_v3_small": Specimen(_vision("mobilenet_v3_small"), image()),
    "efficientnet_b0": Specimen(_vision("efficientnet_b0"), image()),
    "densenet121": Specimen(_vision("densenet121"), image()),
    "googlenet": Specimen(_vision("googlenet", init_weights=False, aux_logits=False), image()),
    "inception_v3": Specimen(_vision("inception_v3", init_weights=False, aux_logits=False), image(96)),
    "mnasnet1_0": Specimen(_vision("mnasnet1_0"), image()),
    "shufflenet_v2": Specimen(_vision("shufflenet_v2_x1_0"), image()),
    "regnet_y_400mf": Specimen(_vision("regnet_y_400mf"), image()),
    "resnext50": Specimen(_vision("resnext50_32x4d"), image()),
    "convnext_tiny": Specimen(_vision("convnext_tiny"), image()),
    "vit": Specimen(_small_vit, image()),
    "swin": Specimen(_small_swin, image()),
    "maxvit": Specimen(_small_maxvit, image()),
    "lraspp": Specimen(_segmentation("lraspp_mobilenet_v3_large"), image(128), ("out",)),
    "fcn_resnet50": Specimen(_segmentation("fcn_resnet50"), image(64), ("out",)),
    "deeplab": Specimen(_segmentation("deeplabv3_mobilenet_v3_large"), image(128), ("out",)),
    "fpn": Specimen(_pyramid, image(64)),
    "bert": Specimen(_transformer("BertModel", **_ENCODER), text()),
    "bert_dynamic": Specimen(_transformer("BertModel", **_ENCODER), text(dynamic=True)),
    "bert_classifier": Specimen(_transformer("BertForSequenceClassification", **_ENCODER), text()),
    "distilbert": Specimen(
        _transformer("DistilBertModel", vocab_size=_VOCABULARY, dim=64, n_layers=2, n_heads=4, hidden_dim=128), text()
    ),
    "roberta": Specimen(_transformer("RobertaModel", **_ENCODER, max_position_embeddings=64, pad_token_id=0), text()),
    "electra": Specimen(_transformer("ElectraModel", **_ENCODER, embedding_size=32), text()),
    "gpt2": Specimen(_transformer("GPT2LMHeadModel", **_GPT), text()),
    "gpt2_dynamic": Specimen(_transformer("GPT2LMHeadModel", **_GPT), text(dynamic=True)),
    "llama": Specimen(_transformer("LlamaForCausalLM", **_DECODER, num_key_value_heads=2), text()),
    "llama_dynamic": Specimen(
        _transformer("LlamaForCausalLM", **_DECODER, num_key_value_heads=2), text(dynamic=True)
    ),
    "qwen2": Specimen(_transformer("Qwen2ForCausalLM", **_DECODER, num_key_value_heads=2), text()),
    "t5_encoder": Specimen(
        _transformer(
            "T5EncoderModel", vocab_size=_VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
        ),
        text(),
    ),
    "hf_vit": Specimen(_transformer("ViTModel", **_VIT), {"pixel_values": Feed((3, 32, 32))}),
    "hf_swin": Specimen(
        _transformer(
            "SwinModel", image_size=64, patch_size=4, embed_dim=32, depths=[1, 2], num_heads=[2, 4], window_size=4
        ),
        {"pixel_values": Feed((3, 64, 64))},
    ),
    "segformer": Specimen(
        _transformer("SegformerForSemanticSegmentation", **_MIX), {"pixel_values": Feed((3, 64, 64))}
    ),
    "whisper_encoder": Specimen(
        _encoder_of(
            "WhisperModel", vocab_size=_VOCABULARY, d_model=64, encoder_layers=2, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
            num_mel_bins=16, max_source_positions=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        ),
        {"input_features": Feed((16, 100))},
    ),
    "wav2vec2": Specimen(_transformer("Wav2Vec2Model", **_SPEECH), {"input_values": Feed((1600,))}),
    "hubert": Specimen(_transformer("HubertModel", **_SPEECH), {"input_values": Feed((1600,))}),
    "clip": Specimen(
        _clip,
        {**text(), "pixel_values": Feed((3, 32, 32))},
        ("logits_per_image", "text_embeds", "image_embeds"),
    ),
    "hf_convnext": Specimen(
        _transformer("ConvNextModel", hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1]),
        {"pixel_values": Feed((3, 64, 64))},
    ),
}  # fmt: skip


def exporters(name: str) -> tuple[Exporter, ...]:
    """The ways in which a model of the corpus can be exported."""
    return CORPUS[name].ways


def export(name: str, exporter: Exporter, folder: Path) -> Path:
    """Export a model of the corpus; whatever torch raises goes through.

    The samples are written first, so that a model in the folder always has its own beside it.
    """
    specimen = CORPUS[name]
    torch.manual_seed(_SEED)
    model = _Flat(specimen.build().eval(), list(specimen.feeds), specimen.outputs).eval()
    names = [key or "input" for key in specimen.feeds]
    rng = np.random.default_rng(_SEED)
    samples = {key: feed.draw(SAMPLES, rng) for key, feed in zip(names, specimen.feeds.values(), strict=True)}
    many = [torch.from_numpy(feed.draw(_CALIBRATION, rng)) for feed in specimen.feeds.values()]
    calibrate(unsettle(model), many)
    path = folder / f"{name}.{exporter}.onnx"
    np.savez(path.with_suffix(".npz"), allow_pickle=False, **samples)
    inputs = tuple(torch.from_numpy(array[:_TRACED_BATCH]) for array in samples.values())
    axes = [_dynamic(feed) for feed in specimen.feeds.values()]
    shared: dict[str, Any] = {"opset_version": OPSETS[exporter], "input_names": names}
    scratch = folder / f".{path.name}"
    with torch.no_grad():
        if exporter == "script":
            # TorchScript would otherwise see one operator that it cannot export.
            torch.backends.mha.set_fastpath_enabled(False)
            torch.onnx.export(
                model, inputs, str(scratch), dynamo=False, dynamic_axes=dict(zip(names, axes, strict=True)), **shared
            )
        else:
            dims = {label: torch.export.Dim(label, min=1, max=4096) for label in ("batch", "length")}
            shapes = tuple({axis: dims[label] for axis, label in found.items()} for found in axes)
            torch.onnx.export(
                model, inputs, str(scratch), dynamo=True, dynamic_shapes=(shapes,), external_data=False, **shared
            )
    scratch.rename(path)
    return path


def _dynamic(feed: Feed) -> dict[int, str]:
    return {0: "batch"} if feed.dynamic is None else {0: "batch", feed.dynamic: "length"}


def unsettle(model: nn.Module) -> nn.Module:
    """Move biases and scales away from the zeros and ones of a fresh model, which hide mistakes."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim <= 1:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def calibrate(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Give every BatchNorm the statistics of what reaches it: a deep network with those of a fresh one explodes."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.train()
    with torch.no_grad():
        model(*inputs)
    for norm in norms:
        norm.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Export one model; its path goes to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CORPUS)
    parser.add_argument("exporter", choices=EXPORTERS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the exporters' own, about tracing
    logging.disable(logging.WARNING)
    print(export(options.name, options.exporter, options.folder))


if __name__ == "__main__":
    main()
